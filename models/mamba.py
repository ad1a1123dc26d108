"""Mamba: a selective state-space model; each channel has states whose step size, input and output the token
sets.

Paper    Gu and Dao 2023, arXiv 2312.00752, sections 3.2 to 3.6
Computes x, z = W u;   x = silu(conv(x));   p, B, C = V x;   dt = softplus(U p + b);   in each channel c
         h_t[n] = exp(-dt_t e^a[n]) h_{t-1}[n] + dt_t x_t B_t[n],   y_t = sum_n C_t[n] h_t[n] + D x_t
         out = W' (y silu(z));   B and C are shared by channels; conv: of 4 tokens, each channel
         y is the sum over both directions (the token itself counts in each), which share W and W' and
         untied   have their own conv, V, U, a, b and D (Vision Mamba, arXiv 2401.09417)
         tied     share everything: such layers give the reversed output for the reversed sequence
         forward  there is one: the causal original
Cost     time O(L D N), memory O(L D): states are made again for the gradients, some channels at a time
Exact    yes
Padding  dt = 0 there keeps the state; the convolution reads zeros there
Differs  two directions (paper: causal); biases of both projections as in the backbone, zero at first
         (paper: none); both directions start from the paper's step sizes (released Vision Mamba: one does);
         out_proj is not divided by the root of the number of layers at first (released: by the model);
         there are no heads: num_heads and d_head change nothing
"""
# b batch, r sets of parameters (two if untied), l length, d channels, s states of a channel (the N above), k
# rank of the step

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import (
    both_directions,
    forward_alone,
    known_directions,
    packed_directions,
    short_conv,
)
from models.long_row import LongRow
from models.scan import Starts
from models.ssm import step_bias, tagged

TAPS = 4  # of the short convolution
FORGET = 1e30  # a step after which nothing is left of a state, and many of which are a finite sum
PART = 2**28  # states made at a time: bounds the working memory, some four times this, whatever the batch
PART_ON_CPU = 2**22  # measured: what caches hold is made twice as fast


def selective_scan(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, rate: Tensor) -> Tensor:
    """y_i = sum over j <= i and n of C_i[n] B_j[n] exp(-(dt_(j+1) + ... + dt_i) rate[n]) x_j in each channel,
    x times dt already.

    x, dt >= 0: [r b l d], B, C: [r b l s], rate > 0: [r s d] -> [r b l d], at least float32.
    """
    return _SelectiveScan.apply(*at_least_fp32(x, B, C, dt, rate))


