"""S5: one diagonal state space for all channels together, scanned from both ends.

Paper    Smith et al. 2023, arXiv 2208.04933: eq. 1-6, section 3 and appendix B (initialisation)
Computes h_t = Abar h_(t-1) + Bbar u_t,   h'_t = Abar h'_(t+1) + Bbar u_t,
         y_t = 2 Re(C h_t + C' h'_t) + D u_t,   Abar = exp(step A),   Bbar = (Abar - 1) / A B,
         A of d_state / 2 complex numbers, one of each conjugate pair, each with a step = exp(s) of its own.
         The token itself is in both h and h'. A, B and s are those of both directions; C' is
         untied   another one than C (the paper's form for this benchmark)
         tied     C
         forward  nothing: C' = 0, the causal original
         output   half_glu1  a * sigmoid(W a + b),   a = gelu(y)
                  half_glu2  y * sigmoid(W a + b)
                  glu, linear, none: of a, as other state spaces have them
Cost     time O(L N D + L N c), memory O(L (N + D)), N = d_state, in chunks of c = 32; three products of
         matrices and a recurrence over the chunks
Exact    no; no attention. It equals the recurrence above, which is linear and the same at all positions
Padding  inputs at padding are zeros; a hole keeps the distances
Differs  real parts of A above -1e-4 count as -1e-4 (clip_eigs; of the released settings for this benchmark
         those of Image alone); gelu without the tanh approximation; B always trains as A and the step do,
         without weight decay (released: so in three of six tasks), the step at the rate of A unless
         dt_lr_scale is set (released for Text and Retrieval, dt_global: at the full rate, dt_lr_scale=1, and
         with weight decay); no dropout after the activation: the backbone's is on the branch. The defaults
         half_glu1, blocks of HiPPO and init_c are those of the released code, d_state is smaller; ListOps and
         Text took half_glu2
"""
# b batch, l length, t packed rows, d channels, r = d_state / 2 states, k directions

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.diagonal import diagonal_system, packed_system
from models.directions import known_directions
from models.ssm import OUTPUTS, Output, check_steps, held_input, log_uniform, tagged

HALF_GLU = ("half_glu1", "half_glu2")
INITS_OF_C = ("truncated", "lecun", "complex")
LEAST_DECAY = 1e-4


def s5(
    x: Tensor,
    a: Tensor,
    step: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    mask: Tensor | None = None,
    *,
    packed: tuple[Tensor, int] | None = None,
) -> Tensor:
    """y of the module docstring. x: [b l d], a: [r], b: [r d], c: [k r d], complex, step: [r], skip: [d],
    mask: [b l] bool, True = real, or None -> [b l d]; or packed, x: [t d], cu_seqlens and max_len -> [t d].

    Abar and Bbar are made in float64: 1 - Abar of a slow state is small beside 1.
    """
    dtype, step = x.dtype, step.double()
    (x,) = at_least_fp32(x if mask is None else x.masked_fill(~mask[..., None], 0))
    a = a.to(torch.complex128)
    log_decay = a * step
    inputs = (step * held_input(log_decay))[:, None] * b
    system = log_decay, inputs, 2 * c
    y = diagonal_system(x, *system) if packed is None else packed_system(x, *system, *packed)
    return torch.addcmul(y, skip, x).to(dtype)


def hippo_normal(size: int) -> tuple[Tensor, Tensor]:
    """The normal part of HiPPO-LegS, A + P P^T, as eigenvalues [size / 2] and eigenvectors [size, size / 2],
    of each conjugate pair the one with the negative frequency; complex128 (section 3.2).

    It is -1/2 plus a matrix that is skew, whose entry below the diagonal is -sqrt((2 i + 1)(2 j + 1)) / 2.
    """
    root = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()
    lower = (root[:, None] * root / 2).tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * (lower.mT - lower))
    frequencies, vectors = frequencies[: size // 2], vectors[:, : size // 2]
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies), vectors


def truncated_normal(*shape: int, fan_in: int) -> Tensor:
    """Variance 1 / fan_in, cut at two standard deviations: what JAX calls lecun_normal."""
    std = fan_in**-0.5 / 0.87962566103423978  # that of a normal number cut at -2 and 2
    return nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-2 * std, b=2 * std)


