"""RetNet: linear attention whose weights fall with the distance, at one fixed rate for each head.

Paper    Sun et al. 2023, arXiv 2307.08621, eq. 5-8
Computes o = (Q K^T * D) V,   Q, K = x W_Q, x W_K / sqrt(d), both turned by their position,
         gamma = 1 - 2^(-5 - h) for head h = 0, 1, ...;
         out = (N(o) * silu(x W_g)) W_o, N a norm of each head (head_norm: layer or rms)
         tied     D_ij = gamma^|i-j|: forward sum + backward sum - the token itself, which counts once
         untied   the same D, with a Q, K and V of their own (for j = i: the forward ones) for j > i
         forward  the causal original: D_ij = gamma^(i-j) for j <= i, else 0
Cost     time O(L D (C + D)) per head, C = 64 tokens of a chunk, memory O(L D + L D^2 / C)
Exact    no; it is the matrix above times the values
Padding  padded tokens have k = 0, v = 0; distances count positions: a hole stays as wide as it is
Differs  the paper is causal. gamma is the scale of its xPos, the rotation the rest of it: |i-j| turns no
         scale around. Angles are those of rotary embeddings (code: 10000^(-t), t evenly from 0 to 1). The
         divisors of section 2.4 are left out: N undoes them but for its eps. N has no weight, as in the code,
         whose N is a root mean square. Biases where the place asks for them (paper: none). kernel=fla, or
         auto on a GPU in half precision, runs the kernels of fla-core: products, and states between chunks,
         in half precision
"""
# b batch, l length, t packed rows, h heads, d head dim (keys), e head dim (values)

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fla_kernels, scan
from models.common import Mixer, Place, Traits, at_least_fp32, register, rotate
from models.directions import both_directions, forward_alone, known_directions, packed_directions
from models.head_norm import head_norm, known_kind
from models.long_row import LongRow
from models.packed import Segments

EPS = 1e-6  # as released; at the start the squares it is added to are near 1e-5
BASE = 10_000.0  # of the rotation
GAIN = 2**-2.5  # of the released initialisation


def log_gammas(num_heads: int, device: torch.device | None = None) -> Tensor:
    """log(1 - 2^(-5 - h)) for each head: [h], float64."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(num_heads, dtype=torch.float64, device=device))))


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    mask: Tensor | None = None,
    *,
    directions: str = "tied",
    back: tuple[Tensor, Tensor, Tensor] | None = None,
    kernel: str = "torch",
) -> Tensor:
    """q, k: [b l h d], turned already, v: [b l h e], log_gamma: [h], mask: [b l] bool, True = real
    -> [b l h e]; `back`: the q, k, v of the way back, if they are others.
    """
    scale = q.shape[-1] ** -0.5
    (wide,) = at_least_fp32(v)
    log_gamma = log_gamma.to(wide.dtype)  # at padding too, which keeps the distances

    def recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fla_kernels.chosen(kernel, q, k, v):
            return fla_kernels.decayed_attention(q, k, v, log_gamma, scale=scale)
        log_decay = log_gamma.expand(1, q.shape[1], -1).unsqueeze(-1)  # [1 l h 1]
        return scan.decayed_attention(q * scale, k, v, log_decay)

    def real(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if mask is None:
            return q, k, v
        padding = ~mask[:, :, None, None]
        return q, k.masked_fill(padding, 0), v.masked_fill(padding, 0)

    q, k, v = real(q, k, v)
    if directions == "forward":
        return forward_alone(recurrence, (q, k, v))
    back = (q, k, v) if back is None else real(*back)
    there, returned = both_directions(recurrence, (q, k, v), back_streams=back)
    return there + returned - itself(*back, scale=scale)


def itself(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """What each token adds to its own output: q, k [... d], v [... e] -> [... e]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    return ((q * k).sum(dim=-1, keepdim=True) * scale * v).to(dtype)


