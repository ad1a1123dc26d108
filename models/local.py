"""Local attention: softmax among nearby tokens.

Paper    Parmar et al. 2018, arXiv 1802.05751 (blocks); Beltagy et al. 2020, arXiv 2004.05150 (sliding);
         Tay et al. 2021, arXiv 2011.04006 (released: the code of the Long Range Arena baseline)
Computes out_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(d)) v_j   with   N(i) by pattern, w = window:
         sliding     |i - j| <= w // 2
         block       i // w = j // w
         neighbours  |i // w - j // w| <= 1
         released    i mod n = j mod n, where n blocks of w hold the padded length and at least one zero input
Cost     time and memory O(L w) per head
Exact    if window >= 2 * length (sliding) or window >= length (block, neighbours)
Padding  padded keys, and those added to fill the last block, get weight zero; a row without real ones: 0.
         released: place p of block b is token p n + b, but has the mask of token b w + p, True past the
         length; a query that may see nothing takes the mean of its block
Differs  no; released leaves out that dropout was shared by batch, heads and blocks
"""
# b batch, h heads, l length, t packed tokens, d head dim, n blocks, c tokens of a block, m keys a block sees

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import Part, block_attention, in_blocks, label_blocks, label_windows, offsets, windows
from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.packed import Chunks

PATTERNS = ("sliding", "block", "neighbours", "released")
NOBODY = 0  # the group of padding: it attends to nothing and nothing attends to it


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    pattern: str = "sliding",
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token -> [b h l d]; any pattern but released."""
    if mask is None:
        group = torch.ones(1, q.shape[-2], dtype=torch.long, device=q.device)
    else:
        group = mask.long()
    options = {"window": window, "pattern": pattern, "dropout": dropout}
    return grouped_attention(q, k, v, group, longest=q.shape[-2], **options)


def local_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    window: int,
    pattern: str = "sliding",
    dropout: float = 0.0,
) -> Tensor:
    """`local_attention` within each packed sequence, blocks from its start. q, k, v: [t h d] -> [t h d]."""
    size = min(window, max_len)
    chunks = Chunks.of(cu_seqlens, q.shape[0], size=size)
    group = torch.where(chunks.inside, chunks.owner[:, None] + 1, NOBODY).flatten()[None]
    q, k, v = (chunks.lay_out(x).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))  # [1 h nc d]
    options = {"window": window, "pattern": pattern, "dropout": dropout}
    mixed = grouped_attention(q, k, v, group, longest=max_len, **options)
    return chunks.take_back(mixed[0].transpose(0, 1).unflatten(0, (-1, size)))


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    *,
    longest: int,
    window: int,
    pattern: str,
    dropout: float = 0.0,
) -> Tensor:
    """Attention to the near keys of the same group, block of queries by block of queries.

    q, k, v: [b h l d], group: [b l] or [1 l] int, `NOBODY` for padding -> [b h l d]. `longest` is the length
    of the longest group; if a window holds it, blocks are cut to it and need no keys of other blocks.
    """
    length, size = q.shape[-2], min(window, longest)
    reach = {"sliding": window // 2, "block": 0, "neighbours": window}[pattern] if longest > window else 0
    cut = (size, reach, reach)
    q_group, k_group = label_blocks(group, size), label_windows(group, *cut)  # [b n c], [b n m]
    seen = (q_group[..., :, None] == k_group[..., None, :]) & (k_group != NOBODY)[..., None, :]  # [b n c m]
    if pattern == "sliding":
        seen = seen & (offsets(*cut, q.device).abs() <= window // 2)
    near = Part(windows(k, *cut), windows(v, *cut), "nmd", seen[:, None])
    mixed = block_attention(in_blocks(q, size), [near], dropout=dropout)
    return mixed.flatten(2, 3)[:, :, :length]


def released_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, window: int, dropout: float = 0.0
) -> Tensor:
    """The pattern `released`. q, k, v: [b h nc d], c = window; mask: [b l] or [1 l] -> [b h nc d].

    Tokens from l on are those of the inputs that filled the last block: the code fills its mask, which is
    bool, with -1e9, and that is True.
    """
    real = F.pad(mask, (0, q.shape[-2] - mask.shape[-1]), value=True).unflatten(-1, (-1, window))  # [b n c]
    seen = (real[..., :, None] & real[..., None, :])[:, None]  # of contiguous blocks
    q, k, v = (x.unflatten(-2, (window, -1)).transpose(2, 3) for x in (q, k, v))  # [b h n c d] strided blocks
    (scores,) = at_least_fp32(torch.einsum("bhncd,bhnmd->bhncm", q * q.shape[-1] ** -0.5, k))
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1).to(v.dtype)
    mixed = torch.einsum("bhncm,bhnmd->bhncd", F.dropout(weights, dropout), v)
    return mixed.transpose(2, 3).flatten(2, 3)


@register("local")
class Local(Mixer):
    """Projections and dropout around `local_attention`, or `released_attention`."""

    traits = Traits(packed=True, uses_order=True)

    def __init__(
        self, place: Place, *, window: int = 64, pattern: str = "sliding", attn_dropout: float = 0.0
    ) -> None:
        super().__init__(place)
        if pattern not in PATTERNS:
            raise ValueError(f"unknown pattern '{pattern}' for local; choose from: {', '.join(PATTERNS)}")
        if window < 1:
            raise ValueError(f"local needs window >= 1, got {window}")
        self.window, self.pattern = window, pattern
        self.attn_dropout = nn.Dropout(attn_dropout)
        if pattern == "released":
            reason = (
                "the mask of one token decides about another, and which ones depends on the padded length"
            )
            claims = dict.fromkeys(("content_invariant", "length_invariant", "packed"), False)
            self.traits = self.traits.but(reason, **claims)

    @property
    def options(self) -> dict:
        dropout = self.attn_dropout.p if self.training else 0.0
        return {"window": self.window, "pattern": self.pattern, "dropout": dropout}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.pattern != "released":
            return super().forward(x, mask)
        length = x.shape[1]
        if mask is None:
            mask = torch.ones(1, length, dtype=torch.bool, device=x.device)
        filled = F.pad(
            x, (0, 0, 0, self.window - length % self.window)
        )  # before the projections: keys are biases
        return super().forward(filled, mask)[:, :length]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.pattern == "released":
            return released_attention(q, k, v, mask, window=self.window, dropout=self.options["dropout"])
        return local_attention(q, k, v, mask, **self.options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return local_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)

    def state_size(self, length: int) -> int:
        seen = {"sliding": 2 * (self.window // 2) + 1, "neighbours": 3 * self.window}
        return (
            2 * min(seen.get(self.pattern, self.window), length) * self.place.num_heads * self.place.head_dim
        )
