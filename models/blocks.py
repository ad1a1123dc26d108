"""Attention of blocks of queries to the keys that their pattern lists, with one softmax over all of them.

What local, sparse, longformer and bigbird share. On a GPU, FlexAttention with the same predicates may be
faster where it compiles; this form runs everywhere and holds no scores but those of the pattern's blocks.
"""
# b batch, h heads, l length, d head dim, n blocks, c tokens of a block, m keys that a block sees

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_fp32


@dataclass(frozen=True)
class Part:
    """Some of the keys that blocks of queries [b h n c d] see.

    k, v: [b h *axes]. The axes say which block sees what: "nmd", each its own m keys; "md", all blocks
    the same m keys; "mcd", m keys for every place c of a block, alike in all blocks.
    seen: bool, broadcastable to [b h n c m], False for padding and for whatever the pattern leaves out.
    """

    k: Tensor
    v: Tensor
    axes: str
    seen: Tensor


def block_attention(q: Tensor, parts: Sequence[Part], *, dropout: float = 0.0) -> Tensor:
    """Softmax over the seen keys of all parts: q [b h n c d] -> [b h n c d], zeros where none is seen.

    A key that stands in two parts counts twice, so `seen` of one of them must leave it out.
    """
    q, scores = q * q.shape[-1] ** -0.5, []
    for part in parts:
        (score,) = at_least_fp32(torch.einsum(f"bhncd,bh{part.axes}->bhncm", q, part.k))
        scores.append(score.masked_fill(~part.seen, torch.finfo(score.dtype).min))  # its gradient is zero too
        del score
    weights, total = unnormalised(scores)
    shares = [
        torch.einsum(f"bhncm,bh{part.axes}->bhncd", F.dropout(weight.to(q.dtype), dropout), part.v)
        for weight, part in zip(weights, parts, strict=True)
    ]
    mixed = reduce(torch.add, shares)
    if total is not None:
        mixed = (mixed / total).to(mixed.dtype)
    some = reduce(torch.logical_or, [part.seen.any(dim=-1, keepdim=True) for part in parts])
    return mixed * some  # without a key the weights are level, not zero


def unnormalised(scores: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Weights of the keys of each part, and what they sum to, None for 1; empties `scores` as it goes.

    Joining the scores of several parts for one softmax would need more memory than to divide afterwards.
    """
    if len(scores) == 1:
        return [scores.pop().softmax(dim=-1)], None
    top = reduce(torch.maximum, [score.detach().amax(dim=-1, keepdim=True) for score in scores])
    weights = [(scores.pop(0) - top).exp_() for _ in range(len(scores))]
    return weights, reduce(torch.add, [weight.sum(dim=-1, keepdim=True) for weight in weights])


def in_blocks(x: Tensor, size: int) -> Tensor:
    """[... l d] -> [... n c d]: blocks are cut from the start, the last one is filled with zeros."""
    fill = -x.shape[-2] % size
    x = F.pad(
        x.contiguous(), (0, 0, 0, fill)
    )  # padding by nothing keeps strides, padding by something does not
    return x.unflatten(-2, (-1, size))


def windows(x: Tensor, size: int, before: int, after: int) -> Tensor:
    """[... l d] -> [... n m d]: each block and so many positions on either side, zeros past the ends."""
    fill = -x.shape[-2] % size
    x = F.pad(x.contiguous(), (0, 0, before, fill + after))
    return x.unfold(-2, before + size + after, size).mT.contiguous()


def label_blocks(labels: Tensor, size: int) -> Tensor:
    """`in_blocks` of one number or bool a token: [... l] -> [... n c]."""
    return in_blocks(labels.unsqueeze(-1), size).squeeze(-1)


def label_windows(labels: Tensor, size: int, before: int, after: int) -> Tensor:
    """`windows` of one number or bool a token: [... l] -> [... n m]."""
    return windows(labels.unsqueeze(-1), size, before, after).squeeze(-1)


def offsets(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """[c m]: how far after its query each key of a window stands."""
    query, key = (torch.arange(n, device=device) for n in (size, before + size + after))
    return key - before - query[:, None]


def real_keys(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask [b l], or [1 l] of True for keys [b h l d] that are all real."""
    if mask is not None:
        return mask
    return torch.ones(1, like.shape[-2], dtype=torch.bool, device=like.device)
