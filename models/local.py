"""Local attention: softmax among nearby tokens.

Paper    Parmar et al. 2018, arXiv 1802.05751 (blocks); Beltagy et al. 2020, arXiv 2004.05150 (sliding)
Computes out_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(d)) v_j   with   N(i) by pattern, w = window:
         sliding     |i - j| <= w // 2
         block       i // w = j // w
         neighbours  |i // w - j // w| <= 1
Cost     time and memory O(L w) per head
Exact    if window >= 2 * length (sliding) or window >= length (block, neighbours)
Padding  padded keys, and those added to fill the last block, get weight zero; a row without real ones: 0
Differs  no (the released code of the benchmark attends to a strided set instead, which is another mechanism)
"""
# b batch, h heads, l length, t packed tokens, d head dim, n blocks, c tokens of a block, m keys a block sees

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Chunks, Mixer, Place, Traits, masked_softmax, register

PATTERNS = ("sliding", "block", "neighbours")
NOBODY = -1  # the group of padding: it attends to nothing and nothing attends to it


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
    """q, k, v: [b h l d], mask: [b l] bool, True = real token -> [b h l d]."""
    if mask is None:
        group = torch.zeros(1, q.shape[-2], dtype=torch.long, device=q.device)
    else:
        group = mask.long() - 1
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
    group = torch.where(chunks.inside, chunks.owner[:, None], NOBODY).flatten()[None]
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
    fill = -length % size
    reach = {"sliding": window // 2, "block": 0, "neighbours": window}[pattern] if longest > window else 0
    keys = size + 2 * reach  # m
    q_group = F.pad(group, (0, fill), value=NOBODY).unflatten(-1, (-1, size))  # [b n c]
    k_group = F.pad(group, (reach, fill + reach), value=NOBODY).unfold(-1, keys, size)  # [b n m]
    near = (q_group[..., :, None] == k_group[..., None, :]) & (k_group != NOBODY)[..., None, :]  # [b n c m]
    if pattern == "sliding":
        query, key = (torch.arange(count, device=q.device) for count in (size, keys))
        near = near & ((query[:, None] + reach - key).abs() <= window // 2)
    q, k, v = (x.contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))  # compiled pads by 0 must not alias
    q = F.pad(q, (0, 0, 0, fill)).unflatten(-2, (-1, size))  # [b h n c d]
    k, v = (F.pad(x, (0, 0, reach, fill + reach)).unfold(-2, keys, size) for x in (k, v))  # [b h n d m]
    scores = torch.einsum("bhncd,bhndm->bhncm", q, k)
    weights = masked_softmax(scores, near[:, None]).to(v.dtype)
    mixed = torch.einsum("bhncm,bhndm->bhncd", F.dropout(weights, dropout), v)
    return mixed.flatten(2, 3)[:, :, :length]


@register("local")
class Local(Mixer):
    """Projections and dropout around `local_attention`."""

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

    @property
    def options(self) -> dict:
        dropout = self.attn_dropout.p if self.training else 0.0
        return {"window": self.window, "pattern": self.pattern, "dropout": dropout}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return local_attention(q, k, v, mask, **self.options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return local_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)

    def state_size(self, length: int) -> int:
        seen = {"sliding": 2 * (self.window // 2) + 1, "block": self.window, "neighbours": 3 * self.window}
        return 2 * min(seen[self.pattern], length) * self.place.num_heads * self.place.head_dim
