"""FNet: two explicit Fourier matrices."""

import cmath
import math

import torch

from models.fnet import fourier_mix
from proofs.faults import NO_KEYS, NO_WINDOW, Plant, unmasked
from proofs.kit import Limit, Oracle, distance, draw, rows


def reference(module, x, mask=None):
    def fourier(n):
        return torch.tensor(
            [[cmath.exp(-2j * math.pi * j * k / n) for k in range(n)] for j in range(n)],
            dtype=torch.complex128,
            device=x.device,
        ).reshape(n, n)

    out = torch.zeros_like(x)
    over_length, over_width = fourier(x.shape[1]), fourier(x.shape[2])
    read = mask if module.use_mask else None
    for b, row, kept in rows(x, read):
        if kept:
            out[b] = (over_length[:, kept] @ row[kept].to(torch.complex128) @ over_width).real
    return out


CASES = [{}, {"use_mask": False}]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def dense_kernel():
    """Re(F_l x F_d) = C_l x C_d - S_l x S_d, with cosines and sines of 2 pi j k / n for C and S."""
    x = draw(3, 37, 16)
    angles = [2 * math.pi * (torch.arange(n)[:, None] * torch.arange(n) % n).double() / n for n in (37, 16)]
    (cos_l, cos_d), (sin_l, sin_d) = ([f(a) for a in angles] for f in (torch.cos, torch.sin))
    return distance(cos_l @ x @ cos_d - sin_l @ x @ sin_d, fourier_mix(x))


def fftn(mask):
    x = draw(3, 37, 16)
    zeroed = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
    return distance(torch.fft.fftn(zeroed, dim=(1, 2)).real, fourier_mix(x, mask))


def transformers_module():
    from transformers.models.fnet.configuration_fnet import FNetConfig
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    x = draw(3, 37, 16)
    oracle = FNetBasicFourierTransform(FNetConfig(hidden_size=16, use_tpu_fourier_optimizations=False))
    return distance(oracle(x)[0], fourier_mix(x))


def scipy_matrices():
    from scipy.linalg import dft

    x = draw(3, 37, 16)
    over_length, over_width = torch.from_numpy(dft(37)), torch.from_numpy(dft(16))
    return distance((over_length @ x.to(torch.complex128) @ over_width).real, fourier_mix(x))


LIMITS = [Limit("the dense kernel: products with cosines less products with sines", dense_kernel)]

ORACLES = [
    Oracle("torch.fft.fftn", "over length and width, real part, all real", lambda: fftn(None)),
    Oracle("torch.fft.fftn", "over length and width, real part, padding zeroed", lambda: fftn(MASK)),
    Oracle("scipy.linalg.dft", "products with its Fourier matrices", scipy_matrices),
    Oracle("transformers FNetBasicFourierTransform", "its forward, which reads padding", transformers_module),
]

FAULTS = {
    "no scale": "the transform is not scaled, and equal to the reference's",
    "no mask": Plant("fourier_mix", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": NO_WINDOW,
    "wrong eps": "the formula has no eps",
}
