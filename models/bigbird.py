"""BigBird: a window of blocks, two global blocks, and random blocks.

Paper    Zaheer et al. 2020, arXiv 2007.14062, section 2 (internal transformer construction)
Computes out_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(d)) v_j   with   N(i) whole blocks of block_size:
         that of i and its two neighbours, the first, the last, and num_random others, drawn for each head and
         block of queries; queries of the first and the last block see all
Cost     time and memory O(L B (5 + R)) per head, B = block_size, R = num_random
Exact    if the sequence has at most 4 + num_random blocks
Padding  padded keys get weight zero; the last block is that of a row's last real token, and random blocks lie
         before it; a row without real tokens gives zeros
Differs  blocks of a row, not of its padded length, so that padding changes nothing; a block counts once, and
         a short row is treated as a long one (released codes: other patterns or all keys). Random blocks are
         drawn evenly from those that are neither near nor global, as a function of seed, layer, head, block
         and row length. Of the released benchmark, as options: random_within=1024 keeps them within the first
         tokens (where it leaves out up to four more for the two blocks before the last); append_zeros=True
         adds 1 to block_size zero inputs at the end, real keys for all, so that a length of whole blocks gets
         one more, which is then the last. It has no dropout of attention weights
"""
# b batch, h heads, l length, d head dim, n blocks, c tokens of a block, m keys a block sees, r random blocks

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import Part, block_attention, in_blocks, label_blocks, label_windows, real_keys, windows
from models.common import Mixer, Place, Traits, register

DRAW_BITS = 31


