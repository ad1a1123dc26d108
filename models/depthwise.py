"""Depthwise convolution along the length with one filter a head, as products of matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

# b batch, h heads, l length, d channels of a head, t taps, n blocks, i rows of a block, w rows that it reads

BLOCK = 64


def conv_along(v: Tensor, taps: Tensor) -> Tensor:
    """out_i = sum_t taps_t v_(i + t - centre), zeros beyond both ends: v [b h l d], taps [h t], t odd -> v's.

    Each block of rows is a band matrix of taps times the rows around it, the same one for all blocks of a
    head.
    """
    length, num_taps = v.shape[-2], taps.shape[-1]
    block = max(BLOCK, num_taps - 1)  # so that a block reads itself and a part of the next
    num_blocks = -(-length // block)
    before = num_taps // 2
    v = F.pad(v, (0, 0, before, (num_blocks + 1) * block - length - before))
    v = v.unflatten(-2, (num_blocks + 1, block)).transpose(-3, -2)  # [b h i n+1 d]
    read = torch.cat([v[..., :-1, :], v[..., : num_taps - 1, 1:, :]], dim=-3)  # [b h w n d]
    out = band(taps, block) @ read.flatten(-2)  # [b h i nd]
    out = out.unflatten(-1, (num_blocks, -1)).transpose(-3, -2).flatten(-3, -2)
    return out[..., :length, :]


def band(taps: Tensor, rows: int) -> Tensor:
    """Matrices whose row i holds the taps from column i on: taps [h t] -> [h rows rows+t-1]."""
    width = rows + taps.shape[-1] - 1
    apart = F.pad(taps.unsqueeze(-2).expand(-1, rows, -1), (0, rows)).flatten(1)  # starts width + 1 apart
    return apart[:, : rows * width].unflatten(-1, (rows, width))
