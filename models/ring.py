"""Ring attention: softmax attention computed by the schedule of a ring of units, block by block.

Paper    Yu and Fujita 2020, arXiv 2012.01114 (schedules); Milakov and Gimelshein 2018, arXiv 1805.02867 (the
         running softmax that joins blocks)
Computes out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j, as dense softmax attention does, by block products
         that models/schedules.py orders: keys and values go round num_units units, each of which joins to its
         queries what visits it; with tie_qk, k = q, and each product of two blocks serves both
Cost     time O(L^2 D), with tie_qk nearly 3/4 of it; memory O(L D) per head, and for the scores of one step
         num_units (L / num_blocks)^2, which is O(L) for num_blocks=0
Exact    yes
Padding  padded keys get weight zero; a row without real keys gives zeros. Products with a block that is all
         padding in a row are not made for this row, and its queries give zeros; except while a CUDA graph is
         captured and the mask cannot be read: there they are made, and its keys weigh nothing. Blocks past
         the length are never in a product
Differs  the units are a batch dimension of one device. It makes the products of a schedule round by round, as
         scheduled, but its visitors move on between rounds, all at once, where a schedule sends one a step
"""
# b batch, h heads, l length, t packed tokens, d head dim, e head dim (values)

import torch
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, full_precision, register
from models.packed import pad_packed, unpad_packed
from models.ring_operator import ring_forward
from models.schedules import check_sizes


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    num_units: int = 4,
    num_blocks: int = 0,
    tie_qk: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real token -> [b h l e].

    `num_blocks` 0 chooses a number for which the scores of one step grow as the length does. With `tie_qk`
    the queries are the keys: `k` is not read.
    """
    check_sizes(num_blocks or num_units, num_units)
    if not 0 <= dropout <= 1:
        raise ValueError(f"ring needs 0 <= dropout <= 1, got {dropout}")
    seed = torch.randint(2**31, (1,), device=q.device) if dropout else None
    with full_precision(v):
        out, *_ = ring_forward(q, None if tie_qk else k, v, mask, seed, num_units, num_blocks, dropout)
    # A block of padding is skipped or not, by what the host may read; either way its queries give zeros.
    return out if mask is None else out * mask[:, None, :, None]


class TiedProjection(nn.Linear):
    """Queries, keys and values of which queries and keys are one: [... d_model] -> [... 3 h*d]."""

    def forward(self, x: Tensor) -> Tensor:
        shared, values = super().forward(x).chunk(2, dim=-1)
        return torch.cat([shared, shared, values], dim=-1)


@register("ring")
class Ring(Mixer):
    """Projections around `ring_attention`; `num_blocks` 0 has it choose, so that memory is linear."""

    traits = Traits(packed=True)

    def __init__(
        self,
        place: Place,
        *,
        num_units: int = 4,
        num_blocks: int = 0,
        tie_qk: bool = False,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        check_sizes(num_blocks or num_units, num_units)
        self.num_units, self.num_blocks, self.tie_qk = num_units, num_blocks, tie_qk
        self.attn_dropout = nn.Dropout(attn_dropout)
        if tie_qk:
            self.qkv = TiedProjection(place.d_model, 2 * place.num_heads * place.head_dim, bias=place.bias)
        if num_blocks:
            reason = "the scores of one step have (length / num_blocks)^2 entries a unit"
            self.traits = self.traits.but(reason, quadratic_memory=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            mask,
            num_units=self.num_units,
            num_blocks=self.num_blocks,
            tie_qk=self.tie_qk,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        padded = [pad_packed(x, cu_seqlens, max_len) for x in (q, k, v)]
        mixed = self.attend(*(x.transpose(1, 2) for x, _ in padded), padded[0][1])
        return unpad_packed(mixed.transpose(1, 2), cu_seqlens, q.shape[0])

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
