"""Linear attention by sums, over a padded batch and within packed sequences; softmax within the latter."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_fp32, full_precision
from models.linear_rows import divided, fits_kernels, mapped, normalised_sums
from models.packed import Chunks
from models.row_products import linear_sums, runs_kernels

# b batch, h heads, l length, t packed tokens, n chunks, c places of a chunk, m queries, d, e head dims (keys,
# values)


def kernel_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Linear attention before its division, on features that are mapped already.

    q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real
    -> sum_j (q_i . k_j) v_j [b h l e] and sum_j q_i . k_j [b h l 1] over the real j, at least float32.
    """
    if mask is not None:
        k = k * mask[:, None, :, None]
    if runs_kernels(q, k, v):
        return _sums_of_rows(q, k, v)
    q, k, v = at_least_fp32(q, k, v)
    with full_precision(v):
        state = torch.einsum("bhld,bhle->bhde", k, v)
        norm = torch.einsum("bhld,bhd->bhl", q, k.sum(dim=-2))
        return torch.einsum("bhld,bhde->bhle", q, state), norm.unsqueeze(-1)


def segment_sums(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """`kernel_sums` within each packed sequence. q, k: [t h d], v: [t h e]
    -> [t h e] and [t h 1], at least float32; zeros at filler rows.
    """
    return linear_sums(q, k, v, cu_seqlens, max_len)


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float,
    add_eps: bool = False,
    feature: str = "none",
) -> Tensor:
    """`kernel_sums` divided: normalised linear attention, options as in `normalised_sums`.

    q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real -> [b h l e] in the dtype of v.
    """
    if fits_kernels(q, k, v):
        real = None if mask is None else mask.flatten()
        options = {"eps": eps, "add_eps": add_eps, "feature": feature}
        out = normalised_sums(*rows_of(q, k, v), *offsets_of(q), real=real, **options)
        return batch_of(out, q)
    sums = kernel_sums(mapped(q, feature), mapped(k, feature), v, mask)
    return divided(*sums, eps, add_eps).to(v.dtype)


def _sums_of_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`kernel_sums` of a padded batch as packed rows of sequences of one length."""
    mixed, norm = linear_sums(*rows_of(q, k, v), *offsets_of(q))
    return batch_of(mixed, q), batch_of(norm, q)


def rows_of(*padded: Tensor) -> tuple[Tensor, ...]:
    """Each [b h l d] -> [b*l h d]."""
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in padded)


def offsets_of(q: Tensor) -> tuple[Tensor, int]:
    """`cu_seqlens` and `max_len` of such rows."""
    batch_size, _, length, _ = q.shape
    return length * torch.arange(batch_size + 1, dtype=torch.int32, device=q.device), length


def batch_of(rows: Tensor, q: Tensor) -> Tensor:
    """The inverse of `rows_of`."""
    return rows.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def chunk_sums(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, batch_size: int) -> Tensor:
    """sum_j (q_i . k_j) v_j over the places j of i's sequence. q, k: [n c h d], v: [n c h e] -> [n c h e].

    Unused places take no part if their k or v is zero.
    """
    with full_precision(v):
        state = chunks.sum_by_sequence(torch.einsum("nchd,nche->nhde", k, v), batch_size)  # [b h d e]
        return torch.einsum("nchd,nhde->nche", q, chunks.spread(state))


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, eps: float, **options
) -> Tensor:
    """`kernel_attention` within each packed sequence. q, k: [t h d], v: [t h e]
    -> [t h e] in the dtype of v; zeros at filler rows.
    """
    return normalised_sums(q, k, v, cu_seqlens, max_len, eps=eps, **options)


def segment_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Chunks,
    *,
    own: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention from queries of each sequence to its packed rows, laid out in chunks.

    q: [b m h d], k: [n c h d], v: [n c h e] -> [b m h e], zeros for a sequence without keys. `own` are a key
    [b h d] and a value [b h e] that each sequence has besides those of its rows.
    """
    dtype, batch_size, inside = v.dtype, q.shape[0], chunks.inside[:, None, None, :]
    q, k = at_least_fp32(q, k)
    with full_precision(q):
        q = q * q.shape[-1] ** -0.5
        scores = torch.einsum("nmhd,nchd->nhmc", chunks.spread(q), k)
        scores = scores.masked_fill(~inside, torch.finfo(scores.dtype).min)
        top = chunks.max_by_sequence(scores.detach().amax(dim=-1), batch_size)  # [b h m]
        if own is not None:
            own_k, own_v = at_least_fp32(*own)
            own_scores = torch.einsum("bmhd,bhd->bhm", q, own_k)
            top = torch.maximum(top, own_scores.detach())
        weights = (scores - chunks.of_sequence(top).unsqueeze(-1)).exp() * inside
    kept = F.dropout(weights.to(dtype), dropout)
    mixed, total = torch.einsum("nhmc,nche->nhme", kept, v), weights.sum(dim=-1, keepdim=True)
    with full_precision(q):
        sums = chunks.sum_by_sequence(torch.cat([mixed.to(total.dtype), total], dim=-1), batch_size)
        mixed, total = sums[..., :-1], sums[..., -1:]  # [b h m e], [b h m 1]
        if own is not None:
            weight = (own_scores - top).exp().unsqueeze(-1)
            mixed, total = mixed + F.dropout(weight, dropout) * own_v.unsqueeze(2), total + weight
        return (mixed / total.masked_fill(total == 0, 1)).to(dtype).transpose(1, 2)
