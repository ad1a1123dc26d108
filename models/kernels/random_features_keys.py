"""Triton kernels of models/random_features.py that sum over keys, as in random_features.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.random_features import (
    NOTHING,
    UP,
    energies,
    options_of,
    parts_of,
    products,
    store_states,
    summarise,
    vectors_at,
)
from models.random_features import TILE

# b sequences, t packed rows, h heads, d, e widths, r vectors, n tiles of vectors


@triton.jit
def key_sums_kernel(
    k,
    v,
    real,
    vectors,
    out,
    tops,
    origins,
    cu_seqlens,
    parts,
    part_rows,
    energy,
    k_t,
    k_h,
    k_d,
    v_t,
    v_h,
    v_e,
    out_part,
    tops_part,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over the real rows of a part: out[part, b h r+1 e+1] = the sum of 2^(p - energy - top + UP) times v and
    1, with p = k . vectors, behind them that of v and 1; tops[part, b h r] the largest p and origins the
    first row of the block that it lies in. Parts without rows are not written.
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
    if first < last:
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        high, low = vectors_at(vectors, r, d, R, D, SPLIT)
        top = tl.full([BLOCK_R], NOTHING, dtype=tl.float32)
        origin = tl.zeros([BLOCK_R], dtype=tl.int32) + first
        total = tl.zeros([BLOCK_R, BLOCK_E], dtype=tl.float32)
        weight = tl.zeros([BLOCK_R], dtype=tl.float32)
        values = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        count = tl.zeros([BLOCK_T], dtype=tl.float32)
        for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            if MASKED:
                inside = inside & (tl.load(real + rows, mask=inside, other=0) != 0)
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            x = tl.load(k + rows[:, None] * k_t + head * k_h + d[None, :] * k_d, mask=keep_d, other=0.0)
            y = tl.load(v + rows[:, None] * v_t + head * v_h + e[None, :] * v_e, mask=keep_e, other=0.0)
            p = products(high, x, x, False, PRECISION)  # [r t]
            if SPLIT:
                p = tl.dot(low, tl.trans(x), p)
            p = tl.where(inside[None, :], p, float("-inf"))
            larger = tl.maximum(top, tl.max(p, axis=1))
            origin = tl.where(larger > top, row, origin)
            power = tl.exp2(p - (energies(x, energy) - UP)[None, :] - larger[:, None]).to(y.dtype)
            rise = tl.exp2(top - larger)
            weight = weight * rise + tl.sum(power.to(tl.float32), axis=1)
            total = tl.dot(power, y, total * rise[:, None], input_precision=PRECISION)
            values += y.to(tl.float32)
            count += tl.where(inside, 1.0, 0.0)
            top = larger
        state = sequence.to(tl.int64) * tl.num_programs(1) + head
        out += part.to(tl.int64) * out_part + state * (R + 1) * (E + 1)
        tl.store(out + r[:, None] * (E + 1) + e[None, :], total, mask=(r < R)[:, None] & (e < E)[None, :])
        tl.store(out + r * (E + 1) + E, weight, mask=r < R)
        place = part.to(tl.int64) * tops_part + state * R + r
        tl.store(tops + place, top, mask=r < R)
        tl.store(origins + place, origin, mask=r < R)
        if tl.program_id(2) == 0:
            tl.store(out + R * (E + 1) + e, tl.sum(values, axis=0), mask=e < E)
            tl.store(out + R * (E + 1) + E, tl.sum(count, axis=0))


@triton.jit
def join_kernel(
    sums,
    tops,
    origins,
    k,
    real,
    vectors,
    states,
    summary,
    center,
    place,
    cu_seqlens,
    part_rows,
    eps,
    k_t,
    k_h,
    k_d,
    sums_part,
    tops_part,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """From the parts of key_sums_kernel states [b h r*(e+1)] of one stabiliser, their summary and center
    [b h e+1]; place[b h 2]: a row and a vector whose product the stabiliser is.
    """
    sequence, head, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    state = sequence.to(tl.int64) * tl.num_programs(1) + head
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    num_parts = tl.cdiv(end - start, part_rows).to(tl.int64)
    every, d, e = tl.arange(0, BLOCK_ALL), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    top = tl.full([BLOCK_ALL], NOTHING, dtype=tl.float32)
    origin = tl.zeros([BLOCK_ALL], dtype=tl.int32)
    total, count = tl.zeros([BLOCK_E], dtype=tl.float32), 0.0
    sums += state * (R + 1) * (E + 1)
    for part in range(num_parts):
        at = part * tops_part + state * R + every
        found = tl.load(tops + at, mask=every < R, other=NOTHING)
        origin = tl.where(found > top, tl.load(origins + at, mask=every < R, other=0), origin)
        top = tl.maximum(top, found)
        behind = sums + part * sums_part + R * (E + 1)
        total += tl.load(behind + e, mask=e < E, other=0.0)
        count += tl.load(behind + E)
    stabiliser = tl.max(top, axis=0)
    s = tl.zeros([BLOCK_R, BLOCK_E], dtype=tl.float32)
    z = tl.zeros([BLOCK_R], dtype=tl.float32)
    keep = (r < R)[:, None] & (e < E)[None, :]
    for part in range(num_parts):
        at = part * tops_part + state * R + r
        factor = tl.exp2(tl.load(tops + at, mask=r < R, other=NOTHING) - stabiliser - UP)
        own = sums + part * sums_part
        s += factor[:, None] * tl.load(own + r[:, None] * (E + 1) + e[None, :], mask=keep, other=0.0)
        z += factor * tl.load(own + r * (E + 1) + E, mask=r < R, other=0.0)
    mean = total / tl.maximum(count, 1.0)
    s -= z[:, None] * mean[None, :]
    store_states(states + state * R * (E + 1), s, z, r, e, E, R)
    summary += state * tl.num_programs(2) * (E + 3)
    summarise(summary, s, z + eps * count, stabiliser, tile, r, e, E, R)
    if tile == 0:
        center += state * (E + 1)
        tl.store(center + e, mean, mask=e < E)
        tl.store(center + E, count)
        index = tl.max(tl.where(top == stabiliser, every, 0), axis=0)
        row = tl.sum(tl.where(every == index, origin, 0), axis=0)
        rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (rows >= start) & (rows < end)
        if MASKED:
            inside = inside & (tl.load(real + rows, mask=inside, other=0) != 0)
        w = tl.load(vectors + index * D + d, mask=d < D, other=0.0).to(tl.float32)
        if SPLIT:
            w += tl.load(vectors + (R + index) * D + d, mask=d < D, other=0.0).to(tl.float32)
        at = k + rows[:, None] * k_t + head * k_h + d[None, :] * k_d
        x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        p = tl.where(inside, tl.sum(x * w[None, :], axis=1), float("-inf"))
        highest = tl.max(p, axis=0)
        tl.store(place + 2 * state, tl.max(tl.where((p == highest) & inside, rows, -1), axis=0).to(tl.int32))
        tl.store(place + 2 * state + 1, index)


def key_sums(
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    vectors: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    energy: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k [t h d], v [t h e], real [t] bool, vectors [1 or 2 r d] -> states, summary, center and place."""
    batch_size, heads, r, e = cu_seqlens.shape[0] - 1, k.shape[1], vectors.shape[1], v.shape[-1]
    tiles = triton.cdiv(r, TILE)
    sums, parts, part_rows = parts_of(k, batch_size, heads, r, e, max_len)
    tops = k.new_empty(parts, batch_size, heads, r, dtype=torch.float32)
    origins = torch.empty_like(tops, dtype=torch.int32)
    states = k.new_empty(batch_size, heads, r * (e + 1), dtype=torch.float32)
    summary = k.new_empty(batch_size, heads, tiles, e + 3, dtype=torch.float32)
    center = k.new_empty(batch_size, heads, e + 1, dtype=torch.float32)
    place = k.new_empty(batch_size, heads, 2, dtype=torch.int32)
    options = options_of(vectors, e)
    shared = {"MASKED": real is not None, **options}
    mask, offsets = k if real is None else real.contiguous(), cu_seqlens.contiguous()
    with torch.cuda.device_of(k):
        key_sums_kernel[(batch_size * parts, heads, tiles)](
            k,
            v,
            mask,
            vectors,
            sums,
            tops,
            origins,
            offsets,
            parts,
            part_rows,
            energy,
            *k.stride(),
            *v.stride(),
            sums.stride(0),
            tops.stride(0),
            **shared,
            STAGES=3,
        )
        del shared["PRECISION"]
        join_kernel[(batch_size, heads, tiles)](
            sums,
            tops,
            origins,
            k,
            mask,
            vectors,
            states,
            summary,
            center,
            place,
            offsets,
            part_rows,
            eps,
            *k.stride(),
            sums.stride(0),
            tops.stride(0),
            **shared,
            BLOCK_ALL=triton.next_power_of_2(r),
        )
    return states, summary, center, place
