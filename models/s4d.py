"""S4D: each channel by a diagonal complex state space, run as one long convolution.

Paper    Gu et al. 2022, arXiv 2206.11893: eq. 2-4 (kernel), section 4 (parameters and initialisation)
Computes y_t = sum_(s <= t) K[t - s] u_s + sum_(s > t) K'[s - t - 1] u_s + D u_t,   out = glu(W gelu(y) + b),
         K[j] = 2 Re sum_n C_n Bbar_n Abar_n^j,   A = -exp(a) + i w,   step = exp(s), and
         zoh       Abar = exp(step A),                      Bbar = B (Abar - 1) / A
         bilinear  Abar = (1 + step A / 2) / (1 - step A / 2),   Bbar = B step / (1 - step A / 2)
         The token itself counts once, in K. Both directions have the same A, B and step;
         untied   K' has a C of its own, as in the released code
         tied     K'[j] = K[j + 1]: one kernel of the distance
         forward  K' = 0, the causal original
Cost     time O(L log L + N L) and memory O(L) per channel, N = d_state / 2 conjugate pairs; the kernel is
         made once a batch, of products of powers within and between blocks: nothing of size D N L
Exact    no, it is no attention; it equals the recurrence x_t = Abar x_(t-1) + Bbar u_t, y_t = 2 Re C x_t
Padding  inputs at padding are zeros; a hole keeps the distances
Differs  every channel has its own A and B (released configuration for LRA: one for all, n_ssm = 1); B starts
         at ones and is trained, as in the released code, which the paper allows; the step is the exponential
         of a parameter, as in s4d.py of the release (its configurations for LRA: softplus, of equal start);
         it learns at the rate of A and B unless dt_lr_scale is set (released configurations for ListOps, Text
         and Retrieval: at the full rate, dt_lr_scale=1); no dropout after the activation: the backbone's is
         on the branch
"""
# b batch, l length, d channels, n conjugate pairs of states, r directions (1 or 2)

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import known_directions
from models.fft_conv import fft_conv, sides
from models.ssm import (
    Output,
    check_steps,
    exponential_kernel,
    held_input,
    hippo_legs,
    log_uniform,
    tagged,
)

INITS = ("lin", "inv", "legs")
DISCRETISATIONS = ("zoh", "bilinear")
LEAST = 1e-30


def frequencies(init: str, d_state: int) -> Tensor:
    """Imaginary parts of A at the start, those of d_state / 2 conjugate pairs: [n], float64."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":
        return math.pi * n
    if init == "inv":
        return d_state / math.pi * (d_state / (2 * n + 1) - 1)
    return hippo_legs(d_state)[0]


def s4d_kernel(
    a: Tensor, step: Tensor, b: Tensor, c: Tensor, length: int, *, discretisation: str = "zoh"
) -> Tensor:
    """K[0 ... length - 1]. a, b: [d n] complex, step: [d], c: [r d n] complex -> [r d length] real.

    What depends on no position is computed in float64: 1 - Abar of a slow state is small beside 1.
    """
    wide = torch.complex128
    step = step.double()[:, None]
    z = step * a.to(wide)
    if discretisation == "zoh":
        log_factors, share = z, held_input(z)
    else:
        above = 1 + z / 2
        above = above + LEAST * (above == 0)  # Abar = 0 has no logarithm, but its derivative is finite
        log_factors, share = (above / (1 - z / 2)).log(), 1 / (1 - z / 2)
    weights = 2 * c.to(wide) * (b.to(wide) * (step * share))
    return exponential_kernel(weights.to(c.dtype), log_factors, length)


def convolve(x: Tensor, kernel: Tensor, back: Tensor | None, skip: Tensor, mask: Tensor | None) -> Tensor:
    """x: [b l d], kernel, back: [d k], skip: [d], mask: [b l] bool -> [b l d]; D is the first tap's part."""
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    return fft_conv(x, kernel + F.pad(skip[:, None], (0, kernel.shape[-1] - 1)), back)


@register("s4d")
class S4D(Mixer):
    """The parameters of `s4d_kernel`, and an output stage."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        d_state: int = 64,
        state_init: str = "lin",
        discretisation: str = "zoh",
        directions: str = "untied",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        output: str = "glu",
        ssm_lr_scale: float = 0.1,
        dt_lr_scale: float | None = None,
    ) -> None:
        super().__init__(place, projections=False)
        check_sizes("s4d", d_state, dt_min, dt_max)
        if state_init not in INITS:
            raise ValueError(f"unknown state_init '{state_init}' for s4d; choose from: {', '.join(INITS)}")
        if discretisation not in DISCRETISATIONS:
            known = ", ".join(DISCRETISATIONS)
            raise ValueError(f"unknown discretisation '{discretisation}' for s4d; choose from: {known}")
        self.directions = known_directions(directions, "s4d")
        self.d_state, self.discretisation = d_state, discretisation
        d, n = place.d_model, d_state // 2
        own = {"lr_scale": ssm_lr_scale}
        frequency = frequencies(state_init, d_state).to(torch.get_default_dtype()).expand(d, n).clone()
        self.log_decay = tagged(nn.Parameter(torch.full((d, n), math.log(0.5))), **own)
        self.frequency = tagged(nn.Parameter(frequency), **own)
        self.log_step = tagged(
            nn.Parameter(log_uniform((d,), dt_min, dt_max)),
            lr_scale=ssm_lr_scale if dt_lr_scale is None else dt_lr_scale,
        )
        self.b = tagged(nn.Parameter(torch.tensor([1.0, 0.0]).expand(d, n, 2).clone()), **own)
        sets = 2 if directions == "untied" else 1
        self.c = nn.Parameter(torch.randn(sets, d, n, 2) * 0.5**0.5)  # real and imaginary parts
        self.skip = nn.Parameter(torch.randn(d))
        self.output = Output(d, d, kind=output, name="s4d")

    def kernels(self, length: int) -> Tensor:
        """[r d length]: of the way there, and of the way back if that has a C of its own."""
        a = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        b, c = (torch.view_as_complex(part) for part in at_least_fp32(self.b, self.c))
        step = self.log_step.double().exp()  # an angle is up to 1e5 times the step
        return s4d_kernel(a, step, b, c, length, discretisation=self.discretisation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        (skip,) = at_least_fp32(self.skip)
        kernel, back = sides(self.kernels(x.shape[1]), self.directions)
        return self.output(convolve(x, kernel, back, skip, mask))

    def state_size(self, length: int) -> int:
        return self.place.d_model * self.d_state * (1 if self.directions == "forward" else 2)


def check_sizes(name: str, d_state: int, dt_min: float, dt_max: float) -> None:
    """ValueError for a state that is not made of pairs, or steps that are no range."""
    if d_state < 2 or d_state % 2:
        raise ValueError(
            f"{name} keeps conjugate pairs of states, got d_state={d_state}; choose an even number from 2"
        )
    check_steps(name, dt_min, dt_max)
