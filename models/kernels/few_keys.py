"""Triton kernel of models/few_keys.py, for at most 256 keys; gradients: few_keys_gradients.py.

A program holds all keys of a sequence and head, so that each row meets them in one product and its softmax is
exact without a second pass. Blocks of rows follow from the shapes, nothing is timed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.few_keys import MOST_KEYS
from models.kernels.linear import zero_rows
from models.kernels.rows import block_size
from models.row_products import WIDEST

# b sequences, t packed rows, h heads, m keys of a sequence, d, e widths

LOG2_E = math.log2(math.e)
MIN_PART = 128  # rows


@triton.jit
def finalised(x):
    """The 32-bit finaliser of MurmurHash3 (Appleby 2016, public domain)."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def row_bits(seed, rows, head):
    """32 random bits of each row: they depend on both halves of the seed, the row and the head."""
    seed = tl.load(seed)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return finalised(finalised(rows.to(tl.uint32) + low) + high + head.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def kept(bits, keys, KEEP_FROM: tl.constexpr):
    """Whether bits and keys, of shapes that broadcast, survive: at probability 1 - KEEP_FROM / 2^16.

    Keys i and i + 8 share 32 bits, a half each: they lie in one thread, so that these are computed once.
    """
    x = finalised(bits + (keys & -9).to(tl.uint32) * 0x9E3779B9)
    return tl.where((keys & 8) == 0, x & 0xFFFF, x >> 16) >= KEEP_FROM


@triton.jit
def keys_of(x, keys, valid, x_m, x_d, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x[m d] of one sequence and head as a block, zeros at keys that are not valid."""
    cols = tl.arange(0, BLOCK)
    keep = valid[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x + keys[:, None] * x_m + cols[None, :] * x_d, mask=keep, other=0.0)


@triton.jit
def rows_of(x, rows, inside, x_t, x_d, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    keep = inside[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x + rows[:, None] * x_t + cols[None, :] * x_d, mask=keep, other=0.0)


@triton.jit
def valid_keys(used, sequence, keys, USED: tl.constexpr, M: tl.constexpr):
    valid = keys < M
    if USED:
        valid = valid & (tl.load(used + sequence * M + keys, mask=valid, other=0) != 0)
    return valid


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    used,
    seed,
    out,
    sums,
    cu_seqlens,
    num_sequences,
    num_rows,
    parts,
    part_rows,
    scale,
    q_t,
    q_h,
    q_d,
    k_b,
    k_m,
    k_h,
    k_d,
    v_b,
    v_m,
    v_h,
    v_e,
    out_t,
    USED: tl.constexpr,
    KEEP_FROM: tl.constexpr,
    GAIN: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t h e] = softmax(scale q[t h d] k[b m h d]^T) v[b m h e]; `scale` is for exponentials to base 2.

    sums[t h]: log2 of each row's sum of exponentials, 0 without a valid key.
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    if sequence == num_sequences:
        for row in tl.range(first, num_rows, parts * part_rows):
            last = tl.minimum(num_rows, row + part_rows)
            zero_rows(out + head * E, row, last, BLOCK_T, out_t, E, BLOCK_E, BLOCK_T)
    else:
        last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
        if first < last:
            at = sequence.to(tl.int64)
            keys, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
            valid = valid_keys(used, at, keys, USED, M)
            y = keys_of(k + at * k_b + head * k_h, keys, valid, k_m, k_d, D, BLOCK_D)
            z = keys_of(v + at * v_b + head * v_h, keys, valid, v_m, v_e, E, BLOCK_E)
            for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
                rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
                inside = rows < last
                x = rows_of(q + head * q_h, rows, inside, q_t, q_d, D, BLOCK_D)
                scores = tl.dot(x, tl.trans(y)) * scale
                if USED or M < BLOCK_M:
                    scores = tl.where(valid[None, :], scores, float("-inf"))
                top = tl.max(scores, axis=1)
                top = tl.where(top == float("-inf"), 0.0, top)
                weights = tl.exp2(scores - top[:, None])
                total = tl.sum(weights, axis=1)
                empty = total == 0  # not of NaN, which goes on
                tl.store(
                    sums + rows * heads + head,
                    tl.where(empty, 0.0, top + tl.log2(tl.where(empty, 1.0, total))),
                    mask=inside,
                )
                if KEEP_FROM:
                    bits = row_bits(seed, rows, head)
                    weights = tl.where(kept(bits[:, None], keys[None, :], KEEP_FROM), weights, 0.0)
                mixed = tl.dot(weights.to(z.dtype), z) * (GAIN / tl.where(empty, 1.0, total))[:, None]
                keep = inside[:, None] & (e < E)[None, :]
                tl.store(out + rows[:, None] * out_t + head * E + e[None, :], mixed, mask=keep)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    max_len: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [t h d], k [b m h d], v [b m h e], used [b m] bool, seed [1] int64 -> [t h e] and [t h] float32."""
    num_rows, heads, _ = q.shape
    out = v.new_empty(num_rows, heads, v.shape[-1])
    sums = q.new_empty(num_rows, heads, dtype=torch.float32)
    options = options_of(k, v, used, dropout)
    block_m = options["BLOCK_M"]
    programs = 2048 if block_m <= 64 else 1024  # each reads all keys
    part_rows = part_size(num_rows * heads, max_len, programs, MIN_PART)
    parts = max(triton.cdiv(max_len, part_rows), 1)
    with torch.cuda.device_of(q):
        forward_kernel[(cu_seqlens.shape[0] * parts, heads)](
            q,
            k,
            v,
            k if used is None else used.contiguous(),
            q if seed is None else seed,
            out,
            sums,
            cu_seqlens.contiguous(),
            cu_seqlens.shape[0] - 1,
            num_rows,
            parts,
            part_rows,
            scale * LOG2_E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            out.stride(0),
            **options,
            BLOCK_T=64 if block_m > 64 else 128,  # registers
            STAGES=2,
            num_warps=4,
        )
    return out, sums


def part_size(rows: int, max_len: int, programs: int, least: int) -> int:
    """Rows of a sequence that one program takes, of so many in all heads, for about `programs` of them."""
    size = least
    while size < max_len and rows > programs * size:
        size *= 2
    return size


def options_of(k: Tensor, v: Tensor, used: Tensor | None, dropout: float) -> dict:
    (_, m, _, d), e = k.shape, v.shape[-1]
    assert m <= MOST_KEYS and max(d, e) <= WIDEST, (m, d, e)  # what follows would leave the rest out
    keep_from = round(dropout * 2**16)
    return {
        "USED": used is not None,
        "KEEP_FROM": keep_from,
        "GAIN": 2**16 / (2**16 - keep_from) if keep_from < 2**16 else 0.0,
        "D": d,
        "E": e,
        "M": m,
        "BLOCK_D": block_size(d, WIDEST),
        "BLOCK_E": block_size(e, WIDEST),
        "BLOCK_M": block_size(m, MOST_KEYS),
    }
