"""Triton kernels of models/few_queries.py, for at most 64 queries; gradients: few_queries_gradients.py.

A program holds all queries of a sequence and head and reads a part of its rows once; a second kernel joins
the parts of a sequence in a fixed order. The rest is as in few_keys.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.few_queries import MOST_QUERIES
from models.kernels.few_keys import LOG2_E, kept, keys_of, options_of, part_size, row_bits, rows_of

# b sequences, t packed rows, h heads, m queries of a sequence, d, e widths

PROGRAMS, MIN_PART = 2048, 128


@triton.jit
def finite(top):
    """What exponents are taken relative to: 0 where nothing was met."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def seen_rows(real, rows, inside, MASKED: tl.constexpr):
    if MASKED:
        inside = inside & (tl.load(real + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def store_mixed(out, sums, mixed, top, total, heads, M: tl.constexpr, E: tl.constexpr):
    """mixed [m e] over total in out[m h e] and top + log2(total) in sums[m h]: 0 and -inf without rows."""
    slots, e = tl.arange(0, mixed.shape[0]), tl.arange(0, mixed.shape[1])
    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]  # not of NaN, which goes on
    keep = (slots < M)[:, None] & (e < E)[None, :]
    tl.store(out + slots[:, None] * heads * E + e[None, :], mixed, mask=keep)
    tl.store(sums + slots * heads, top + tl.log2(total), mask=slots < M)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    real,
    seed,
    out,
    sums,
    cu_seqlens,
    parts,
    part_rows,
    scale,
    q_b,
    q_m,
    q_h,
    q_d,
    k_t,
    k_h,
    k_d,
    v_t,
    v_h,
    v_e,
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
    """out[part b m h e] = softmax(scale q[b m h d] k[t h d]^T) v[t h e] over the rows of each part; `scale`
    is for exponentials to base 2. sums[part b m h]: log2 of the sums of exponentials.
    """
    sequence, sequences = tl.program_id(0) // parts, tl.num_programs(0) // parts
    part = tl.program_id(0) % parts
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
    if (first < last) | (part == 0):
        at = sequence.to(tl.int64)
        slots = tl.arange(0, BLOCK_M)
        y = keys_of(q + at * q_b + head * q_h, slots, slots < M, q_m, q_d, D, BLOCK_D)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
        for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = seen_rows(real, rows, rows < last, USED)
            x = rows_of(k + head * k_h, rows, inside, k_t, k_d, D, BLOCK_D)
            z = rows_of(v + head * v_h, rows, inside, v_t, v_e, E, BLOCK_E)
            scores = tl.where(inside[None, :], tl.dot(y, tl.trans(x)) * scale, float("-inf"))  # [m t]
            before, top = top, tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - finite(top)[:, None])
            shrunk = tl.exp2(before - finite(top))
            total = total * shrunk + tl.sum(weights, axis=1)
            if KEEP_FROM:
                bits = row_bits(seed, rows, head)
                weights = tl.where(kept(bits[None, :], slots[:, None], KEEP_FROM), weights * GAIN, 0.0)
            mixed = tl.dot(weights.to(z.dtype), z, mixed * shrunk[:, None])
        place = ((part.to(tl.int64) * sequences + at) * M) * heads + head
        store_mixed(out + place * E, sums + place, mixed, top, total, heads, M, E)


@triton.jit
def join_kernel(
    parts_out,
    parts_sums,
    out,
    sums,
    cu_seqlens,
    part_rows,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[b m h e], sums[b m h] of all rows of a sequence from those of its parts, [part ...]."""
    sequence, sequences = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slots, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    length = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
    place = sequence * M * heads + head
    keep = (slots < M)[:, None] & (e < E)[None, :]
    from_out = parts_out + place * E + slots[:, None] * heads * E + e[None, :]
    from_sums = parts_sums + place + slots * heads
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for _ in tl.range(0, tl.cdiv(length, part_rows)):
        x, of_part = tl.load(from_out, mask=keep, other=0.0), tl.load(from_sums, mask=slots < M, other=0.0)
        before, top = top, tl.maximum(top, of_part)
        shrunk, weight = tl.exp2(before - finite(top)), tl.exp2(of_part - finite(top))
        mixed = mixed * shrunk[:, None] + x * weight[:, None]
        total = total * shrunk + weight
        from_out += sequences * M * heads * E
        from_sums += sequences * M * heads
    store_mixed(out + place * E, sums + place, mixed, top, total, heads, M, E)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    max_len: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [b m h d], k [t h d], v [t h e], real [t] bool, seed [1] int64 -> [b m h e], [b m h] float32."""
    (batch_size, m, heads, _), (num_rows, _, e) = q.shape, v.shape
    assert m <= MOST_QUERIES, m  # a program's registers hold no more
    part_rows = part_size(num_rows * heads, max_len, PROGRAMS, MIN_PART)
    parts = max(triton.cdiv(max_len, part_rows), 1)
    sums = q.new_empty(parts, batch_size, m, heads, dtype=torch.float32)
    out = v.new_empty(parts, batch_size, m, heads, e, dtype=v.dtype if parts == 1 else torch.float32)
    cu_seqlens, options = cu_seqlens.contiguous(), options_of(q, v, real, dropout)
    with torch.cuda.device_of(q):
        forward_kernel[(batch_size * parts, heads)](
            q,
            k,
            v,
            q if real is None else real.contiguous(),
            q if seed is None else seed,
            out,
            sums,
            cu_seqlens,
            parts,
            part_rows,
            scale * LOG2_E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            **options,
            BLOCK_T=128,
            STAGES=2,
            num_warps=4,
        )
        if parts == 1:
            return out.squeeze(0), sums.squeeze(0)
        joined, joined_sums = v.new_empty(out.shape[1:]), sums.new_empty(sums.shape[1:])
        sizes = {name: options[name] for name in ("E", "M", "BLOCK_E", "BLOCK_M")}
        results = out, sums, joined, joined_sums
        join_kernel[batch_size, heads](*results, cu_seqlens, part_rows, **sizes)
    return joined, joined_sums
