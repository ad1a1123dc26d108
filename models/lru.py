"""LRU: a linear recurrence with complex decays on a ring, normalised, scanned from both ends.

Paper    Orvieto et al. 2023, arXiv 2303.06349: section 3, eq. 5-8, and the listing in appendix A
Computes h_t = L h_(t-1) + exp(g) (B u_t),   h'_t = L h'_(t+1) + exp(g) (B u_t),
         y_t = Re(C h_t + C' h'_t) + D u_t,   L = exp(-exp(nu) + i exp(theta)): d_state complex numbers, at
         first on a ring, r_min <= |L| < r_max, with angles below max_phase, and exp(g) = sqrt(1 - |L|^2).
         The token itself is in both h and h'. L, g and B are those of both directions; C' is
         untied   another one than C
         tied     C
         forward  nothing: C' = 0, the causal original
         output   glu  W a * sigmoid(V a),   a = gelu(y), as in the paper; linear  W a;   none  a
Cost     time O(L N D + L N c), memory O(L (N + D)), N = d_state, in chunks of c = 32; three products of
         matrices and a recurrence over the chunks
Exact    no; no attention. It equals the recurrence above, which is linear and the same at all positions
Padding  inputs at padding are zeros; a hole keeps the distances
Differs  the listing has one direction; h' is joined as in S5. The listing starts on the whole disc (r_min=0,
         r_max=1), the defaults here are slow states, as the paper takes for long tasks. Numbers drawn for the
         ring are at least 1e-6, so that no |L| or angle is exactly 0. L, g and B train without weight decay
         and at a share of the learning rate, as in the public code minimal-LRU; no dropout after the
         activation: the backbone's is on the branch
"""
# b batch, l length, t packed rows, d channels, r = d_state states, k directions

import math

import torch
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.diagonal import diagonal_system, packed_system
from models.directions import known_directions
from models.ssm import Output, tagged

LEAST = 1e-6


def lru(
    x: Tensor,
    nu: Tensor,
    theta: Tensor,
    log_gamma: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    mask: Tensor | None = None,
    *,
    packed: tuple[Tensor, int] | None = None,
) -> Tensor:
    """y of the module docstring. x: [b l d], nu, theta, log_gamma: [r], b: [r d], c: [k r d], complex, skip:
    [d], mask: [b l] bool, True = real, or None -> [b l d]; or packed, x: [t d], cu_seqlens and max_len ->
    [t d].
    """
    dtype = x.dtype
    (x,) = at_least_fp32(x if mask is None else x.masked_fill(~mask[..., None], 0))
    log_decay = torch.complex(-nu.double().exp(), theta.double().exp())
    system = log_decay, log_gamma.exp()[:, None] * b, c
    y = diagonal_system(x, *system) if packed is None else packed_system(x, *system, *packed)
    return torch.addcmul(y, skip, x).to(dtype)


def ring(size: int, r_min: float, r_max: float, max_phase: float) -> tuple[Tensor, Tensor, Tensor]:
    """nu, theta, log gamma [size] of numbers drawn evenly from the area of a ring, angles from 0 to max_phase
    (lemma 3.2 and section 3.4); float64.
    """
    area, turn = torch.rand(2, size, dtype=torch.float64).clamp_min(LEAST)
    square = r_min**2 + area * (r_max**2 - r_min**2)  # |L|^2
    return (-0.5 * square.log()).log(), (max_phase * turn).log(), 0.5 * torch.log1p(-square)


@register("lru")
class LRU(Mixer):
    """The parameters of `lru`, and an output stage."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        d_state: int = 64,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        directions: str = "untied",
        output: str = "glu",
        ssm_lr_scale: float = 0.5,
    ) -> None:
        super().__init__(place, projections=False)
        if d_state < 1:
            raise ValueError(f"lru needs d_state >= 1, got {d_state}")
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"lru needs 0 <= r_min < r_max <= 1, got r_min={r_min}, r_max={r_max}")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"lru needs 0 < max_phase <= 2 pi, got {max_phase}")
        self.d_state, self.directions = d_state, known_directions(directions, "lru")
        d, r = place.d_model, d_state
        nu, theta, log_gamma = (t.to(torch.get_default_dtype()) for t in ring(r, r_min, r_max, max_phase))
        self.nu = tagged(nn.Parameter(nu), lr_scale=ssm_lr_scale)
        self.theta = tagged(nn.Parameter(theta), lr_scale=ssm_lr_scale)
        self.log_gamma = tagged(nn.Parameter(log_gamma), lr_scale=ssm_lr_scale)
        self.b = tagged(nn.Parameter(torch.randn(r, d, 2) * (2 * d) ** -0.5), lr_scale=ssm_lr_scale)
        self.c = nn.Parameter(torch.randn(2 if directions == "untied" else 1, r, d, 2) * r**-0.5)
        self.skip = nn.Parameter(torch.randn(d))
        self.output = Output(d, d, kind=output, name="lru")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(lru(x, *self.system(), mask))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self.output(lru(x, *self.system(), packed=(cu_seqlens, max_len)))

    def system(self) -> tuple[Tensor, ...]:
        """What `lru` takes after x."""
        nu, theta, log_gamma, b, c, skip = at_least_fp32(
            self.nu, self.theta, self.log_gamma, self.b, self.c, self.skip
        )
        b, c = torch.view_as_complex(b), torch.view_as_complex(c)
        c = c.expand(2, -1, -1) if self.directions == "tied" else c
        return nu, theta, log_gamma, b, c, skip

    def state_size(self, length: int) -> int:
        return 2 * self.d_state * (1 if self.directions == "forward" else 2)
