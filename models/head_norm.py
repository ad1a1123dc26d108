"""Normalisation of each head's output on its own: what gated recurrences of heads end in."""

import torch
from torch import Tensor

from models.common import at_least_fp32

# h heads, e width of a head's values

KINDS = ("rms", "layer")


def known_kind(kind: str, name: str, values: int) -> str:
    """`kind`, or ValueError if mechanism `name`, with heads `values` wide, cannot norm them so."""
    if kind not in KINDS:
        raise ValueError(f"unknown head_norm '{kind}' for {name}; choose from: {', '.join(KINDS)}")
    if kind == "layer" and values == 1:
        raise ValueError(
            f"{name} with head_norm=layer would make heads of 1 value zero; use head_norm=rms or wider heads"
        )
    return kind


def head_norm(x: Tensor, weight: Tensor | None = None, *, kind: str = "rms", eps: float = 1e-5) -> Tensor:
    """x [... h e] over its root mean square, or with mean 0 and variance 1, times weight [e], if any.

    In at least float32, returned in the dtype of x.
    """
    (wide,) = at_least_fp32(x)
    if kind == "layer":
        wide = wide - wide.mean(dim=-1, keepdim=True)
    out = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)
