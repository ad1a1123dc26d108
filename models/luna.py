"""Luna: the sequence is packed into a few slots by attention and unpacked from them by attention.

Paper    Ma et al. 2021, arXiv 2106.01540, section 3 (pack and unpack attention)
Computes Y_P = attn(P, X),  Y_X = attn(X, Y_P) W_o,  X' = norm(Y_X + X),  P' = norm(Y_P + P),
         out = norm(FFN(X') + X');  P' is the next layer's P, and the first P is learned
Cost     time O(L P D), memory O(L P) per head, O((L + P) D) where FlashAttention or the kernels of
         few_keys.py and few_queries.py run
Exact    no; if Y_P were the sequence itself, the unpack step would be dense softmax attention
Padding  padded keys get weight zero in the pack step; the unpack step sees slots alone; packed rows are
         cut into chunks, over which the pack step of a sequence is summed, or lie as they are where
         FlashAttention or the kernels of few_queries.py run
Differs  projections start as those of the other mechanisms do (released code: Xavier, gain 1 / sqrt(2));
         Y_P is projected to the model width where the heads together have another (paper: they never do);
         released code can give the pack step a number of heads of its own, hides slots past a row's number
         of tokens by default (here `dynamic_projection`), has frequencies 10000^(-2i / (d_model - 2)) for P
         (here -2i / d_model), and leaves P without scale and positions where those of the tokens are
         learned (here `sinusoidal=False`, whatever the tokens have)
"""
# b batch, h heads, l length, t packed tokens, n chunks, c places of a chunk, p slots, d head dim;
# of luna_attention alone: m queries, n keys

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Block, Place, Traits, at_least_fp32, full_precision, masked_softmax, register
from models.dropout import Dropout
from models.few_keys import few_keys_attention
from models.few_keys import fits as few_keys_fit
from models.few_queries import few_queries_attention
from models.few_queries import fits as few_queries_fit
from models.layers import FeedForward, make_norm
from models.packed import Chunks
from models.row_products import sum_chunks
from models.softmax import even_bounds, flash_runs, softmax_fused
from models.sums import segment_softmax


