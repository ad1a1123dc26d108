"""Taylor attention: the polynomial of the explicit score matrix."""

import math

import torch

from models.taylor import taylor_attention
from proofs.faults import Plant, attention_faults, other_eps
from proofs.kit import Limit, Oracle, by_head, dense_softmax, distance, draw, file_of


@by_head
def reference(module, head, q, k, v, real):
    if module.d_feature:
        q, k = q @ module.query_projection[head], k @ module.key_projection[head]
    scores = q @ k[real].T / math.sqrt(q.shape[-1])
    weights = sum(scores**t / math.factorial(t) for t in range(module.order + 1))
    sums = weights.sum(dim=-1, keepdim=True)
    small = torch.where(sums < 0, -module.eps, module.eps)
    return weights @ v[real] / torch.where(sums.abs() < module.eps, small, sums)


CASES = [
    {},
    {"order": 1, "eps": 0.5},
    {"order": 3},
    {"d_feature": 3},
    {"order": 3, "d_feature": 5, "eps": 0.5},
]


def limit_of_small_scores():
    q, k, v = draw(3, 2, 2, 13, 4)
    mask = (torch.arange(13) % 3 != 1).expand(2, 13)
    return distance(dense_softmax(1e-4 * q, k, v, mask), taylor_attention(1e-4 * q, k, v, mask, order=3))


def limit_of_dense_polynomial():
    q, k, v = draw(3, 2, 2, 13, 8)
    scores = q @ k.mT / math.sqrt(8)
    weights = (1 + scores) ** 2 / 2 + 1 / 2
    expected = weights @ v / weights.sum(dim=-1, keepdim=True)
    return distance(expected, taylor_attention(q, k, v, block=20))


LIMITS = [
    Limit("scores of 1e-4: softmax, up to the fourth power of a score", limit_of_small_scores, 1e-9),
    Limit("order 2: dense attention with ((1 + s)^2 + 1) / 2", limit_of_dense_polynomial),
]


def against_fla():
    """The last token of a causal mechanism sees all: one copy of the row per token, with that token last."""
    naive = file_of("fla", "ops/based/naive.py")
    q, k, v = draw(3, 2, 33, 8)  # [h l d]
    turned = [torch.stack([x.roll(32 - i, dims=1) for i in range(33)]) for x in (q, k, v)]
    values, ones = turned[2], torch.ones_like(turned[2])
    mixed, sums = (
        naive.naive_parallel_based(*turned[:2], x, use_norm=False)[:, :, -1] for x in (values, ones)
    )
    return distance((mixed / sums).transpose(0, 1), taylor_attention(q[None], k[None], v[None])[0])


def against_fla_features():
    needs_triton = ("fla.modules.activations", "fla.modules.layernorm", "fla.utils")
    feature_map = file_of("fla", "modules/feature_map.py", without=needs_triton).TaylorFeatureMap(8)
    q, k, v = draw(3, 2, 2, 33, 8)
    kernel = feature_map(q) @ feature_map(k).mT
    return distance(kernel / kernel.sum(dim=-1, keepdim=True) @ v, taylor_attention(q, k, v))


ORACLES = [
    Oracle("fla-core 0.6.0, ops/based/naive.py", "naive_parallel_based, 33 queries, order 2", against_fla),
    Oracle("fla-core 0.6.0, modules/feature_map.py", "TaylorFeatureMap, order 2", against_fla_features),
]

FAULTS = {
    **attention_faults("taylor_attention"),
    "wrong eps": Plant("taylor_attention", other_eps, {"order": 1, "eps": 0.5}),
}
