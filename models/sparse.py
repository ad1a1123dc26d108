"""Sparse Transformer: softmax over a near and a far set of keys that together reach every token in two steps.

Paper    Child et al. 2019, arXiv 1904.10509, section 4; the variant of Tay et al. 2021, arXiv 2011.04006
Computes out_i = sum_{j in near(i) + far(i)} softmax_j(q_i . k_j / sqrt(d)) v_j, s = stride, c = num_summary
         strided     near  |i - j| <= s          far  (i - j) mod s = 0
         fixed       near  i // s = j // s       far  j mod s >= s - c
         causal      both only for j <= i
         split       none: the union; heads: first half near (one alone too), the rest far; layers: in turns
Cost     strided: time and memory O(L (s + L / s)) per head; fixed: O(L (s + c L / s))
Exact    if stride >= length; fixed also if num_summary = stride (split=none, causal=False)
Padding  padded keys get weight zero; a query without any key, as fixed far causal ones before the first
         summary, gives zeros
Differs  causal only if asked (paper: always); of the paper's three ways to join the sets, one softmax over
         both is the default. Not in the paper, but in the released benchmark: num_global first tokens see
         and are seen by all, and the pattern starts after them; first_column adds j mod s = 0 to far keys.
         Its row is pattern=fixed stride=50 num_summary=10 causal=True first_column=True, and num_global=1
         where it pools by [CLS]
"""
# b batch, h heads, l length, d head dim, n blocks of stride tokens, c tokens of a block, m keys a block sees

from functools import partial

import torch
from torch import Tensor, nn

from models.blocks import (
    Part,
    block_attention,
    in_blocks,
    label_blocks,
    label_windows,
    offsets,
    real_keys,
    windows,
)
from models.common import Mixer, Place, Traits, register

PATTERNS = ("strided", "fixed")
SPLITS = ("none", "heads", "layers")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    stride: int,
    pattern: str = "strided",
    num_summary: int = 32,
    causal: bool = False,
    sets: str = "both",
    num_global: int = 0,
    first_column: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token, sets: near, far or both -> [b h l d]."""
    real, g, parts = real_keys(mask, k), num_global, []
    if g:
        everything = Part(k, v, "md", real[:, None, None, None])
        first = block_attention(q[:, :, None, :g], [everything], dropout=dropout)[:, :, 0]
        if q.shape[-2] <= g:
            return first
        parts.append(Part(k[:, :, :g], v[:, :, :g], "md", real[:, None, None, None, :g]))
        q, k, v, real = q[:, :, g:], k[:, :, g:], v[:, :, g:], real[:, g:]
    length, once = q.shape[-2], sets == "both"
    if pattern == "strided":
        near, far = partial(band, causal=causal), partial(columns, causal=causal, once=once)
    else:
        summary = {"num_summary": num_summary, "first_column": first_column}
        near, far = partial(own_block, causal=causal), partial(summaries, causal=causal, once=once, **summary)
    parts += [
        part(k, v, real, stride) for part, name in ((near, "near"), (far, "far")) if sets in (name, "both")
    ]
    mixed = block_attention(in_blocks(q, min(stride, length)), parts, dropout=dropout)
    mixed = mixed.flatten(2, 3)[:, :, :length]
    return torch.cat([first, mixed], dim=2) if g else mixed


def band(k: Tensor, v: Tensor, real: Tensor, stride: int, *, causal: bool) -> Part:
    """|i - j| <= stride."""
    before = stride if k.shape[-2] > stride else 0
    cut = (min(stride, k.shape[-2]), before, 0 if causal else before)
    offset = offsets(*cut, k.device)
    near = (offset <= 0) & (offset >= -stride) if causal else offset.abs() <= stride  # [c m]
    seen = label_windows(real, *cut)[:, None, :, None] & near  # [b 1 n c m]
    return Part(windows(k, *cut), windows(v, *cut), "nmd", seen)


def columns(k: Tensor, v: Tensor, real: Tensor, stride: int, *, causal: bool, once: bool) -> Part:
    """The same place of every block; `once` leaves out what `band` has, this block and those beside it."""
    k, v, real = cut_in_blocks(k, v, real, stride)
    block = torch.arange(real.shape[1], device=k.device)
    apart = block[:, None] - block  # [n m]
    far = (apart if causal else apart.abs()) > (1 if once else -1)
    return Part(k, v, "mcd", real.mT[:, None, None] & far[:, None])


def own_block(k: Tensor, v: Tensor, real: Tensor, stride: int, *, causal: bool) -> Part:
    """i // stride = j // stride."""
    k, v, real = cut_in_blocks(k, v, real, stride)
    seen = real[:, None, :, None]  # [b 1 n 1 m]
    if causal:
        seen = seen & (offsets(k.shape[3], 0, 0, k.device) <= 0)
    return Part(k, v, "nmd", seen)


