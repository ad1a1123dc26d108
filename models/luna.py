"""Luna: the sequence is packed into a few slots by attention and unpacked from them by attention.

Paper    Ma et al. 2021, arXiv 2106.01540, section 3 (pack and unpack attention)
Computes Y_P = attn(P, X),  Y_X = attn(X, Y_P) W_o,  X' = norm(Y_X + X),  P' = norm(Y_P + P),
         out = norm(FFN(X') + X');  P' is the next layer's P, and the first P is learned
Cost     time O(L P D), memory O(L P) per head
Exact    no; if Y_P were the sequence itself, the unpack step would be dense softmax attention
Padding  padded keys get weight zero in the pack step; the unpack step sees slots alone
Differs  projections start as those of the other mechanisms do (released code: Xavier, gain 1 / sqrt(2));
         Y_P is projected to the model width where the heads together have another (paper: they never do);
         released code can give the pack step a number of heads of its own, hides slots past a row's number
         of tokens by default (here `dynamic_projection`), has frequencies 10000^(-2i / (d_model - 2)) for P
         (here -2i / d_model), and leaves P without scale and positions where those of the tokens are
         learned (here `sinusoidal=False`, whatever the tokens have)
"""
# b batch, h heads, l length, m queries, n keys, p slots, d head dim

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Block, Place, Traits, at_least_fp32, full_precision, masked_softmax, register
from models.layers import FeedForward, make_norm


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
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (x_q, x_kv, x_kv if values is None else values))
    q, k = at_least_fp32(q, k)
    with full_precision(q):
        scores = torch.einsum("bmhd,bnhd->bhmn", q * q.shape[-1] ** -0.5, k)
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :]).to(v.dtype)
    return torch.einsum("bhmn,bnhd->bmhd", F.dropout(weights, dropout), v).flatten(2)


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

    traits = Traits()

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
        self.dropout, self.attn_dropout = nn.Dropout(dropout), nn.Dropout(attn_dropout)
        first = place.layer_index == 0  # later layers get P as their carry
        self.slots = nn.Parameter(torch.randn(proj_len, width) * width**-0.5) if first else None
        positions = sinusoids(proj_len, width) if first and sinusoidal else None
        self.register_buffer("slot_positions", positions, persistent=False)

    def init_carry(self, batch_size: int) -> Tensor | None:
        """The learned P, [b p d_model], in the first layer; None in the others."""
        if self.slots is None:
            return None
        slots = self.slots
        if self.slot_positions is not None:
            slots = slots * math.sqrt(self.place.d_model) + self.slot_positions
        return self.dropout(slots.expand(batch_size, -1, -1))

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        slots = self.init_carry(x.shape[0]) if carry is None else carry
        if slots is None:
            raise ValueError(
                f"luna layer {self.place.layer_index} needs the carry of the layer before it, got None"
            )
        if self.prenorm:
            mixed, packed = self.mix(self.norm_x(x, mask), self.norm_p(slots), mask)
            x, slots = x + self.dropout(mixed), slots + self.dropout(packed)
            x = x + self.dropout(self.ff(self.norm_ff(x, mask)))
        else:
            mixed, packed = self.mix(x, slots, mask)
            x, slots = self.norm_x(x + self.dropout(mixed), mask), self.norm_p(slots + self.dropout(packed))
            x = self.norm_ff(x + self.dropout(self.ff(x)), mask)
        return x, None if self.is_last else slots

    def mix(self, x: Tensor, slots: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(Y_X [b l d_model], Y_P [b p d_model]) of X and P."""
        packed = self.pack_out(self.attend(self.pack_q(slots), self.pack_kv(x), mask))
        used = None
        if self.dynamic_projection:
            count = mask.sum(dim=-1) if mask is not None else torch.full((1,), x.shape[1], device=x.device)
            used = torch.arange(self.proj_len, device=x.device) < count[:, None]  # [b p]
        return self.out(self.attend(self.unpack_q(x), self.unpack_kv(packed), used)), packed

    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (kv, None) if self.tie_kv else kv.chunk(2, dim=-1)
        dropout = self.attn_dropout.p if self.training else 0.0
        return luna_attention(q, k, mask, num_heads=self.place.num_heads, values=v, dropout=dropout)

    def state_size(self, length: int) -> int:
        return (1 if self.tie_kv else 2) * self.proj_len * self.place.num_heads * self.place.head_dim
