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
    of j, so that no [d n length] is made. Angles are taken in float64: t times a frequency is a large number;
    log_factors may come in float64 for that, the sums are made in the precision of the weights.
    """
    dtype = torch.promote_types(weights.dtype, torch.complex64) if log_factors.is_complex() else weights.dtype
    blocks = -(-length // BLOCK)
    wide = log_factors.to(torch.complex128 if log_factors.is_complex() else torch.float64)
    steps = torch.arange(max(blocks, BLOCK), device=weights.device, dtype=torch.float64)
    near = (wide[..., None] * steps[:BLOCK]).exp().to(dtype)  # [d n BLOCK]
    far = (wide[..., None] * (BLOCK * steps[:blocks])).exp().to(dtype)  # [d n blocks]
    with full_precision(weights):
        taps = (weights[..., None] * far).mT @ near  # [d blocks BLOCK]
    taps = taps.real if taps.is_complex() else taps
    return taps.flatten(-2)[..., :length]


def held_input(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, 1 at 0: what a state of log decay z takes up of an input that is held for one step.

    z: complex128. Near 0 by its series, of which eight terms reach float64.
    """
    series = 1 + z / 8
    for n in range(7, 1, -1):
        series = 1 + z / n * series
    near = z.abs() < 0.01
    away = torch.where(near, 1, z)
    return torch.where(near, series, torch.expm1(away) / away)


def check_steps(name: str, dt_min: float, dt_max: float) -> None:
    """ValueError if the step sizes of the mechanism `name` are no range."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"{name} needs 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")


def log_uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """log of step sizes drawn evenly between log low and log high: what state-space layers start from."""
    return math.log(low) + torch.rand(shape) * (math.log(high) - math.log(low))


def step_bias(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """b with softplus(b) log-uniform in [low, high]: where the step sizes of selective models start from."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"step sizes need finite 0 < dt_min <= dt_max, got dt_min={low}, dt_max={high}")
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


def tagged(parameter: nn.Parameter, *, lr_scale: float = 1.0, weight_decay: bool = False) -> nn.Parameter:
    """A parameter of the recurrence itself: its own share of the learning rate, weight decay if asked."""
    if not 0 <= lr_scale < math.inf:
        raise ValueError(f"a share of the learning rate is a finite number >= 0, got lr_scale={lr_scale}")
    if not weight_decay:
        parameter.no_weight_decay = True
    parameter.lr_scale = lr_scale
    return parameter


class Output(nn.Module):
    """What follows the recurrence: glu  W a * sigmoid(V a), linear  W a, none  a, with a = activation(y).

    [... d_in] -> [... d_out]; `name` is the mechanism's, for what is said about an unknown kind.
    """

    def __init__(
        self, d_in: int, d_out: int, *, kind: str, activation: str = "gelu", name: str | None = None
    ) -> None:
        super().__init__()
        if kind not in OUTPUTS:
            of = f" for {name}" if name else ""
            raise ValueError(f"unknown output '{kind}'{of}; choose from: {', '.join(OUTPUTS)}")
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
