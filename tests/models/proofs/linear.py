"""Linear attention: the explicit matrix of kernel values over its row sums."""

import math

import torch

from models.linear import linear_attention
from proofs.faults import NO_SCALE, Plant, attention_faults, other_eps
from proofs.kit import Limit, Oracle, by_head, distance, draw, file_of


def positive(x):
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


@by_head
def reference(module, head, q, k, v, real):
    keys = real if module.use_mask else list(range(len(k)))
    kernel = positive(q) @ positive(k[keys]).T
    if not module.normalise:
        return kernel @ v[keys] / math.sqrt(len(k))
    sums = kernel.sum(dim=-1, keepdim=True)
    return kernel @ v[keys] / (sums + module.eps if module.add_eps else torch.clamp(sums, min=module.eps))


CASES = [{}, {"eps": 1e-2}, {"eps": 1e-2, "add_eps": True}, {"normalise": False}, {"use_mask": False}]


def limit_of_mean():
    q, k, v = draw(3, 2, 2, 13, 4)
    k = k[:, :, :1].expand_as(k)
    return distance(v.mean(dim=2, keepdim=True).expand_as(v), linear_attention(q, k, v))


def limit_of_dense_kernel():
    q, k, v = draw(3, 2, 2, 13, 4)
    mask = torch.arange(13) % 3 != 1
    kernel = (positive(q) @ positive(k).mT) * mask
    expected = kernel / kernel.sum(dim=-1, keepdim=True) @ v
    return distance(expected, linear_attention(q, k, v, mask.expand(2, 13)))


LIMITS = [
    Limit("dense attention with the matrix f(q_i) . f(k_j), a mask with holes", limit_of_dense_kernel),
    Limit("equal keys give the mean of the values, as softmax does", limit_of_mean),
]


def against_fla():
    """The last token of a causal mechanism sees all: one copy of the row per token, with that token last.

    The file takes features that are mapped already and gives sums, here of values and of ones.
    """
    naive = file_of("fla", "ops/linear_attn/naive.py")
    q, k, v = draw(3, 64, 2, 4)  # [l h d]
    turned = [torch.stack([x.roll(63 - i, dims=0) for i in range(64)]) for x in (positive(q), positive(k), v)]
    sums = [
        naive.naive_chunk_linear_attn(*turned[:2], x, scale=1.0)
        for x in (turned[2], torch.ones_like(turned[2]))
    ]
    found = linear_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
    return distance(sums[0][:, -1] / sums[1][:, -1], found)


ORACLES = [
    Oracle(
        "fla-core 0.6.0, ops/linear_attn/naive.py", "sums over the keys of each of 64 queries", against_fla
    )
]

FAULTS = {
    **attention_faults("linear_attention"),
    "no scale": NO_SCALE,
    "wrong eps": Plant("linear_attention", other_eps),
}
