"""FNet: two explicit Fourier matrices."""

import cmath
import math

import torch

from proofs.faults import NO_KEYS, NO_WINDOW, Plant, unmasked
from proofs.kit import rows


def reference(module, x, mask=None):
    def fourier(n):
        return torch.tensor(
            [[cmath.exp(-2j * math.pi * j * k / n) for k in range(n)] for j in range(n)],
            dtype=torch.complex128,
        ).reshape(n, n)

    out = torch.zeros_like(x)
    over_length, over_width = fourier(x.shape[1]), fourier(x.shape[2])
    for b, row, real in rows(x, mask):
        if real:
            out[b, real] = (over_length[:, real] @ row[real].to(torch.complex128) @ over_width).real[real]
    return out


CASES = [{}]

FAULTS = {
    "no scale": "the transform is not scaled, and equal to the reference's",
    "no mask": Plant("fourier_mix", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": NO_WINDOW,
    "wrong eps": "the formula has no eps",
}