def summaries(
    k: Tensor,
    v: Tensor,
    real: Tensor,
    stride: int,
    *,
    num_summary: int,
    first_column: bool,
    causal: bool,
    once: bool,
) -> Part:
    """The last places of every block; `once` leaves out those of the query's own, which `own_block` has."""
    size = min(stride, k.shape[-2])  # of blocks of queries; those of keys are never cut
    k, v, real = in_blocks(k, stride), in_blocks(v, stride), label_blocks(real, stride)
    start, key = stride - num_summary, torch.arange(real[0].numel(), device=k.device).view_as(real[0])

    def taken(x: Tensor) -> Tensor:  # [... n c d] -> [... m d]
        last = x[..., start:, :]
        return (torch.cat([x[..., :1, :], last], -2) if first_column and start else last).flatten(-3, -2)

    real, key = taken(real[..., None])[..., 0], taken(key[..., None])[..., 0]  # [b m], [m]
    query = torch.arange(k.shape[2] * size, device=k.device).view(-1, size, 1)  # [n c 1]
    seen = real[:, None, None, None]
    if once:
        block, query_block = key // stride, query[:, :1] // size
        seen = seen & (block < query_block if causal else block != query_block)  # [b 1 n 1 m]
    elif causal:
        seen = seen & (key <= query)
    return Part(taken(k), taken(v), "md", seen)


def cut_in_blocks(k: Tensor, v: Tensor, real: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [b h n c d], mask [b n c]; one block as long as the sequence if that is the shorter."""
    size = min(stride, k.shape[-2])
    return in_blocks(k, size), in_blocks(v, size), label_blocks(real, size)


@register("sparse")
class Sparse(Mixer):
    """Projections and dropout around `sparse_attention`."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        pattern: str = "strided",
        stride: int = 128,
        num_summary: int = 32,
        causal: bool = False,
        split: str = "none",
        num_global: int = 0,
        first_column: bool = False,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        for name, given, allowed in (("pattern", pattern, PATTERNS), ("split", split, SPLITS)):
            if given not in allowed:
                raise ValueError(f"unknown {name} '{given}' for sparse; choose from: {', '.join(allowed)}")
        if stride < 1 or num_global < 0 or (pattern == "fixed" and not 1 <= num_summary <= stride):
            raise ValueError(
                "sparse needs stride >= 1, num_global >= 0 and, for fixed, 1 <= num_summary <= stride; "
                f"got stride={stride}, num_global={num_global}, num_summary={num_summary}"
            )
        if first_column and pattern != "fixed":
            raise ValueError(
                f"first_column is about summaries, which pattern={pattern} has not; use pattern=fixed"
            )
        if pattern == "strided" and num_summary != 32:
            raise ValueError(
                f"num_summary={num_summary} is about summaries, which pattern=strided has not; leave it at "
                "32 or use pattern=fixed"
            )
        if first_column and num_summary == stride:
            raise ValueError(
                f"first_column adds nothing where all of a block is its summary, num_summary=stride={stride}"
            )
        self.split = split
        self.sets = ("near", "far")[place.layer_index % 2] if split == "layers" else "both"
        self.options = {"pattern": pattern, "stride": stride, "num_summary": num_summary, "causal": causal}
        self.options |= {"num_global": num_global, "first_column": first_column}
        self.attn_dropout = nn.Dropout(attn_dropout)
        if pattern == "fixed" and self.sets != "near":
            reason = "every query sees num_summary tokens of each block, L num_summary / stride of them"
            self.traits = self.traits.but(reason, quadratic_memory=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options = {**self.options, "dropout": self.attn_dropout.p if self.training else 0.0}
        if self.split != "heads":
            return sparse_attention(q, k, v, mask, sets=self.sets, **options)
        half = (self.place.num_heads + 1) // 2
        near, far = zip(*((x[:, :half], x[:, half:]) for x in (q, k, v)), strict=True)
        parts = [sparse_attention(*near, mask, sets="near", **options)]
        if half < self.place.num_heads:
            parts.append(sparse_attention(*far, mask, sets="far", **options))
        return torch.cat(parts, dim=1)

    def state_size(self, length: int) -> int:
        stride, num_blocks = self.options["stride"], length // self.options["stride"]
        if self.options["pattern"] == "strided":
            seen = (1 if self.options["causal"] else 2) * stride + 1 + num_blocks
        else:
            seen = stride + num_blocks * self.options["num_summary"]
        seen = min(seen + self.options["num_global"], length)
        return 2 * seen * self.place.num_heads * self.place.head_dim
