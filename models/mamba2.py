"""Mamba-2: a selective state-space model whose heads each forget at one rate, so that chunks are products.

Paper    Dao and Gu 2024, arXiv 2405.21060, sections 5 to 7
Computes z, x, B, C, s = W u;   x, B, C = silu(conv(x, B, C));   dt = softplus(s + b);   in each head
         H_t = exp(-dt_t e^a) H_{t-1} + dt_t B_t x_t^T,   y_t = H_t^T C_t + D x_t,   heads share B and C
         out = W' norm(y silu(z)),   norm(y) = g y / sqrt(mean(y^2) + eps),   conv: of 4 tokens, each channel
         y is the sum over both directions (the token itself counts in each), which share z, x and W' and
         untied   have their own B, C, s, conv, a, b and D (as in Vision Mamba, arXiv 2401.09417)
         tied     share everything: such layers give the reversed output for the reversed sequence
         forward  there is one: the causal original
Cost     time O(L D (N + 64)), memory O(L D), of which the states of all chunks are L D N / 64
Exact    yes: chunks of 64 give the recurrence
Padding  dt = 0 there keeps the state; the convolution reads zeros there
Differs  two directions (paper: causal); biases of both projections as in the backbone, zero at first (paper:
         none); heads are head_dim wide (the widest divisor of the inner width up to 64, the paper's):
         num_heads and d_head change nothing; d_state 64 (128 in the paper's language models); one group of
         heads; out_proj is not divided by the root of the number of layers at first, which in the released
         code the model does; kernel=fla, or auto on a GPU in half precision, runs the kernels of fla-core:
         products, and states between chunks, in half precision
"""
# b batch, r sets of parameters (two if untied), l length, n chunks, c positions of a chunk, h heads, e head
# dim, d channels, s states (the N above)

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fla_kernels
from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.directions import (
    both_directions,
    forward_alone,
    known_directions,
    packed_directions,
    short_conv,
)
from models.long_row import LongRow
from models.scan import CHUNK, Starts, decay_matrix, entering, running_sum
from models.ssm import step_bias, tagged

EPS = 1e-5
TAPS = 4  # of the short convolution
WIDEST_HEAD = 64
RATES = (1.0, 16.0)  # e^a at first, evenly between


def ssd(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    log_decay: Tensor,
    *,
    kernel: str = "torch",
    starts: Starts | None = None,
) -> Tensor:
    """y_i = sum over j <= i of (C_i . B_j) exp(g_(j+1) + ... + g_i) x_j in each head, x times dt already.

    x: [b l h e], B, C: [b l s], log_decay g <= 0: [b l h] -> [b l h e]. In torch, C_i . B_j is made once
    for all heads; kernel=fla gives each head a copy of B and C. `starts`: the chunks that start from
    H = 0; for packed sequences, and in torch alone.
    """
    if starts is not None:
        fla_kernels.not_packed(kernel, C, B, x)
    elif fla_kernels.chosen(kernel, C, B, x, one_decay=True):
        q, k = (part.unsqueeze(2).expand(-1, -1, x.shape[2], -1) for part in (C, B))
        return fla_kernels.decayed_attention(q, k, x, log_decay.unsqueeze(-1))
    dtype, length = x.dtype, x.shape[1]
    x, B, C, log_decay = (_in_chunks(part) for part in at_least_fp32(x, B, C, log_decay))  # [b n c ...]
    with full_precision(x):
        total = running_sum(log_decay)  # [b n c h]
        past = decay_matrix(total.mT.unsqueeze(-1))  # [b n h c c]
        within = ((C @ B.mT).unsqueeze(2) * past) @ x.transpose(2, 3)  # [b n h c e]
        end = total[:, :, -1:]
        until_end = (end - total).exp().unsqueeze(-1)
        update = (B.mT @ (x * until_end).flatten(-2)).unflatten(-1, x.shape[-2:])  # [b n s h e]
        states = entering(end.exp().unsqueeze(-1), update, starts, dim=1)
        across = (C @ states.flatten(-2)).unflatten(-1, x.shape[-2:]) * total.exp().unsqueeze(-1)
    return (within.transpose(2, 3) + across).flatten(1, 2)[:, :length].to(dtype)