class HalfGLU(nn.Module):
    """The gated outputs with one matrix: [... d] -> [... d]."""

    def __init__(self, d: int, *, gate_gelu: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(d, d)
        self.gate_gelu = gate_gelu

    def forward(self, y: Tensor) -> Tensor:
        a = F.gelu(y)
        gate = self.linear(a).sigmoid()
        return (a if self.gate_gelu else y).to(gate.dtype) * gate


@register("s5")
class S5(Mixer):
    """The parameters of `s5`, and an output stage."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        d_state: int = 64,
        num_blocks: int = 8,
        init_c: str = "truncated",
        clip_eigs: bool = True,
        directions: str = "untied",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        output: str = "half_glu1",
        ssm_lr_scale: float = 0.25,
        dt_lr_scale: float | None = None,
    ) -> None:
        super().__init__(place, projections=False)
        if num_blocks < 1 or d_state < 2 or d_state % (2 * num_blocks):
            raise ValueError(
                f"s5 needs num_blocks equal blocks of conjugate pairs, got d_state={d_state}, "
                f"num_blocks={num_blocks}; choose a d_state that 2 * num_blocks divides"
            )
        check_steps("s5", dt_min, dt_max)
        for name, value, known in (("init_c", init_c, INITS_OF_C), ("output", output, HALF_GLU + OUTPUTS)):
            if value not in known:
                raise ValueError(f"unknown {name} '{value}' for s5; choose from: {', '.join(known)}")
        self.directions = known_directions(directions, "s5")
        self.d_state, self.clip_eigs = d_state, clip_eigs
        d, r, dtype = place.d_model, d_state // 2, torch.get_default_dtype()
        a, vectors = hippo_normal(d_state // num_blocks)
        a, vectors = a.repeat(num_blocks), torch.block_diag(*[vectors] * num_blocks)  # [r], [2r r]
        b = vectors.mH @ truncated_normal(2 * r, d, fan_in=2 * r).to(vectors)
        self.a_real = tagged(nn.Parameter(a.real.to(dtype)), lr_scale=ssm_lr_scale)
        self.a_imag = tagged(nn.Parameter(a.imag.to(dtype)), lr_scale=ssm_lr_scale)
        self.log_step = tagged(
            nn.Parameter(log_uniform((r,), dt_min, dt_max)),
            lr_scale=ssm_lr_scale if dt_lr_scale is None else dt_lr_scale,
        )
        self.b = tagged(nn.Parameter(torch.view_as_real(b).to(dtype)), lr_scale=ssm_lr_scale)
        directed = 2 if directions == "untied" else 1
        if init_c == "complex":
            c = torch.randn(directed, r, d, 2) * 0.5**0.5
        else:
            fan_in = 2 * r * (d if init_c == "lecun" else 1)
            c = torch.view_as_complex(truncated_normal(directed, d, 2 * r, 2, fan_in=fan_in)).to(vectors)
            c = torch.view_as_real((c @ vectors).mT)
        self.c = nn.Parameter(c.to(dtype).contiguous())  # [directed r d 2]
        self.skip = nn.Parameter(torch.randn(d))
        if output in HALF_GLU:
            self.output = HalfGLU(d, gate_gelu=output == "half_glu1")
        else:
            self.output = Output(d, d, kind=output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(s5(x, *self.system(), mask))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self.output(s5(x, *self.system(), packed=(cu_seqlens, max_len)))

    def system(self) -> tuple[Tensor, ...]:
        """What `s5` takes after x."""
        real, imag, b, c, skip = at_least_fp32(self.a_real, self.a_imag, self.b, self.c, self.skip)
        a = torch.complex(real.clamp_max(-LEAST_DECAY) if self.clip_eigs else real, imag)
        b, c = torch.view_as_complex(b), torch.view_as_complex(c)
        c = c.expand(2, -1, -1) if self.directions == "tied" else c
        step = self.log_step.double().exp()  # an angle is up to 1e5 times the step
        return a, step, b, c, skip

    def state_size(self, length: int) -> int:
        return self.d_state * (1 if self.directions == "forward" else 2)
