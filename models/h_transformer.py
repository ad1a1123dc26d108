"""H-Transformer-1D: exact attention to near blocks, attention between averages to far ones.

Paper    Zhu and Soricut 2021, arXiv 2107.11906, section 6
Computes out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = exp(q~_i . k~_j / sqrt(d)),  where q~_i and k~_j are the
         means of 2^m tokens that hold i and j, and m is the lowest level at which i and j lie in the same or
         in adjacent blocks of block_size averages
Cost     time and memory O(L block_size D) per head
Exact    if length <= 2 * block_size, or if tokens are alike within each mean
Padding  means are over real tokens, and a mean counts as many times as it has real tokens
Differs  padding is left out after the projections (authors' code: zeroed before them, so that their biases
         stay in the values of padding); no relative position bias (authors' code: on by default)
"""
# b batch, h heads, l length, n blocks, c block_size, d head dim, 3c own block with both neighbours

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register

Sums = tuple[Tensor, Tensor, Tensor]  # sum of e^(s - m) v [b h l d], of e^(s - m) [b h l 1], and m [b h l 1]


def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    block_size: int,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token, block_size even -> [b h l d]."""
    dtype, length = v.dtype, v.shape[-2]
    num_blocks = -(-length // block_size)
    num_levels = max(0, (num_blocks - 1).bit_length() - 1)  # above the tokens; the last has two blocks
    fill = -length % (block_size << num_levels)
    q, k, v = at_least_fp32(q * q.shape[-1] ** -0.5, k, v)
    count = v.new_ones(1, length) if mask is None else mask.to(v.dtype)
    q, k, v = (F.pad(x * count[:, None, :, None], (0, 0, 0, fill)) for x in (q, k, v))
    count = F.pad(count, (0, fill))
    with full_precision(v):
        levels = [near_sums(q, k, v, count, block_size=block_size, dropout=dropout)]
        for _ in range(num_levels):
            (q, _), (k, _), (v, count) = (pair_means(x, count) for x in (q, k, v))
            levels.append(near_sums(q, k, v, count, block_size=block_size, dropout=dropout, coarse=True))
        sums = levels.pop()
        while levels:
            sums = added(levels.pop(), tuple(doubled(x) for x in sums))
        mixed, norm, _ = sums
        return (mixed / norm.clamp_min(0.5))[..., :length, :].to(dtype)  # below 1 without a real key alone


def pair_means(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Means of two neighbours by their counts. x: [b h l d], count: [b l] -> ([b h l/2 d], [b l/2])."""
    pairs = count.unflatten(-1, (-1, 2))
    total = pairs.sum(dim=-1)
    share = pairs / total.clamp_min(1).unsqueeze(-1)
    return (x.unflatten(-2, (-1, 2)) * share[:, None, :, :, None]).sum(dim=-2), total


def near_sums(
    q: Tensor, k: Tensor, v: Tensor, count: Tensor, *, block_size: int, dropout: float, coarse: bool = False
) -> Sums:
    """Sums over the keys of the own and the adjacent blocks, each key as often as `count` [b l] says.

    `coarse` leaves out the pairs that the level below has: those in the same or in adjacent half blocks.
    """
    c, lowest = block_size, torch.finfo(count.dtype).min
    log_count = F.pad(count.log().clamp_min(lowest), (c, c), value=lowest).unfold(-1, 3 * c, c)  # [b n 3c]
    bias = log_count[:, None, :, None, :]
    if coarse:
        query, key = (torch.arange(n, device=q.device) // (c // 2) for n in (c, 3 * c))
        bias = bias.masked_fill((query[:, None] + 2 - key).abs() < 2, lowest)
    q = q.unflatten(-2, (-1, c))
    k, v = (F.pad(x, (0, 0, c, c)).unfold(-2, 3 * c, c) for x in (k, v))  # [b h n d 3c]
    scores = torch.einsum("bhncd,bhndm->bhncm", q, k) + bias
    largest = scores.detach().amax(dim=-1, keepdim=True).clamp_min(lowest / 2)
    weights = (scores - largest).exp()
    mixed = torch.einsum("bhncm,bhndm->bhncd", F.dropout(weights, dropout), v)
    return tuple(x.flatten(2, 3) for x in (mixed, weights.sum(dim=-1, keepdim=True), largest))


def doubled(x: Tensor) -> Tensor:
    """Each row twice: [b h l d] -> [b h 2l d]."""
    return x.unsqueeze(-2).expand(-1, -1, -1, 2, -1).flatten(2, 3)


def added(one: Sums, other: Sums) -> Sums:
    """Sums over the keys of both."""
    largest = torch.maximum(one[2], other[2])
    a, b = (one[2] - largest).exp(), (other[2] - largest).exp()
    return one[0] * a + other[0] * b, one[1] * a + other[1] * b, largest


@register("h_transformer")
class HTransformer(Mixer):
    """Projections and dropout around `hierarchical_attention`."""

    traits = Traits(uses_order=True)

    def __init__(self, place: Place, *, block_size: int = 16, attn_dropout: float = 0.0) -> None:
        super().__init__(place)
        if block_size < 2 or block_size % 2:
            raise ValueError(f"h_transformer needs an even block_size >= 2, got {block_size}")
        self.block_size = block_size
        self.attn_dropout = nn.Dropout(attn_dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.attn_dropout.p if self.training else 0.0
        return hierarchical_attention(q, k, v, mask, block_size=self.block_size, dropout=dropout)

    def state_size(self, length: int) -> int:
        kept, size = 0, length
        while size > 0:
            kept, size = kept + size, size // 2 if size > 2 * self.block_size else 0
        return 2 * kept * self.place.num_heads * self.place.head_dim