def _in_chunks(x: Tensor) -> Tensor:
    """[b l ...] -> [b n c ...], zeros after the end."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, *, eps: float = EPS) -> Tensor:
    """norm(y silu(z)) of the module docstring. y, z: [... d], weight: [d] -> [... d] in the dtype of z."""
    dtype = z.dtype
    y, z, weight = at_least_fp32(y, z, weight)
    y = y * F.silu(z)
    return (y * (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight).to(dtype)


def head_width(head_dim: int | None, inner: int) -> int:
    """`head_dim`, or the widest up to 64 that divides the inner width."""
    if head_dim is None:
        return next(width for width in range(min(WIDEST_HEAD, inner), 0, -1) if inner % width == 0)
    if type(head_dim) is not int or head_dim < 1 or inner % head_dim:
        raise ValueError(
            f"mamba2 cannot split {inner} channels (expand times d_model) into heads of head_dim={head_dim}; "
            f"choose a divisor of {inner}"
        )
    return head_dim


@register("mamba2")
class Mamba2(Mixer):
    """Projections, convolution, gate and norm around `ssd`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "untied",
        d_state: int = 64,
        expand: int = 2,
        head_dim: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        eps: float = EPS,
        ssm_lr_scale: float = 1.0,
        kernel: str = "auto",
    ) -> None:
        super().__init__(place, projections=False)
        if not all(type(count) is int and count >= 1 for count in (d_state, expand)):
            raise ValueError(f"mamba2 needs whole d_state and expand >= 1, got {d_state} and {expand}")
        if not 0 < eps < math.inf:
            raise ValueError(f"mamba2 needs eps > 0, got {eps}")
        self.directions = known_directions(directions, "mamba2")
        self.kernel = fla_kernels.checked(kernel, "mamba2")
        self.traits = fla_kernels.traits_of(self.traits, kernel)
        self.inner, self.d_state, self.eps = expand * place.d_model, d_state, eps
        self.num_heads = self.inner // head_width(head_dim, self.inner)
        sets = self.sets = 2 if directions == "untied" else 1
        wide = self.inner + 2 * d_state  # channels of the convolution
        self.in_proj = nn.Linear(
            place.d_model, 2 * self.inner + sets * (2 * d_state + self.num_heads), bias=place.bias
        )
        self.out_proj = nn.Linear(self.inner, place.d_model, bias=place.bias)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        spread = TAPS**-0.5  # what torch starts a convolution of one channel each from
        self.conv_weight = nn.Parameter(torch.empty(sets, wide, TAPS).uniform_(-spread, spread))
        self.conv_bias = nn.Parameter(torch.empty(sets, wide).uniform_(-spread, spread))
        by_head = (sets, self.num_heads)
        rates = torch.empty(by_head).uniform_(*RATES)
        self.A_log = tagged(nn.Parameter(rates.log()), lr_scale=ssm_lr_scale)
        self.D = tagged(nn.Parameter(torch.ones(by_head)), lr_scale=ssm_lr_scale)
        self.dt_bias = tagged(nn.Parameter(step_bias(by_head, dt_min, dt_max)), lr_scale=ssm_lr_scale)
        self.norm_weight = nn.Parameter(torch.ones(self.inner))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        there, back, z = self.streams(x)
        if self.directions == "forward":
            y = forward_alone(self.recurrence, there, mask)
        else:
            y = sum(both_directions(self.recurrence, there, mask, back_streams=back))
        return self.out_proj(gated_norm(y, z, self.norm_weight, eps=self.eps))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        there, back, z = self.streams(x)
        row = LongRow.of(cu_seqlens, x.shape[0], max_len, chunk=CHUNK, gap=TAPS - 1)
        y = packed_directions(self.recurrence, there, row, directions=self.directions, back_streams=back)
        return self.out_proj(gated_norm(y, z, self.norm_weight, eps=self.eps))

    def streams(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """x: [... d_model] -> x [... d], BC [... 2s] and dt [... h], the same for the way back, z [... d]."""
        own = 2 * self.d_state + self.num_heads  # of each set of parameters
        z, x, rest = self.in_proj(x).split([self.inner, self.inner, self.sets * own], dim=-1)
        BC, step = rest.unflatten(-1, (self.sets, own)).split([own - self.num_heads, self.num_heads], dim=-1)
        (step,) = at_least_fp32(step)
        dt = F.softplus(step + self.dt_bias)  # [... r h]
        return (x, BC[..., 0, :], dt[..., 0, :]), (x, BC[..., -1, :], dt[..., -1, :]), z

    def recurrence(self, x: Tensor, BC: Tensor, dt: Tensor, starts: Starts | None = None) -> Tensor:
        """x: [r*b l d], BC: [r*b l 2s], dt: [r*b l h], the rows of each set together -> [r*b l d]."""
        x, BC, dt = (part.unflatten(0, (self.sets, -1)) for part in (x, BC, dt))  # [r b l ...]
        weights, biases = (
            part.split([self.inner, 2 * self.d_state], dim=1) for part in (self.conv_weight, self.conv_bias)
        )
        x, BC = (
            F.silu(short_conv(part, weight[:, None], bias[:, None]))
            for part, weight, bias in zip((x, BC), weights, biases, strict=True)
        )
        x = x.unflatten(-1, (self.num_heads, -1))  # [r b l h e]
        log_decay = -dt * self.A_log.exp()[:, None, None]
        inputs = (x * dt.unsqueeze(-1), *BC.chunk(2, dim=-1), log_decay)
        inputs = (part.flatten(0, 1) for part in inputs)
        mixed = ssd(*inputs, kernel=self.kernel, starts=starts).view(x.shape)
        return (mixed + x * self.D[:, None, None, :, None]).flatten(-2).flatten(0, 1)

    def state_size(self, length: int) -> int:
        return self.inner * self.d_state * (1 if self.directions == "forward" else 2)