def retention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    directions: str = "tied",
    back: tuple[Tensor, Tensor, Tensor] | None = None,
    kernel: str = "torch",
) -> Tensor:
    """`retention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    fla_kernels.not_packed(kernel, q, k, v)
    scale = q.shape[-1] ** -0.5
    (wide,) = at_least_fp32(v)
    log_gamma = log_gamma.to(wide.dtype)

    def recurrence(q: Tensor, k: Tensor, v: Tensor, starts: scan.Starts) -> Tensor:
        log_decay = log_gamma.expand(1, q.shape[1], -1).unsqueeze(-1)  # [1 l h 1]
        return scan.decayed_attention(q * scale, k, v, log_decay, starts=starts)

    row = LongRow.of(cu_seqlens, q.shape[0], max_len, chunk=scan.CHUNK)
    mixed = packed_directions(recurrence, (q, k, v), row, directions=directions, back_streams=back)
    if directions == "forward":
        return mixed
    q, k, v = (q, k, v) if back is None else back
    filler = ~row.where.real[:, None, None]
    return mixed - itself(q, k.masked_fill(filler, 0), v.masked_fill(filler, 0), scale=scale)


@register("retnet")
class RetNet(Mixer):
    """Projections, rotation, norm and output gate around `retention`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "tied",
        expand_v: float = 2.0,
        head_norm: str = "layer",
        kernel: str = "auto",
    ) -> None:
        super().__init__(place, projections=False)
        keys, values = place.head_dim, float(place.head_dim * expand_v)
        if keys % 2:
            raise ValueError(f"retnet turns pairs of keys, got heads of {keys}; change num_heads or d_head")
        if not (values >= 1 and values.is_integer()):
            raise ValueError(
                "retnet needs expand_v that gives a whole head width of at least 1; "
                f"got {values:g} for heads of {keys}"
            )
        self.directions = known_directions(directions, "retnet")
        self.head_norm = known_kind(head_norm, "retnet", int(values))
        self.kernel = fla_kernels.checked(kernel, "retnet")
        self.traits = fla_kernels.traits_of(self.traits, kernel)
        self.state = keys * int(values) * place.num_heads * (1 if directions == "forward" else 2)
        inner = int(values) * place.num_heads
        self.widths = [keys * place.num_heads, keys * place.num_heads, inner]
        self.there = nn.Linear(place.d_model, sum(self.widths), bias=place.bias)
        self.back = None
        if directions == "untied":
            self.back = nn.Linear(place.d_model, sum(self.widths), bias=place.bias)
        self.gate = nn.Linear(place.d_model, inner, bias=place.bias)
        self.out = nn.Linear(inner, place.d_model, bias=place.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier, each projection on its own, all but the last with gain 2^-2.5, as released."""
        for linear, widths in ((self.there, self.widths), (self.back, self.widths), (self.gate, None)):
            if linear is not None:
                for weight in linear.weight.split(widths or linear.out_features):
                    nn.init.xavier_uniform_(weight, gain=GAIN)
        nn.init.xavier_uniform_(self.out.weight)

    def streams(self, x: Tensor, linear: nn.Linear, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[... l d_model], positions [l] -> q, k: [... l h d], turned, v: [... l h e]."""
        parts = linear(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.place.num_heads, -1)) for part in parts)
        q, k = (rotate(part.transpose(-3, -2), positions, base=BASE).transpose(-3, -2) for part in (q, k))
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mixed(retention, x, (mask,), torch.arange(x.shape[1], device=x.device))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        positions = Segments.of(cu_seqlens, x.shape[0]).position
        return self.mixed(retention_packed, x, (cu_seqlens, max_len), positions)

    def mixed(self, mix: Callable[..., Tensor], x: Tensor, where: tuple, positions: Tensor) -> Tensor:
        """x: [... l d_model], where: what `mix` knows the sequences by, positions: [l] -> [... l d_model]."""
        back = None if self.back is None else self.streams(x, self.back, positions)
        there, log_gamma = self.streams(x, self.there, positions), log_gammas(self.place.num_heads, x.device)
        options = {"directions": self.directions, "kernel": self.kernel}
        o = mix(*there, log_gamma, *where, back=back, **options)
        o = head_norm(o, kind=self.head_norm, eps=EPS).flatten(-2)
        return self.out(o * F.silu(self.gate(x)))

    def state_size(self, length: int) -> int:
        return self.state
