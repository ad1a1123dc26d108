"""SGConv: the kernel tap by tap, then the sum over lags, token by token."""

import math

import torch

from models.sgconv import multiscale_kernel, sgconv
from proofs.faults import Plant, swapped, unmasked
from proofs.kit import Limit, Oracle, distance, draw, rows
from proofs.long_conv import gated, late, over_lags


def built(module):
    """All taps [s d k], each between its two nearest weights of its piece."""
    scales, _, d, w = module.pieces.shape
    low, high = module.decay_range
    decay = torch.tensor([low + (high - low) * c / max(1, d - 1) for c in range(d)], dtype=torch.float64)
    taps = []
    for scale in range(scales):
        factor = 2 ** (max(0, scale - 1) + module.finest)
        for m in range(w * factor):
            at = max(0.0, (m + 0.5) / factor - 0.5)
            first = math.floor(at)
            second = min(first + 1, w - 1)
            piece = module.pieces[scale]
            value = (1 - at + first) * piece[..., first] + (at - first) * piece[..., second]
            taps.append(value * decay ** (scales - 1 - scale) * (len(taps) + 1) ** -module.power)
    return torch.stack(taps, dim=-1) / module.kernel_norm


def reference(module, x, mask=None):
    kernels = built(module)
    backs = {"untied": kernels[-1], "tied": kernels[0][..., 1:], "forward": None}[module.directions]
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        y = over_lags(row, real, kernels[0], backs) + row * module.skip
        if real:
            out[b, real] = gated(module.output, y[real])
    return out


CASES = [
    {"kernel_dim": 8},
    {"kernel_dim": 16, "directions": "tied", "decay_min": 1.0, "decay_max": 3.0, "finest": 1},
    {"kernel_dim": 5, "directions": "forward", "decay_min": 1.0, "decay_max": 1.0, "power": 1.0},
]


def toeplitz_matrices():
    from scipy.linalg import matmul_toeplitz

    x, skip = draw(1, 37, 3), torch.zeros(3).double()
    pieces, decay = draw(4, 2, 3, 8, seed=1), torch.tensor([1.0, 1.5, 2.0]).double()
    kernel, back = multiscale_kernel(pieces, 1.0, decay, 37)
    columns = [
        matmul_toeplitz((kernel[d].numpy(), torch.cat([kernel[d, :1], back[d, :36]]).numpy()), x[0, :, d])
        for d in range(3)
    ]
    expected = torch.stack([torch.tensor(c) for c in columns], dim=-1)[None]
    return distance(expected, sgconv(x, kernel, back, skip))


def free_kernel():
    """One piece, not upsampled: a free kernel, as in long_conv."""
    pieces = draw(1, 2, 3, 40)
    found = multiscale_kernel(pieces, 1.0, torch.full((3,), 2.0), 37)
    return distance(pieces[0, ..., :37], found)


LIMITS = [
    Limit("the product with the Toeplitz matrix of the built kernel (scipy)", toeplitz_matrices),
    Limit("kernel_dim >= max_len: a free kernel, long_conv without its squash", free_kernel),
]


def interpolated(pieces, decay, finest):
    """The taps as torch.nn.functional.interpolate makes them."""
    n, taps = len(pieces), []
    for scale, piece in enumerate(pieces):
        factor = 2 ** (max(0, scale - 1) + finest)
        wide = piece * decay[:, None] ** (n - 1 - scale)
        taps.append(torch.nn.functional.interpolate(wide, scale_factor=factor, mode="linear"))
    return torch.cat(taps, dim=-1)


def against_torch():
    x, skip, decay = draw(2, 50, 3), draw(3, seed=2), torch.tensor([1.0, 2.0, 3.0]).double()
    pieces = draw(4, 1, 3, 6, seed=1)
    expected = interpolated(pieces, decay, finest=1)[0, :, :50]
    kernel = multiscale_kernel(pieces, 1.0, decay, 50, finest=1)[0]
    found = sgconv(x, kernel, None, skip)
    convolved = torch.nn.functional.conv1d(
        x.mT, expected[:, None].flip(-1), padding=expected.shape[-1] - 1, groups=3
    )
    return max(distance(expected, kernel), distance(convolved[..., :50].mT + x * skip, found))


ORACLES = [
    Oracle("torch, interpolate and conv1d", "four pieces from kernel to output, causal", against_torch)
]


def unnormed(args, kwargs):
    args[1] = 1.0
    return args, kwargs


FAULTS = {
    "no scale": Plant("multiscale_kernel", unnormed),
    "no mask": Plant("sgconv", unmasked, check="content_invariance"),
    "k and v swapped": Plant("sgconv", swapped),  # the two directions
    "window off by one": Plant("sgconv", late),
    "wrong eps": "the formula has no eps: the norm is that of the random kernel at construction",
}
