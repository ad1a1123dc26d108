"""Hedgehog: the explicit matrix of feature products."""

import torch

from models.hedgehog import hedgehog_attention
from proofs.faults import NO_SCALE, attention_faults
from proofs.kit import Limit, Oracle, by_head, distance, draw, file_of, normalised


@by_head
def reference(module, head, q, k, v, real):
    y_q = q @ module.query_map[head] + module.query_bias[head]
    y_k = k[real] @ module.key_map[head] + module.key_bias[head]
    halves = [torch.cat([y, -y], dim=1) for y in (y_q, y_k)]
    if module.feature_map == "exp":  # float64 needs no stabiliser at these sizes
        f_q, f_k = (torch.exp(both) for both in halves)
    elif module.feature_map == "softmax":
        f_q, f_k = (torch.cat([normalised(y), normalised(-y)], dim=1) for y in (y_q, y_k))
    else:
        f_q, f_k = (normalised(2 * both) for both in halves)
    kernel = f_q @ f_k.T
    return kernel @ v[real] / kernel.sum(dim=-1, keepdim=True)


CASES = [{}, {"feature_map": "softmax"}, {"feature_map": "joint"}]


def identity(num_heads=2, d=4):
    eye = torch.eye(d, dtype=torch.float64).expand(num_heads, -1, -1)
    zeros = torch.zeros(num_heads, d, dtype=torch.float64)
    return eye, zeros, eye, zeros


def limit_of_exponentials():
    """Without a map and a stabiliser, the kernel of `exp` is 2 sum_d cosh(q_d + k_d)."""
    q, k, v = draw(3, 2, 2, 13, 4)
    mask = torch.arange(13) % 3 != 1
    kernel = torch.cosh(q[:, :, :, None] + k[:, :, None]).sum(dim=-1) * mask
    expected = kernel / kernel.sum(dim=-1, keepdim=True) @ v
    return distance(expected, hedgehog_attention(q, k, v, mask.expand(2, 13), maps=identity()))


def limit_of_spikes():
    """Queries and keys are 30 times each signed unit vector."""
    corners = 30 * torch.cat([torch.eye(4), -torch.eye(4)]).double()[None, None]
    v = draw(1, 1, 8, 4)
    found = hedgehog_attention(corners, corners, v, maps=identity(num_heads=1))
    return distance(v, found)


LIMITS = [
    Limit("feature_map=exp without a map: dense attention with sum_d cosh(q_d + k_d)", limit_of_exponentials),
    Limit(
        "queries and keys far apart: each finds its own key, as by softmax", limit_of_spikes, tolerance=1e-8
    ),
]


def against_fla():
    needs_triton = ("fla.modules.activations", "fla.modules.layernorm", "fla.utils")
    package = file_of("fla", "modules/feature_map.py", without=needs_triton)
    q, k, v = draw(3, 2, 1, 13, 4)
    with torch.random.fork_rng([]):
        theirs = [package.HedgehogFeatureMap(4).double() for _ in range(2)]
    ours = []
    for seed, layer in enumerate(theirs):
        weight, bias = draw(4, 4, seed=seed + 1), draw(4, seed=seed + 3)
        layer.layer.weight.data, layer.layer.bias.data = weight, bias
        ours += [weight.T[None], bias[None]]
    kernel = theirs[0](q) @ theirs[1](k).mT
    found = hedgehog_attention(q, k, v, maps=tuple(ours), feature_map="joint")
    return distance(kernel / kernel.sum(dim=-1, keepdim=True) @ v, found)


ORACLES = [Oracle("fla-core 0.6.0, modules/feature_map.py", "HedgehogFeatureMap, our weights", against_fla)]

FAULTS = {
    **attention_faults("hedgehog_attention"),
    "no scale": NO_SCALE,
    "wrong eps": "the formula has no eps: the normaliser is a sum of exponentials, of which one is 1",
}
