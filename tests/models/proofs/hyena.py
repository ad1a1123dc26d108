"""Hyena: filters lag by lag, convolutions and gates token by token."""

import math

import torch

from models.hyena import features, filters, hyena
from proofs.faults import Plant, changed, other_eps, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, rows
from proofs.long_conv import late, over_lags


def lag_features(t, max_len, bands):
    """The share of the largest distance, then real and imaginary parts of exp(-i f w t)."""
    steps = [1e-4 + (bands - 1 - 1e-4) * b / max(1, bands - 1) for b in range(bands)]
    turns = [complex(math.cos(a), -math.sin(a)) for a in (2 * math.pi * t * f / max_len for f in steps)]
    return [t / max(1, max_len - 1), *(turn.real for turn in turns), *(turn.imag for turn in turns)]


def tap(module, t):
    """h at one distance, [s n d]."""
    max_len, d = module.place.max_len, module.place.d_model
    z = torch.tensor(lag_features(t, max_len, module.bands), dtype=torch.float64)
    hidden = z
    *inner, last = module.filter_weights
    for weight, bias in zip(inner, module.filter_biases, strict=True):
        hidden = torch.sin(module.frequency * (weight @ hidden + bias))
    taps = last @ hidden
    if module.normalise:
        taps = taps / (1e-6 + sum(taps[..., c].abs() for c in range(taps.shape[-1])))[..., None]
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    rate = torch.tensor([slow + (fast - slow) * c / max(1, d - 1) for c in range(d)], dtype=torch.float64)
    return taps * (torch.exp(-rate * z[0]) + module.shift)


def reference(module, x, mask=None):
    two_sided, width = module.directions != "forward", module.short_weight.shape[1]
    taps = torch.stack([tap(module, t) for t in range(x.shape[1])], dim=-1)  # [s n d k]
    backs = taps[-1] if module.directions == "untied" else torch.nn.functional.pad(taps[0][..., 1:], (0, 1))
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        streams = affine(module.streams, row)
        short = torch.zeros_like(streams)
        for i in range(len(row)):
            seen = i + (width // 2 if two_sided else 0)
            short[i] = module.short_bias + sum(
                module.short_weight[:, j] * streams[seen - j] for j in range(width) if seen - j in real
            )
        v, *gates = short.chunk(module.order + 1, dim=-1)
        for n, gate in enumerate(gates):
            convolved = over_lags(v, real, taps[0, n], backs[n] if two_sided else None)
            v = gate * (convolved + module.skip[n] * v)
        if real:
            out[b, real] = affine(module.out, v[real])
    return out


CASES = [
    {"d_filter": 8, "bands": 3},
    {"d_filter": 8, "bands": 1, "directions": "tied", "order": 1, "shift": 0.1, "filter_layers": 0},
    {"d_filter": 8, "bands": 2, "directions": "forward", "order": 3, "kernel_size": 4, "normalise": False},
]

MASK = torch.arange(21) % 5 != 3


def toeplitz_matrices():
    """diag(x^2) T_2 diag(m) diag(x^1) T_1 diag(m) for each feature (definition 3.2 of the paper)."""
    from scipy.linalg import toeplitz

    v, kernels, backs = draw(1, 21, 2), draw(2, 2, 21, seed=1), draw(2, 2, 20, seed=2)
    gates, skip = draw(2, 1, 21, 2, seed=3), draw(2, 2, seed=4)
    expected = torch.zeros_like(v)
    for d in range(2):
        z = v[0, :, d]
        for n in range(2):
            ahead = torch.cat([kernels[n, d, :1], backs[n, d]])
            matrix = (
                torch.tensor(toeplitz(kernels[n, d].numpy(), ahead.numpy()))
                + skip[n, d] * torch.eye(21).double()
            )
            z = torch.diag(gates[n, 0, :, d]) @ matrix @ torch.diag(MASK.double()) @ z
        expected[0, :, d] = z
    return distance(expected, hyena(v, kernels, backs, gates, skip, MASK[None]))


def products():
    """Without kernels: the product of all streams."""
    v, gates, zeros = draw(2, 21, 3), draw(2, 2, 21, 3, seed=1), torch.zeros(2, 3, 21).double()
    found = hyena(v, zeros, zeros, gates, torch.ones(2, 3).double())
    return distance(v * gates[0] * gates[1], found)


LIMITS = [
    Limit("the product of diagonal and Toeplitz matrices (scipy), a mask with holes", toeplitz_matrices),
    Limit("kernels of zero: the product of the streams", products),
]


def against_torch():
    """A network of torch layers, windowed, then conv1d and gates, causal."""
    inputs = features(torch.arange(21, dtype=torch.float64), 32, 2)

    class Sine(torch.nn.Module):
        def forward(self, x):
            return torch.sin(3.0 * x)

    with torch.random.fork_rng([]):
        layers = [torch.nn.Linear(5, 4), Sine(), torch.nn.Linear(4, 4), Sine(), torch.nn.Linear(4, 6, False)]
        network = torch.nn.Sequential(*layers).double()
    linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    window = torch.exp(inputs[:, :1] * math.log(0.01) / torch.tensor([1.5, 0.5, 0.3], dtype=torch.float64))
    expected = network(inputs).view(21, 2, 3) * window[:, None]  # [k n d], rates evenly from 1/1.5 to 1/0.3
    weights = [linear[0].weight, linear[1].weight, linear[2].weight.view(1, 2, 3, 4)]
    frequency = torch.full((4,), 3.0, dtype=torch.float64)
    found = filters(inputs, weights, [layer.bias for layer in linear[:2]], frequency)[0]
    z, gates, skip = draw(2, 21, 3), draw(2, 2, 21, 3, seed=1), draw(2, 3, seed=2)
    mixed = hyena(z, found, None, gates, skip)
    for n in range(2):
        taps = expected[:, n].T[:, None].flip(-1)
        convolved = torch.nn.functional.conv1d(z.mT, taps, padding=20, groups=3)[..., :21].mT
        z = gates[n] * (convolved + skip[n] * z)
    return max(distance(expected.permute(1, 2, 0), found), distance(z, mixed))


ORACLES = [
    Oracle("torch, Linear layers and conv1d", "filters and order 2, causal, its weights", against_torch)
]


def gate_first(args, kwargs):
    args[0], args[3] = args[3][0], [args[0], *args[3][1:]]
    return args, kwargs


FAULTS = {
    "no scale": Plant("filters", changed(normalise=lambda _: False), {"d_filter": 8}),
    "no mask": Plant("hyena", unmasked, check="length_invariance"),  # streams are zeroed before
    "k and v swapped": Plant("hyena", gate_first),  # what is convolved, and the first gate
    "window off by one": Plant("hyena", late),
    "wrong eps": Plant("filters", other_eps, {"d_filter": 8}),
}
