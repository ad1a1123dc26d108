"""cosFormer: the explicit matrix of weights, the cosine of each distance written out."""

import math

import torch

from models.cosformer import cosine_attention
from proofs.faults import NO_SCALE, Plant, attention_faults, changed, other_eps
from proofs.kit import Limit, Oracle, by_head, distance, draw, file_of


@by_head
def reference(module, head, q, k, v, real):
    period = len(q) if module.padded_period else module.place.max_len
    keys = real if module.use_mask else list(range(len(q)))
    away = torch.tensor([[i - j for j in keys] for i in range(len(q))], dtype=q.dtype)
    weights = positive(q) @ positive(k[keys]).T * torch.cos(math.pi / 2 * away / period)
    return weights @ v[keys] / torch.clamp(weights.sum(dim=-1, keepdim=True), min=module.eps)


def positive(x):
    return torch.where(x > 0, x, 0.0)


CASES = [{}, {"eps": 1.0}, {"padded_period": True}, {"padded_period": True, "use_mask": False}]


def limit_of_wide_cosine():
    q, k, v = draw(3, 2, 2, 13, 4)
    mask = torch.arange(13) % 3 != 1
    kernel = (positive(q) @ positive(k).mT) * mask
    expected = kernel @ v / kernel.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    return distance(expected, cosine_attention(q, k, v, mask.expand(2, 13), period=10**9))


def limit_of_equal_keys():
    """Positive equal keys: weights are cosines of distances alone."""
    q, k, v = draw(3, 2, 2, 13, 4).abs()
    falls = [[math.cos(math.pi / 2 * (i - j) / 20) for j in range(13)] for i in range(13)]
    falls = torch.tensor(falls, dtype=q.dtype)
    found = cosine_attention(q, k[:, :, :1].expand_as(k), v, period=20)
    return distance(falls / falls.sum(dim=-1, keepdim=True) @ v, found)


LIMITS = [
    Limit("a period far above the length: dense attention with relu(q_i) . relu(k_j)", limit_of_wide_cosine),
    Limit("equal keys: dense attention with the cosines of distances", limit_of_equal_keys),
]


def against_fla():
    """Sums over keys by a public file, of features from complex turns: z w* has real part cos(a - b)."""
    naive = file_of("fla", "ops/linear_attn/naive.py")
    q, k, v = draw(3, 64, 2, 4)  # [l h d]
    turn = torch.exp(1j * math.pi / 2 * torch.arange(64, dtype=torch.float64) / 100)[:, None, None]
    q_turned, k_turned = (torch.view_as_real(positive(x) * turn).flatten(-2) for x in (q, k))
    turned = [torch.stack([x.roll(63 - i, dims=0) for i in range(64)]) for x in (q_turned, k_turned, v)]
    values, ones = turned[2], torch.ones_like(turned[2])
    mixed, sums = (naive.naive_chunk_linear_attn(*turned[:2], x, scale=1.0)[:, -1] for x in (values, ones))
    found = cosine_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), period=100)[0].transpose(0, 1)
    return distance(mixed / sums.clamp(min=1e-6), found)


ORACLES = [
    Oracle("fla-core 0.6.0, ops/linear_attn/naive.py", "sums of cosine-weighted features", against_fla)
]

FAULTS = {
    **attention_faults("cosine_attention"),
    "no scale": NO_SCALE,
    "window off by one": Plant("cosine_attention", changed(period=lambda m: m + 1)),
    "wrong eps": Plant("cosine_attention", other_eps, {"eps": 1.0}),
}