def random_blocks(draws: Tensor, num_blocks: Tensor, within: int | None = None) -> tuple[Tensor, Tensor]:
    """For each block of queries r different blocks, neither first nor last of the row nor within one block.

    draws: [h n r] int64 below 2 ** DRAW_BITS, num_blocks: [b] -> [b h n r] and whether there were that many.
    `within` keeps them among so many first blocks. Subsets are equally likely (Floyd's algorithm).
    """
    block, num_random = torch.arange(draws.shape[1], device=draws.device), draws.shape[2]
    top = num_blocks.view(-1, 1, 1) - 2  # [b 1 1] the last one to choose
    if within is not None:
        top = top.clamp(max=within - 1)
    near = (block - 1).clamp(min=1)  # [n] the first one not to choose
    num_near = (torch.minimum(block + 1, top) - near + 1).clamp(min=0)  # [b 1 n]
    count = top.clamp(min=0) - num_near
    picks: list[Tensor] = []
    for i in range(num_random):
        end = count - num_random + i
        pick = draws[..., i] * (end + 1) >> DRAW_BITS  # [b h n] from 0 to end
        taken = [pick == earlier for earlier in picks]
        picks.append(torch.where(torch.stack(taken).any(dim=0), end, pick) if taken else pick)
    table = torch.stack(picks, dim=-1) + 1
    table = table + (table >= near[:, None]) * num_near.unsqueeze(-1)
    found = torch.arange(num_random, device=draws.device) >= num_random - count.unsqueeze(-1)  # [b 1 n r]
    return table.clamp(0, draws.shape[1] - 1), found.expand_as(table)


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    block_size: int,
    draws: Tensor,
    random_within: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real; draws as in `random_blocks`, n >= l / block_size
    -> [b h l d].
    """
    length, real = q.shape[-2], real_keys(mask, k)
    if length > block_size * draws.shape[1]:
        raise ValueError(
            f"bigbird was built for {draws.shape[1]} blocks of {block_size} positions and got {length}; "
            "raise max_len or shorten the input"
        )
    size = min(block_size, length)
    everything = Part(k, v, "md", real[:, None, None, None])
    cut = (size, size, size) if length > size else (size, 0, 0)
    near = Part(windows(k, *cut), windows(v, *cut), "nmd", label_windows(real, *cut)[:, None, :, None])
    stop = (real * torch.arange(1, length + 1, device=q.device)).amax(dim=-1)  # [b] after the last real token
    num_blocks = (stop + size - 1) // size
    last = (num_blocks - 1).clamp(min=0)

    q, k, v, real = in_blocks(q, size), in_blocks(k, size), in_blocks(v, size), label_blocks(real, size)
    block = torch.arange(q.shape[2], device=q.device)
    parts = [near, end_blocks(k, v, real, last)]
    if draws.shape[2]:
        within = random_within // block_size if random_within else None
        table, found = random_blocks(draws[:, : q.shape[2]], num_blocks, within)
        parts.append(listed_blocks(k, v, real, table, found))
    mixed = block_attention(q, parts, dropout=dropout)
    ends = torch.stack([q[:, :, 0], block_at(q, last)], dim=2)
    ends = block_attention(ends, [everything], dropout=dropout)  # [b h 2 c d]
    is_last = (block == last[:, None])[:, None, :, None, None]
    mixed = torch.where(is_last, ends[:, :, 1:], mixed)
    mixed = torch.where((block == 0)[:, None, None], ends[:, :, :1], mixed)
    return mixed.flatten(2, 3)[:, :, :length]


def block_at(x: Tensor, which: Tensor) -> Tensor:
    """One block of each row: x [b h n c d], which [b] or [1] -> [b h c d]."""
    index = which.view(-1, 1, 1, 1, 1).expand(x.shape[0], x.shape[1], 1, *x.shape[3:])
    return x.gather(2, index).squeeze(2)


def end_blocks(k: Tensor, v: Tensor, real: Tensor, last: Tensor) -> Part:
    """The first and the last block of each row, where a window does not have them."""
    block = torch.arange(k.shape[2], device=k.device)
    real_last = block_at(real[:, None, ..., None], last)[..., 0]  # [b 1 c]
    seen = [(block > 1)[:, None] & real[:, :1], (block < last[:, None] - 1)[..., None] & real_last]  # [b n c]
    k, v = (torch.cat([x[:, :, 0], block_at(x, last)], dim=2) for x in (k, v))
    return Part(k, v, "md", torch.cat(seen, dim=-1)[:, None, :, None])


def listed_blocks(k: Tensor, v: Tensor, real: Tensor, table: Tensor, found: Tensor) -> Part:
    """The blocks of a table [b h n r], or [1 h n r] of all rows, where they were found."""
    b, h, n = k.shape[:3]
    index = torch.arange(b * h, device=k.device).view(b, h, 1, 1) * n + table
    k, v = (x.flatten(0, 2).index_select(0, index.flatten()).view(b, h, n, -1, x.shape[-1]) for x in (k, v))
    index = torch.arange(real.shape[0], device=k.device).view(-1, 1, 1, 1) * n + table
    real = real.flatten(0, 1).index_select(0, index.flatten()).view(*table.shape, -1)  # [b h n r c]
    return Part(k, v, "nmd", (real & found[..., None]).flatten(-2)[:, :, :, None])


@register("bigbird")
class BigBird(Mixer):
    """Projections and dropout around `bigbird_attention`; the draws are a function of seed and layer."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        block_size: int = 64,
        num_random: int = 3,
        random_within: int = 0,
        append_zeros: bool = False,
        block_seed: int = 0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if block_size < 1 or num_random < 0 or (random_within and random_within < 2 * block_size):
            raise ValueError(
                "bigbird needs block_size >= 1, num_random >= 0, random_within 0 (anywhere) or two blocks; "
                f"got block_size={block_size}, num_random={num_random}, random_within={random_within}"
            )
        if random_within % block_size:
            raise ValueError(
                f"bigbird draws whole blocks: random_within={random_within} is no multiple of "
                f"block_size={block_size}"
            )
        if not num_random and (random_within or block_seed):
            raise ValueError(
                "bigbird with num_random=0 draws no blocks; leave random_within=0 and block_seed=0, got "
                f"random_within={random_within}, block_seed={block_seed}"
            )
        self.block_size, self.num_random = block_size, num_random
        self.random_within, self.append_zeros = random_within, append_zeros
        self.attn_dropout = nn.Dropout(attn_dropout)
        generator = torch.Generator().manual_seed((block_seed * 1_000_003 + place.layer_index) % 2**63)
        num_blocks = -(-(place.max_len + append_zeros) // block_size)
        shape = (num_blocks, place.num_heads, num_random)
        draws = torch.randint(2**DRAW_BITS, shape, generator=generator).transpose(0, 1)
        self.register_buffer("draws", draws.contiguous(), persistent=False)
        if append_zeros:
            reason = "append_zeros=True: the last block is that of the padded length, and real for every row"
            self.traits = self.traits.but(reason, length_invariant=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.append_zeros:
            return super().forward(x, mask)
        fill = self.block_size - x.shape[1] % self.block_size
        mask = None if mask is None else F.pad(mask, (0, fill), value=True)
        return super().forward(F.pad(x, (0, 0, 0, fill)), mask)[:, : x.shape[1]]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options = {"block_size": self.block_size, "draws": self.draws, "random_within": self.random_within}
        dropout = self.attn_dropout.p if self.training else 0.0
        return bigbird_attention(q, k, v, mask, **options, dropout=dropout)

    def state_size(self, length: int) -> int:
        seen = (5 + self.num_random) * self.block_size
        return 2 * min(seen, length) * self.place.num_heads * self.place.head_dim
