"""The sums of linear attention, over a padded batch and within each packed sequence."""

import torch
from torch import Tensor

from models.common import full_precision
from models.packed import CHUNK, Chunks

# b batch, h heads, l length, t packed tokens, n chunks, c places of a chunk, d, e head dims (keys, values)


def kernel_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Linear attention before its division, on features that are mapped already.

    q, k: [b h l d], v: [b h l e], at least float32, mask: [b l] bool, True = real
    -> sum_j (q_i . k_j) v_j [b h l e] and sum_j q_i . k_j [b h l 1] over the real j.
    """
    if mask is not None:
        k = k * mask[:, None, :, None]
    with full_precision(v):
        state = torch.einsum("bhld,bhle->bhde", k, v)
        norm = torch.einsum("bhld,bhd->bhl", q, k.sum(dim=-2))
        return torch.einsum("bhld,bhde->bhle", q, state), norm.unsqueeze(-1)


def segment_sums(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """`kernel_sums` within each packed sequence. q, k: [t h d], v: [t h e], at least float32
    -> [t h e] and [t h 1]; zeros at filler rows.
    """
    chunks = sum_chunks(cu_seqlens, q.shape[0], max_len)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the column of ones collects the normaliser
    mixed = chunk_sums(*(chunks.lay_out(x) for x in (q, k, v)), chunks, cu_seqlens.shape[0] - 1)
    mixed = chunks.take_back(mixed)
    return mixed[..., :-1], mixed[..., -1:]


def sum_chunks(cu_seqlens: Tensor, num_rows: int, max_len: int) -> Chunks:
    """Packed rows in chunks of a size for which `chunk_sums` is fast."""
    size = CHUNK if max_len > 4 * CHUNK else max_len  # cutting short sequences would leave more places unused
    return Chunks.of(cu_seqlens, num_rows, size=size, max_len=max_len)


def chunk_sums(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, batch_size: int) -> Tensor:
    """sum_j (q_i . k_j) v_j over the places j of i's sequence. q, k: [n c h d], v: [n c h e] -> [n c h e].

    Unused places take no part if their k or v is zero.
    """
    with full_precision(v):
        state = chunks.sum_by_sequence(torch.einsum("nchd,nche->nhde", k, v), batch_size)  # [b h d e]
        return torch.einsum("nchd,nhde->nche", q, chunks.spread(state))


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, eps: float
) -> Tensor:
    """Normalised linear attention within each packed sequence, on features that are mapped already.

    q, k: [t h d], v: [t h e], at least float32 -> [t h e]; zeros at filler rows.
    """
    mixed, norm = segment_sums(q, k, v, cu_seqlens, max_len)
    return mixed / norm.clamp_min(eps)