class _SelectiveScan(torch.autograd.Function):
    """Keeps its inputs alone: no [r b l s d] outlives the channels it is made for."""

    @staticmethod
    def forward(ctx, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, C, dt, rate)
        B, C, out = B.unsqueeze(-1), C.unsqueeze(-1), []
        for u, step, decay in _parts(B.numel(), x, dt, rate):
            states = recur_(u.unsqueeze(-2) * B, step, decay)
            out.append(states.mul_(C).sum(-2))
        return torch.cat(out, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        """The states again, and the same recurrence from the end for the gradients of their updates."""
        x, B, C, dt, rate = ctx.saved_tensors
        grad_B, grad_C, by_channel = torch.zeros_like(B), torch.zeros_like(C), []
        B, C = B.unsqueeze(-1), C.unsqueeze(-1)
        for u, step, decay, over in _parts(B.numel(), x, dt, rate, grad):
            u, over = u.unsqueeze(-2), over.unsqueeze(-2)
            states = recur_(u * B, step, decay)
            grad_C += (states * over).sum(-1)
            next_step = F.pad(step[..., 1:, :], (0, 0, 0, 1))
            updates = recur_(over * C, next_step, decay, from_end=True)
            grad_B += (updates * u).sum(-1)
            grad_u = (updates * B).sum(-2)
            kept = states.addcmul_(u, B, value=-1).mul_(updates)  # the gradients by the logs of the decays
            grad_decay = (kept * step.unsqueeze(-2)).sum((1, 2)).neg_()
            grad_step = kept.mul_(decay[:, None, None]).sum(-2).neg_()
            by_channel.append((grad_u, grad_step, grad_decay))
        grad_x, grad_dt, grad_rate = (torch.cat(parts, dim=-1) for parts in zip(*by_channel, strict=True))
        return grad_x, grad_B, grad_C, grad_dt, grad_rate


def _parts(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each tensor [... d] in groups of channels, of which each has `width` states: at least one, of PART."""
    part = PART_ON_CPU if tensors[0].device.type == "cpu" else PART
    group = max(1, min(tensors[0].shape[-1], part // max(1, width)))
    return zip(*(x.split(group, dim=-1) for x in tensors), strict=True)


def recur_(states: Tensor, dt: Tensor, rate: Tensor, *, from_end: bool = False) -> Tensor:
    """h_t = exp(-dt_t rate) h_{t-1} + h_t in place; `from_end`: exp(-dt_t rate) h_{t+1}.

    states: [r b l s d], dt: [r b l d], rate: [r s d]. Going up, the second of each pair of blocks takes in
    the first; going down, the first half of a block takes in the block before. A decay over a block is that
    of the block's summed dt, so that no decay is kept.
    """
    length, rate = states.shape[-3], -rate[:, None, None]

    def at(first: int, step: int, count: int) -> Tensor:
        if from_end:
            first = length - 1 - first - step * (count - 1)
        return states[..., first : first + step * (count - 1) + 1 : step, :, :]

    def decay(sums: Tensor, first: int, count: int) -> Tensor:
        chosen = sums[..., first : first + 2 * count - 1 : 2, :]
        return ((chosen.flip(-2) if from_end else chosen).unsqueeze(-2) * rate).exp_()

    sums, block = [dt.flip(-2) if from_end else dt], 1
    while pairs := length // (2 * block):
        at(2 * block - 1, 2 * block, pairs).addcmul_(
            decay(sums[-1], 1, pairs), at(block - 1, 2 * block, pairs)
        )
        sums.append(sums[-1][..., 0 : 2 * pairs : 2, :] + sums[-1][..., 1 : 2 * pairs : 2, :])
        block *= 2
    for summed in reversed(sums):
        if count := (length - block) // (2 * block):
            before = at(2 * block - 1, 2 * block, count)
            at(3 * block - 1, 2 * block, count).addcmul_(decay(summed, 2, count), before)
        block //= 2
    return states


@register("mamba")
class Mamba(Mixer):
    """Projections, convolution and gate around `selective_scan`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "untied",
        d_state: int = 16,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        ssm_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(place, projections=False)
        rank = math.ceil(place.d_model / 16) if dt_rank is None else dt_rank
        if not all(type(count) is int and count >= 1 for count in (d_state, expand, rank)):
            raise ValueError(
                f"mamba needs whole d_state, expand and dt_rank >= 1, got {d_state}, {expand} and {rank}"
            )
        self.directions = known_directions(directions, "mamba")
        self.inner, self.d_state, self.rank = expand * place.d_model, d_state, rank
        sets = self.sets = 2 if directions == "untied" else 1
        self.in_proj = nn.Linear(place.d_model, 2 * self.inner, bias=place.bias)
        self.out_proj = nn.Linear(self.inner, place.d_model, bias=place.bias)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

        def uniform(spread: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sets, *shape).uniform_(-spread, spread))

        self.conv_weight = uniform(TAPS**-0.5, self.inner, TAPS)
        self.conv_bias = uniform(TAPS**-0.5, self.inner)
        self.x_proj = uniform(self.inner**-0.5, rank + 2 * d_state, self.inner)
        self.dt_proj = uniform(rank**-0.5, self.inner, rank)
        by_channel = (sets, self.inner)
        self.dt_bias = tagged(nn.Parameter(step_bias(by_channel, dt_min, dt_max)), lr_scale=ssm_lr_scale)
        rates = torch.arange(1, d_state + 1).expand(*by_channel, -1)
        self.A_log = tagged(nn.Parameter(rates.log()), lr_scale=ssm_lr_scale)
        self.D = tagged(nn.Parameter(torch.ones(by_channel)), lr_scale=ssm_lr_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        streams = (x,) if mask is None else (x, x.new_ones(*mask.shape, 1))
        if self.directions == "forward":
            y = forward_alone(self.recurrence, streams, mask)
        else:
            y = sum(both_directions(self.recurrence, streams, mask))
        return self.out_proj(y.to(z.dtype) * F.silu(z))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        row = LongRow.of(cu_seqlens, x.shape[0], max_len, gap=TAPS - 1)
        streams = (x, x.new_ones(x.shape[0], 1))
        y = packed_directions(self.recurrence, streams, row, directions=self.directions)
        return self.out_proj(y.to(z.dtype) * F.silu(z))

    def recurrence(self, x: Tensor, real: Tensor | None = None, starts: Starts | None = None) -> Tensor:
        """x: [r*b l d], real: [r*b l 1] or None, the rows of each set together -> [r*b l d].

        With `starts`, the unused places between packed sequences make the states zero.
        """
        x = x.unflatten(0, (self.sets, -1))  # [r b l d]
        x = F.silu(short_conv(x, self.conv_weight[:, None], self.conv_bias[:, None]))
        rows = x.flatten(1, 2) @ self.x_proj.mT  # [r b*l k+2s]
        step, B, C = rows.split([self.rank, self.d_state, self.d_state], dim=-1)
        (step,) = at_least_fp32(step @ self.dt_proj.mT)
        dt = F.softplus(step + self.dt_bias[:, None]).view_as(x)
        if real is not None:
            dt = dt * real.unflatten(0, (self.sets, -1))
        B, C = (part.unflatten(1, x.shape[1:3]) for part in (B, C))
        updates = x * dt
        if starts is not None:
            unused = (real == 0).unflatten(0, (self.sets, -1))
            dt = dt.masked_fill(unused, FORGET)
        y = selective_scan(updates, B, C, dt, self.A_log.mT.contiguous().exp())
        return (y.to(x.dtype) + x * self.D[:, None, None]).flatten(0, 1)

    def state_size(self, length: int) -> int:
        return self.inner * self.d_state * (1 if self.directions == "forward" else 2)
