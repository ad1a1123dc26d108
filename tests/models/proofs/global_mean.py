"""The mean of all real tokens."""

import torch

from proofs.faults import NO_KEYS, NO_SCALE, NO_WINDOW, Plant, unmasked
from proofs.kit import affine, rows


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if real:
            mean = sum(affine(module.value, row[i]) for i in real) / len(real)
            out[b, real] = affine(module.out, mean)
    return out


CASES = [{}]

FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("global_mean", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": NO_WINDOW,
    "wrong eps": "counts are at least 1",
}