def heads(num_heads: int, x_q: Tensor, x_kv: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [... h d] of [... h*d]; the keys are the values too if `values` is None."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (x_q, x_kv, x_kv if values is None else values))
    return q, k, v


def luna_attention(
    x_q: Tensor,
    x_kv: Tensor,
    mask: Tensor | None = None,
    *,
    num_heads: int,
    values: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head softmax attention from one sequence to another; both steps of Luna are this.

    x_q: [b m h*d] queries, x_kv: [b n h*d] keys, which are the values too unless `values` [b n h*d] are
    given, mask: [b n] bool, True = real key -> [b m h*d], zeros for a row without real keys.
    """
    q, k, v = heads(num_heads, x_q, x_kv, values)
    if few_keys_fit(q, k, v):
        rows, length = q.flatten(0, 1), q.shape[1]
        mixed = few_keys_attention(rows, k, v, even_bounds(q), length, used=mask, dropout=dropout)
        return mixed.unflatten(0, q.shape[:2]).flatten(2)
    if few_queries_fit(q, k, v):
        rows, real = (k.flatten(0, 1), v.flatten(0, 1)), None if mask is None else mask.flatten()
        bounds = even_bounds(k), k.shape[1]
        return few_queries_attention(q, *rows, *bounds, real=real, dropout=dropout).flatten(2)
    if flash_runs(q, k, v):
        mixed = softmax_fused(*(x.transpose(1, 2) for x in (q, k, v)), mask, dropout=dropout)
        return mixed.transpose(1, 2).flatten(2)
    q, k = at_least_fp32(q, k)
    with full_precision(q):
        scores = torch.einsum("bmhd,bnhd->bhmn", q * q.shape[-1] ** -0.5, k)
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :]).to(v.dtype)
    return torch.einsum("bhmn,bnhd->bmhd", F.dropout(weights, dropout), v).flatten(2)


def pack_attention(
    x_q: Tensor,
    x_kv: Tensor,
    chunks: Chunks,
    *,
    num_heads: int,
    values: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`luna_attention` from the slots of each sequence to its packed rows, laid out in chunks.

    x_q: [b p h*d], x_kv and `values`: [n c h*d] -> [b p h*d], zeros for a sequence without rows.
    """
    q, k, v = heads(num_heads, x_q, x_kv, values)
    return segment_softmax(q, k, v, chunks, dropout=dropout).flatten(2)


def pack_rows(
    x_q: Tensor,
    x_kv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    num_heads: int,
    values: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`luna_attention` from the slots of each sequence to its packed rows, by the kernels of few_queries.py
    or FlashAttention.

    x_q: [b p h*d], x_kv and `values`: [t h*d] -> [b p h*d], zeros for a sequence without rows; filler rows
    reach nothing.
    """
    q, k, v = heads(num_heads, x_q, x_kv, values)
    return few_queries_attention(q, k, v, cu_seqlens, max_len, dropout=dropout).flatten(2)


def unpack_rows(
    x_q: Tensor,
    x_kv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    used: Tensor | None = None,
    *,
    num_heads: int,
    values: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`luna_attention` from the packed rows of each sequence to its slots.

    x_q: [t h*d], x_kv and `values`: [b p h*d], used: [b p] bool, True = seen -> [t h*d], zeros at filler
    rows, which reach nothing.
    """
    q, k, v = heads(num_heads, x_q, x_kv, values)
    return few_keys_attention(q, k, v, cu_seqlens, max_len, used=used, dropout=dropout).flatten(1)


def sinusoids(length: int, width: int) -> Tensor:
    """[length width] float32: sines, then cosines, of the positions (arXiv 1706.03762, section 3.5)."""
    half = (width + 1) // 2
    frequency = 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width].float()


@register("luna")
class Luna(Block):
    """A whole layer around two `luna_attention` steps; its carry is P [b p d_model], None from the last one.

    `sinusoidal` multiplies the first P by sqrt(d_model) and adds positions to it. `dynamic_projection` hides
    from the unpack step the slots past a row's number of real tokens, as the released encoder does. `d_ff`
    None means 4 * d_model.
    """

    traits = Traits(packed=True)

    def __init__(
        self,
        place: Place,
        *,
        proj_len: int = 16,
        tie_kv: bool = True,
        sinusoidal: bool = True,
        dynamic_projection: bool = False,
        d_ff: int | None = None,
        activation: str = "relu",
        norm: str = "layer",
        norm_stats: str = "real",
        norm_eps: float = 1e-5,
        prenorm: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        act_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        width, inner = place.d_model, place.num_heads * place.head_dim
        if proj_len < 1:
            raise ValueError(f"luna needs proj_len >= 1, got {proj_len}")
        self.proj_len, self.tie_kv, self.prenorm = proj_len, tie_kv, prenorm
        self.dynamic_projection = dynamic_projection
        num_kv = 1 if tie_kv else 2
        self.pack_q = nn.Linear(width, inner, bias=place.bias)
        self.pack_kv = nn.Linear(width, num_kv * inner, bias=place.bias)
        self.pack_out = nn.Identity() if inner == width else nn.Linear(inner, width, bias=place.bias)
        self.unpack_q = nn.Linear(width, inner, bias=place.bias)
        self.unpack_kv = nn.Linear(width, num_kv * inner, bias=place.bias)
        self.out = nn.Linear(inner, width, bias=place.bias)
        d_ff = 4 * width if d_ff is None else d_ff
        self.ff = FeedForward(width, d_ff, activation=activation, dropout=act_dropout)
        self.is_last = place.layer_index == place.num_layers - 1
        norm_of = partial(make_norm, width=width, stats=norm_stats, eps=norm_eps)
        reads_p = prenorm or not self.is_last  # the last P' has no reader, and a norm of it would never learn
        self.norm_x, self.norm_ff = norm_of(norm), norm_of(norm)
        self.norm_p = norm_of(norm if reads_p else "none")
        self.dropout, self.attn_dropout = Dropout(dropout), nn.Dropout(attn_dropout)
        first = place.layer_index == 0  # later layers get P as their carry
        self.slots = nn.Parameter(torch.randn(proj_len, width) * width**-0.5) if first else None
        positions = sinusoids(proj_len, width) if first and sinusoidal else None
        self.register_buffer("slot_positions", positions, persistent=False)
        if norm == "batch" and norm_stats == "all":
            self.traits = self.traits.but(
                "its norms count padding, which packed rows have none of", packed=False
            )

    def init_carry(self, batch_size: int) -> Tensor | None:
        """The learned P, [b p d_model], in the first layer; None in the others."""
        if self.slots is None:
            return None
        slots = self.slots
        if self.slot_positions is not None:
            slots = slots * math.sqrt(self.place.d_model) + self.slot_positions
        return self.dropout(slots.expand(batch_size, -1, -1))

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.layer(x, mask, self.slots_or_carry(x.shape[0], carry), partial(self.mix, mask=mask))

    def forward_packed(
        self, x: Tensor, cu_seqlens: Tensor, max_len: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        slots = self.slots_or_carry(cu_seqlens.shape[0] - 1, carry)
        real = torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]
        mix = partial(self.mix_packed, cu_seqlens=cu_seqlens, max_len=max_len)
        return self.layer(x, real, slots, mix)

    def slots_or_carry(self, batch_size: int, carry: Tensor | None) -> Tensor:
        """P [b p d_model]; ValueError if it should come from the layer before, and does not."""
        slots = self.init_carry(batch_size) if carry is None else carry
        if slots is None:
            raise ValueError(
                f"luna layer {self.place.layer_index} needs the carry of the layer before it, got None"
            )
        return slots

    def layer(
        self,
        x: Tensor,
        real: Tensor | None,
        slots: Tensor,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor | None]:
        """Norms, residuals and feed-forward around `mix`: x [... d_model], real [...] -> (x, carry)."""
        if self.prenorm:
            mixed, packed = mix(self.norm_x(x, real), self.norm_p(slots))
            x, slots = x + self.dropout(mixed), slots + self.dropout(packed)
            x = x + self.dropout(self.ff(self.norm_ff(x, real)))
        else:
            mixed, packed = mix(x, slots)
            x, slots = self.norm_x(x + self.dropout(mixed), real), self.norm_p(slots + self.dropout(packed))
            x = self.norm_ff(x + self.dropout(self.ff(x)), real)
        return x, None if self.is_last else slots

    def mix(self, x: Tensor, slots: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(Y_X [b l d_model], Y_P [b p d_model]) of X and P."""
        packed = self.pack_out(self.attend(self.pack_q(slots), self.pack_kv(x), mask))
        used = None
        if self.dynamic_projection:
            count = (
                mask.sum(dim=-1) if mask is not None else torch.full(x.shape[:1], x.shape[1], device=x.device)
            )
            used = torch.arange(self.proj_len, device=x.device) < count[:, None]  # [b p]
        return self.out(self.attend(self.unpack_q(x), self.unpack_kv(packed), used)), packed

    def mix_packed(self, x: Tensor, slots: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
        """(Y_X [t d_model], Y_P [b p d_model]) of packed X and P; Y_X is `out` of zeros at filler rows."""
        q = self.pack_q(slots)
        like = heads(self.place.num_heads, q, q, None)
        if few_queries_fit(*like) or flash_runs(*like):
            k, v = self.split(self.pack_kv(x))
            packed = pack_rows(q, k, cu_seqlens, max_len, values=v, **self.options)
        else:
            chunks = sum_chunks(cu_seqlens, x.shape[0], max_len)
            k, v = self.split(self.pack_kv(chunks.lay_out(x)))
            packed = pack_attention(q, k, chunks, values=v, **self.options)
        packed, used = self.pack_out(packed), None
        if self.dynamic_projection:
            used = torch.arange(self.proj_len, device=x.device) < cu_seqlens.diff()[:, None]  # [b p]
        q = self.unpack_q(x)
        k, v = self.split(self.unpack_kv(packed))
        return self.out(unpack_rows(q, k, cu_seqlens, max_len, used, values=v, **self.options)), packed

    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        k, v = self.split(kv)
        return luna_attention(q, k, mask, values=v, **self.options)

    def split(self, kv: Tensor) -> tuple[Tensor, Tensor | None]:
        return (kv, None) if self.tie_kv else kv.chunk(2, dim=-1)

    @property
    def options(self) -> dict:
        dropout = self.attn_dropout.p if self.training else 0.0
        return {"num_heads": self.place.num_heads, "dropout": dropout}

    def state_size(self, length: int) -> int:
        return (1 if self.tie_kv else 2) * self.proj_len * self.place.num_heads * self.place.head_dim
