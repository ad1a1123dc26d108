"""Long convolution: the sum over lags, token by token."""

import math

import torch

from models.long_conv import long_conv, squash
from proofs.faults import NO_SCALE, Plant, changed, swapped, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, rows


def over_lags(row, real, past, future=None):
    """y_i = sum_j T_{i-j} x_j over the real tokens: past[:, 0], past[:, 1], ... are T_0, T_1, ...,
    future[:, 0], ... are T_{-1}, T_{-2}, ...
    """
    out, at = torch.zeros_like(row), torch.tensor(real, dtype=torch.long)
    behind = torch.zeros_like(past) if future is None else future
    for i in real:
        lag = i - at
        taps = torch.where(lag >= 0, past[:, lag.clamp(min=0)], behind[:, (-lag - 1).clamp(min=0)])  # [d j]
        out[i] = (taps.T * row[at]).sum(dim=0)
    return out


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gated(output, y):
    """The output stage of state-space layers, as it stands in S4: W a * sigmoid(V a), a = GELU(y)."""
    value, gate = affine(output.linear, gelu(y)).chunk(2, dim=-1)
    return value / (1 + torch.exp(-gate))


def squashed(weight, module):
    """Smoothed over neighbours one tap at a time, then shrunk towards zero."""
    reach, taps = module.smoothing // 2, weight.shape[-1]
    smooth = torch.stack(
        [weight[..., max(0, j - reach) : j + reach + 1].sum(dim=-1) for j in range(taps)], dim=-1
    )
    smooth = smooth / module.smoothing
    return torch.sign(smooth) * torch.clamp(smooth.abs() - module.threshold, min=0)


def reference(module, x, mask=None):
    kernels = squashed(module.kernel, module)  # [s c d k]
    backs = {"untied": kernels[-1], "tied": kernels[0][..., 1:], "forward": None}[module.directions]
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        mixed = []
        for c in range(kernels.shape[1]):
            back = None if backs is None else torch.nn.functional.pad(backs[c], (0, 2))
            mixed.append(over_lags(row, real, kernels[0, c], back) + row * module.skip[c])
        if real:
            out[b, real] = gated(module.output, torch.cat(mixed, dim=-1)[real])
    return out


CASES = [
    {"threshold": 0.02},
    {"directions": "tied", "channels": 1},
    {"directions": "forward", "smoothing": 3},
]


def toeplitz_matrices():
    from scipy.linalg import toeplitz

    x, kernel, back, skip = draw(2, 37, 3), draw(1, 3, 50), draw(1, 3, 50, seed=1), draw(1, 3, seed=2)
    mask = torch.arange(37) % 5 != 3
    expected = torch.zeros_like(x)
    for d in range(3):
        column, row = kernel[0, d, :37].numpy(), torch.cat([kernel[0, d, :1], back[0, d, :36]]).numpy()
        expected[..., d] = (x[..., d] * mask) @ torch.tensor(toeplitz(column, row)).T
    expected += x * mask[:, None] * skip
    return distance(expected, long_conv(x, kernel, back, skip, mask.expand(2, -1)))


def identity():
    """A kernel below the threshold is no kernel: D x alone is left."""
    x, weight, skip = draw(2, 13, 3), draw(2, 1, 3, 13), draw(1, 3)
    kernel, back = squash(weight, threshold=weight.abs().max().item())
    return distance(x * skip, long_conv(x, kernel, back, skip))


LIMITS = [
    Limit("the product with an explicit Toeplitz matrix (scipy), a mask with holes", toeplitz_matrices),
    Limit("all weights below the threshold: the skip alone", identity),
]


def against_scipy():
    from scipy.signal import convolve

    x, kernel, back, skip = draw(1, 37, 2), draw(1, 2, 37), draw(1, 2, 36, seed=1), draw(1, 2, seed=2)
    both = torch.cat([back.flip(-1), kernel], dim=-1)[0]  # taps of lags -36 to 36
    expected = torch.stack([torch.tensor(convolve(x[0, :, d], both[d]))[36:73] for d in range(2)], dim=-1)
    return distance(expected[None] + x * skip, long_conv(x, kernel, back, skip))


def against_torch():
    x, weight, skip = draw(2, 37, 2), draw(1, 1, 2, 37), draw(1, 2, seed=2)
    kernel = squash(weight, threshold=0.5, smoothing=5)[0]
    smooth = torch.nn.functional.conv1d(
        weight[0, 0][:, None], torch.full((1, 1, 5), 0.2, dtype=torch.float64), padding=2
    )
    expected = torch.nn.Softshrink(0.5)(smooth)
    found = torch.nn.functional.conv1d(x.mT, expected.flip(-1), padding=36, groups=2)[..., :37].mT
    return distance(found + x * skip, long_conv(x, kernel, None, skip))


ORACLES = [
    Oracle("scipy, signal.convolve", "two-sided kernel of 37 and 36 taps", against_scipy),
    Oracle("torch, conv1d and Softshrink", "smoothed and squashed causal kernel", against_torch),
]


def late(args, kwargs):
    """The kernel one tap later: the token itself is not seen."""
    args[1] = torch.nn.functional.pad(args[1], (1, 0))
    return args, kwargs


FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("long_conv", unmasked, check="content_invariance"),
    "k and v swapped": Plant("long_conv", swapped),  # the two directions
    "window off by one": Plant("long_conv", late),
    "wrong eps": Plant("squash", changed(threshold=lambda t: 10 * t)),
}
