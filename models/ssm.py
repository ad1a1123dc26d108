"""What state-space layers share: kernels that are sums of exponentials, step sizes, the output stage."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import full_precision

# b batch, l length, d channels, n states of a channel

BLOCK = 128  # taps of a kernel that are made by one product
OUTPUTS = ("glu", "linear", "none")


def exponential_kernel(weights: Tensor, log_factors: Tensor, length: int) -> Tensor:
    """K[c, t] = Re sum_n weights[c, n] exp(t log_factors[c, n]) for t = 0 ... length - 1 -> [d length], real.

    weights, log_factors: [d n], real or complex. With t = BLOCK i + j the powers factor into those of i and
    of j, so that no [d n length] is made. Angles are taken in float64: t times a frequency is a large number.
    """
    blocks = -(-length // BLOCK)
    wide = log_factors.to(torch.complex128 if log_factors.is_complex() else torch.float64)
    steps = torch.arange(max(blocks, BLOCK), device=weights.device, dtype=torch.float64)
    near = (wide[..., None] * steps[:BLOCK]).exp().to(log_factors.dtype)  # [d n BLOCK]
    far = (wide[..., None] * (BLOCK * steps[:blocks])).exp().to(log_factors.dtype)  # [d n blocks]
    with full_precision(weights):
        taps = (weights[..., None] * far).mT @ near  # [d blocks BLOCK]
    taps = taps.real if taps.is_complex() else taps
    return taps.flatten(-2)[..., :length]


def log_uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """log of step sizes drawn evenly between log low and log high: what state-space layers start from."""
    return math.log(low) + torch.rand(shape) * (math.log(high) - math.log(low))


def step_bias(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """b with softplus(b) log-uniform in [low, high]: where the step sizes of selective models start from."""
    if not 0 < low <= high:
        raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got dt_min={low}, dt_max={high}")
    dt = log_uniform(shape, low, high).exp()
    return dt + (-torch.expm1(-dt)).log()


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as a normal matrix less a product: (frequencies, P, B), each [n] of the n = d_state / 2
    conjugate pairs, float64: A = V (diag(-1/2 + i frequencies) - P P*) V*, frequencies rising.

    arXiv 2111.00396, eq. 2 and appendix C: A + P P^T is -1/2 plus a skew matrix S, P = B / sqrt(2), B_k =
    sqrt(2 k + 1). Each eigenvector gets the phase that makes its entry of B, and so of P, positive.
    """
    b = (2 * torch.arange(d_state, dtype=torch.float64) + 1).sqrt()
    half = b[:, None] * b / 2
    skew = half.triu(1) - half.tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    b = (vectors.mH @ b.to(vectors.dtype)).abs()[d_state // 2 :]
    return frequencies[d_state // 2 :], b / 2**0.5, b


def tagged(parameter: nn.Parameter, *, lr_scale: float = 1.0) -> nn.Parameter:
    """A parameter of the recurrence itself: no weight decay, its own share of the learning rate."""
    parameter.no_weight_decay = True
    parameter.lr_scale = lr_scale
    return parameter


class Output(nn.Module):
    """What follows the recurrence: glu  W a * sigmoid(V a), linear  W a, none  a, with a = activation(y).

    [... d_in] -> [... d_out]
    """

    def __init__(self, d_in: int, d_out: int, *, kind: str, activation: str = "gelu") -> None:
        super().__init__()
        if kind not in OUTPUTS:
            raise ValueError(f"unknown output '{kind}'; choose from: {', '.join(OUTPUTS)}")
        if kind == "none" and d_in != d_out:
            raise ValueError(f"output=none keeps {d_in} channels where {d_out} are wanted; use linear or glu")
        self.kind = kind
        self.activation = {"gelu": F.gelu, "silu": F.silu, "none": lambda x: x}[activation]
        if kind != "none":
            self.linear = nn.Linear(d_in, 2 * d_out if kind == "glu" else d_out)

    def forward(self, y: Tensor) -> Tensor:
        y = self.activation(y)
        if self.kind == "none":
            return y
        y = self.linear(y)
        return F.glu(y, dim=-1) if self.kind == "glu" else y
