"""Gated linear attention: a matrix state for each head, whose rows decay at rates that the token decides.

Paper    Yang et al. 2024, arXiv 2312.06635, eq. 3 and section 4.4
Computes S_i = diag(a_i) S_{i-1} + k_i v_i^T,   o_i = S_i^T q_i / sqrt(d),
         a_i = sigmoid(x_i W_1 W_2 + b)^(1/tau),   W_1 of gate_rank columns;
         out = (N(o) * silu(x W_g)) W_o, N a norm of each head (head_norm: rms or layer)
         tied     o_i of the sequence and of the reversed sequence are added: the token itself counts twice
         untied   the same, each direction with its own q, k, v and a
         forward  the causal original
Cost     time O(L D (C + D)) per head, C = 64 tokens of a chunk, memory O(L D + L D^2 / C)
Exact    no; without decay it is linear attention without feature map and normaliser
Padding  padded tokens have k = 0, v = 0, a = 1: they leave the state as it was
Differs  the paper and its code are causal; N is a layer norm in the paper, a root-mean-square norm in its
         code, with a weight in both: rms by default; all projections have a bias where the place asks for it
         (paper: W_g and the decays have one, code: the decays); kernel=fla, or auto on a GPU in half
         precision, runs the code's own kernels: products, and states between chunks, in half precision
"""
# b batch, l length, t packed rows, h heads, d head dim (keys), e head dim (values)

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fla_kernels, scan
from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import both_directions, forward_alone, known_directions, packed_directions
from models.head_norm import head_norm, known_kind
from models.long_row import LongRow

EPS = 1e-5


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mask: Tensor | None = None,
    *,
    directions: str = "tied",
    back: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    kernel: str = "torch",
) -> Tensor:
    """q, k, log_decay <= 0: [b l h d], v: [b l h e], mask: [b l] bool, True = real -> [b l h e].

    `back`: the same four for the way back, if they are others.
    """
    scale = q.shape[-1] ** -0.5

    def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if fla_kernels.chosen(kernel, q, k, v):
            return fla_kernels.decayed_attention(q, k, v, log_decay, scale=scale)
        return scan.decayed_attention(q * scale, k, v, log_decay)

    if directions == "forward":
        return forward_alone(recurrence, (q, k, v, log_decay), mask)
    there, returned = both_directions(recurrence, (q, k, v, log_decay), mask, back_streams=back)
    return there + returned


def gla_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    directions: str = "tied",
    back: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    kernel: str = "torch",
) -> Tensor:
    """`gla` within each packed sequence. q, k, log_decay: [t h d], v: [t h e] -> [t h e]."""
    fla_kernels.not_packed(kernel, q, k, v)
    scale = q.shape[-1] ** -0.5

    def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: scan.Starts) -> Tensor:
        return scan.decayed_attention(q * scale, k, v, log_decay, starts=starts)

    row = LongRow.of(cu_seqlens, q.shape[0], max_len, chunk=scan.CHUNK)
    return packed_directions(recurrence, (q, k, v, log_decay), row, directions=directions, back_streams=back)


class Streams(nn.Module):
    """What one direction of the recurrence is made of: x [... d_model] -> q, k, v, log decay, by head."""

    def __init__(self, place: Place, keys: int, values: int, gate_rank: int, tau: float) -> None:
        super().__init__()
        self.heads, self.tau = place.num_heads, tau
        self.widths = [keys * place.num_heads, keys * place.num_heads, values * place.num_heads]
        self.qkv = nn.Linear(place.d_model, sum(self.widths), bias=place.bias)
        self.decay_down = nn.Linear(place.d_model, gate_rank, bias=False)
        self.decay_up = nn.Linear(gate_rank, keys * place.num_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        (logit,) = at_least_fp32(self.decay_up(self.decay_down(x)))
        log_decay = F.logsigmoid(logit) / self.tau
        q, k, v, log_decay = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v, log_decay))
        return q, k, v, log_decay


@register("gla")
class GLA(Mixer):
    """Projections, decays, norm and output gate around `gla`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "tied",
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        tau: float = 16.0,
        head_norm: str = "rms",
        kernel: str = "auto",
    ) -> None:
        super().__init__(place, projections=False)
        keys, values = float(place.head_dim * expand_k), float(place.head_dim * expand_v)
        if not (keys >= 1 and values >= 1 and keys.is_integer() and values.is_integer()):
            raise ValueError(
                "gla needs expand_k and expand_v that give whole head widths of at least 1; "
                f"got {keys:g} and {values:g} for heads of {place.head_dim}"
            )
        if not (type(gate_rank) is int and gate_rank >= 1 and 0 < tau < math.inf):
            raise ValueError(
                f"gla needs gate_rank >= 1, whole, and finite tau > 0, got {gate_rank} and {tau}"
            )
        self.directions = known_directions(directions, "gla")
        self.head_norm = known_kind(head_norm, "gla", int(values))
        self.kernel = fla_kernels.checked(kernel, "gla")
        self.traits = fla_kernels.traits_of(self.traits, kernel)
        self.state = int(keys) * int(values) * place.num_heads * (1 if directions == "forward" else 2)
        options = (int(keys), int(values), gate_rank, tau)
        self.there = Streams(place, *options)
        self.back = Streams(place, *options) if directions == "untied" else None
        inner = int(values) * place.num_heads
        self.norm_weight = nn.Parameter(torch.ones(int(values)))
        self.gate = nn.Linear(place.d_model, inner, bias=place.bias)
        self.out = nn.Linear(inner, place.d_model, bias=place.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        options = {"directions": self.directions, "kernel": self.kernel}
        back = None if self.back is None else self.back(x)
        return self.finished(gla(*self.there(x), mask, back=back, **options), x)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        options = {"directions": self.directions, "kernel": self.kernel}
        back = None if self.back is None else self.back(x)
        return self.finished(gla_packed(*self.there(x), cu_seqlens, max_len, back=back, **options), x)

    def finished(self, mixed: Tensor, x: Tensor) -> Tensor:
        """mixed: [... h e], x: [... d_model] -> [... d_model]."""
        mixed = head_norm(mixed, self.norm_weight, kind=self.head_norm, eps=EPS).flatten(-2)
        return self.out(mixed * F.silu(self.gate(x)))

    def state_size(self, length: int) -> int:
        return self.state
