"""TNN: the entries offset by offset, then the sum over offsets, token by token."""

import math

import torch

from models.tnn import coefficients, gated_toeplitz
from proofs.faults import NO_SCALE, Plant, other_eps, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, rows, silu
from proofs.long_conv import late, over_lags


def entry(module, offset):
    """gamma^|offset| t(offset), [e]."""
    first, *weights = module.rpe_weights
    bias, *biases = module.rpe_biases
    hidden = first[:, 0] * offset + bias
    for weight, bias in zip(weights, biases, strict=True):
        root = torch.sqrt((hidden**2).mean())
        hidden = weight @ torch.clamp(hidden / (root + 1e-8), min=0) + bias
    gamma = module.gamma
    if module.decay is not None:
        gamma = gamma + (1 - gamma) / (1 + torch.exp(-module.decay))
    return hidden * gamma ** abs(offset)


def reference(module, x, mask=None):
    length = x.shape[1]
    past = torch.stack([entry(module, t) for t in range(length)], dim=-1)
    future = None
    if module.directions == "tied":
        future = torch.stack([entry(module, -t) for t in range(1, length + 1)], dim=-1)
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        u, v = silu(affine(module.streams, row)).chunk(2, dim=-1)
        if real:
            out[b, real] = affine(module.out, (u * over_lags(v, real, past, future))[real])
    return out


CASES = [
    {"d_rpe": 8},
    {"d_rpe": 8, "expand": 2, "rpe_layers": 0, "gamma": 0.9, "learned_decay": True},
    {"d_rpe": 8, "rpe_layers": 1, "gamma": 1.0, "directions": "forward"},
]

MASK = torch.arange(37) % 5 != 3


def matmul_toeplitz():
    from scipy.linalg import matmul_toeplitz

    v, u, past, future = draw(1, 37, 3), draw(1, 37, 3, seed=1), draw(3, 37, seed=2), draw(3, 37, seed=3)
    products = [
        matmul_toeplitz(
            (past[d].numpy(), torch.cat([past[d, :1], future[d, :36]]).numpy()),
            (v[0, :, d] * MASK).numpy(),
        )
        for d in range(3)
    ]
    expected = u * torch.stack([torch.tensor(p) for p in products], dim=-1)
    return distance(expected, gated_toeplitz(v, past, future, u, MASK[None]))


def sums():
    """Entries of 1: each feature is gated by the sum over its real tokens."""
    v, u, ones = draw(1, 37, 3), draw(1, 37, 3, seed=1), torch.ones(3, 37).double()
    expected = u * (v * MASK[:, None]).sum(dim=1, keepdim=True)
    return distance(expected, gated_toeplitz(v, ones, ones, u, MASK[None]))


LIMITS = [
    Limit("the product with a Toeplitz matrix (scipy, matmul_toeplitz), a mask with holes", matmul_toeplitz),
    Limit("all entries 1: the gated sum over the real tokens", sums),
]


def against_torch():
    """The network of torch's layers over all offsets of a full matrix, decays beside it."""
    with torch.random.fork_rng([]):
        sizes = [(1, 6), (6, 6), (6, 6), (6, 3)]
        linear = [torch.nn.Linear(*size).double() for size in sizes]
    norm = [torch.nn.RMSNorm(6, eps=0.0, elementwise_affine=False, dtype=torch.float64) for _ in sizes[1:]]
    network = torch.nn.Sequential(linear[0])
    for normed, layer in zip(norm, linear[1:], strict=True):
        network.extend([normed, torch.nn.ReLU(), layer])
    at = torch.arange(37)
    lags = (at[:, None] - at).double()
    matrix = network(lags[..., None]) * (math.log(0.9) * lags.abs()).exp()[..., None]  # [i j d]
    v, u, gamma = draw(2, 37, 3), draw(2, 37, 3, seed=1), torch.tensor([0.9], dtype=torch.float64)
    expected = u * torch.einsum("ijd,bjd->bid", matrix, v)
    weights, biases = [layer.weight for layer in linear], [layer.bias for layer in linear]
    past, future = coefficients(torch.stack([at, -1 - at]), weights, biases, gamma.log())
    return distance(expected, gated_toeplitz(v, past, future, u))


ORACLES = [
    Oracle(
        "torch, Linear, RMSNorm and ReLU layers",
        "entries of the explicit matrix times v, its weights; RMSNorm without the eps of 1e-8",
        against_torch,
        tolerance=1e-6,
    )
]


def value_as_gate(args, kwargs):
    args[0], args[3] = args[3], args[0]
    return args, kwargs


FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("gated_toeplitz", unmasked, check="content_invariance"),
    "k and v swapped": Plant("gated_toeplitz", value_as_gate),  # what is mixed, and its gate
    "window off by one": Plant("gated_toeplitz", late),
    "wrong eps": Plant("rms_normed", other_eps),
}
