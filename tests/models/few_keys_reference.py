"""Attention to few keys sequence by sequence, and what its dropout keeps, both from the formulas."""

import torch

MASK = 2**32 - 1


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def explicit(q, k, v, lengths, *, used=None, kept=None, dropout=0.0, scale=None):
    """float64, zeros at filler rows; kept: [t h m] bool."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts, start = [], 0
    for i, length in enumerate(lengths):
        rows, choice = slice(start, start + length), slice(None) if used is None else used[i]
        weights = torch.einsum("thd,mhd->thm", q[rows] * scale, k[i, choice]).softmax(-1)
        if kept is not None:
            weights = weights * kept[rows][..., choice] / (1 - dropout)
        parts.append(torch.einsum("thm,mhe->the", weights, v[i, choice]))
        start += length
    return torch.cat([*parts, v.new_zeros(len(q) - start, *v.shape[2:])])


def finalised(x):
    """fmix32 of MurmurHash3 on numbers below 2^32 in int64."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def kept(seed, num_rows, heads, keys, dropout):
    """[t h m] bool."""
    row, head, key = torch.arange(num_rows)[:, None], torch.arange(heads), torch.arange(keys)
    first = finalised((row + (seed & MASK)) & MASK)
    bits = finalised((first + (seed >> 32) + head * 0x9E3779B9) & MASK)
    second = key // 8 % 2
    both = finalised((bits[..., None] + (key - 8 * second) * 0x9E3779B9) & MASK)
    return torch.where(second == 1, both >> 16, both & 0xFFFF) >= round(dropout * 2**16)


def explicit_queries(q, k, v, lengths, *, real=None, kept=None, dropout=0.0):
    """From the queries of each sequence to its rows, in float64; kept: [t h m] bool."""
    parts, start = [], 0
    for i, length in enumerate(lengths):
        rows = torch.arange(start, start + length)
        if real is not None:
            rows = rows[real[rows]]
        weights = torch.einsum("mhd,thd->mht", q[i] * q.shape[-1] ** -0.5, k[rows]).softmax(-1)
        if kept is not None:
            weights = weights * kept[rows].permute(2, 1, 0) / (1 - dropout)
        parts.append(torch.einsum("mht,the->mhe", weights, v[rows]))
        start += length
    return torch.stack(parts)
