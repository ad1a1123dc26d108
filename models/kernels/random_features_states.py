"""Triton kernels of the gradients of states in models/random_features.py, as in random_features.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.random_features import (
    UP,
    energies,
    options_of,
    parts_of,
    products,
    states_at,
    store_states,
    summarise,
    totals,
    vectors_at,
)
from models.random_features import TILE

# b sequences, t packed rows, h heads, d, e widths, r vectors, n tiles of vectors

DOWN = tl.constexpr(2.0**-14)  # undoes UP


@triton.jit
def state_sums_kernel(
    q,
    grad,
    mixed,
    vectors,
    stats,
    summary,
    out,
    cu_seqlens,
    num_rows,
    parts,
    part_rows,
    energy,
    eps,
    floor,
    q_t,
    q_h,
    q_d,
    g_t,
    g_h,
    g_e,
    mixed_t,
    out_part,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over the rows of a part: out[part, b h r+1 e+1] = the sum of 2^UP P(q) / n times the gradient of the
    output and -(its product with the output), behind them that of 1 / n times these; n: normalisers over
    the least that they can be. Parts without rows are not written.
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
    if first < last:
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        high, low = vectors_at(vectors, r, d, R, D, SPLIT)
        state = sequence.to(tl.int64) * num_heads + head
        _, last_sum, _ = totals(summary + state * TILES * (E + 3), e, E, TILES)
        least = tl.maximum(eps * last_sum, floor)
        total = tl.zeros([BLOCK_R, BLOCK_E], dtype=tl.float32)
        weight = tl.zeros([BLOCK_R], dtype=tl.float32)
        values = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        count = tl.zeros([BLOCK_T], dtype=tl.float32)
        for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            x = tl.load(q + rows[:, None] * q_t + head * q_h + d[None, :] * q_d, mask=keep_d, other=0.0)
            g = tl.load(grad + rows[:, None] * g_t + head * g_h + e[None, :] * g_e, mask=keep_e, other=0.0)
            y = tl.load(mixed + rows[:, None] * mixed_t + head * E + e[None, :], mask=keep_e, other=0.0)
            along = -tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1)
            own = stats + rows * num_heads + head
            top = tl.load(own, mask=inside, other=0.0)
            rate = least / tl.load(own + 2 * num_rows * num_heads, mask=inside, other=float("inf"))
            p = products(high, x, x, False, PRECISION)  # [r t]
            if SPLIT:
                p = tl.dot(low, tl.trans(x), p)
            power = tl.exp2(p + (tl.log2(rate) - energies(x, energy) - top + UP)[None, :]).to(g.dtype)
            weight += tl.sum(power.to(tl.float32) * along[None, :], axis=1)
            total = tl.dot(power, g, total, input_precision=PRECISION)
            values += g.to(tl.float32) * rate[:, None]
            count += along * rate
        out += part.to(tl.int64) * out_part + state * (R + 1) * (E + 1)
        tl.store(out + r[:, None] * (E + 1) + e[None, :], total, mask=(r < R)[:, None] & (e < E)[None, :])
        tl.store(out + r * (E + 1) + E, weight, mask=r < R)
        if tl.program_id(2) == 0:
            tl.store(out + R * (E + 1) + e, tl.sum(values, axis=0), mask=e < E)
            tl.store(out + R * (E + 1) + E, tl.sum(count, axis=0))


@triton.jit
def join_kernel(
    sums,
    states,
    summary,
    states_grad,
    summary_grad,
    cu_seqlens,
    part_rows,
    eps,
    floor,
    sums_part,
    E: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """From the parts of state_sums_kernel the gradients of states [b h r*(e+1)] and their summary, whose
    last number is the sum of their products with states.
    """
    sequence, head, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    state = sequence.to(tl.int64) * tl.num_programs(1) + head
    num_rows = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
    num_parts = tl.cdiv(num_rows, part_rows).to(tl.int64)
    e, r = tl.arange(0, BLOCK_E), tile * BLOCK_R + tl.arange(0, BLOCK_R)
    keep = (r < R)[:, None] & (e < E)[None, :]
    s = tl.zeros([BLOCK_R, BLOCK_E], dtype=tl.float32)
    z = tl.zeros([BLOCK_R], dtype=tl.float32)
    sums += state * (R + 1) * (E + 1)
    for part in range(num_parts):
        own = sums + part * sums_part
        behind = own + R * (E + 1)
        s += tl.load(own + r[:, None] * (E + 1) + e[None, :], mask=keep, other=0.0) * DOWN
        s += eps * tl.load(behind + e, mask=e < E, other=0.0)[None, :]
        z += tl.load(own + r * (E + 1) + E, mask=r < R, other=0.0) * DOWN + eps * tl.load(behind + E)
    _, last_sum, _ = totals(summary + state * TILES * (E + 3), e, E, TILES)
    least = tl.maximum(eps * last_sum, floor)
    s, z = s / least, z / least
    powers, weights = states_at(states + state * R * (E + 1), r, e, E, R)
    more = tl.sum(tl.sum(s * powers, axis=1) + tl.where(r < R, z, 0.0) * weights, axis=0)
    store_states(states_grad + state * R * (E + 1), s, z, r, e, E, R)
    summary_grad += state * TILES * (E + 3)
    summarise(summary_grad, s, z, more, tile, r, e, E, R)


def state_gradients(
    q: Tensor,
    grad: Tensor,
    mixed: Tensor,
    vectors: Tensor,
    states: Tensor,
    summary: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    energy: float,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """From the gradient [t h e] of the output `mixed` those of states [b h r*(e+1)], and their summary."""
    batch_size, heads, r, e = cu_seqlens.shape[0] - 1, q.shape[1], vectors.shape[1], grad.shape[-1]
    sums, parts, part_rows = parts_of(q, batch_size, heads, r, e, max_len)
    tiles = triton.cdiv(r, TILE)
    states_grad = q.new_empty(batch_size, heads, r * (e + 1), dtype=torch.float32)
    summary_grad = q.new_empty(batch_size, heads, tiles, e + 3, dtype=torch.float32)
    options = options_of(vectors, e)
    offsets = cu_seqlens.contiguous()
    with torch.cuda.device_of(q):
        state_sums_kernel[(batch_size * parts, heads, tiles)](
            q,
            grad,
            mixed,
            vectors,
            stats,
            summary,
            sums,
            offsets,
            q.shape[0],
            parts,
            part_rows,
            energy,
            eps,
            floor,
            *q.stride(),
            *grad.stride(),
            mixed.stride(0),
            sums.stride(0),
            TILES=tiles,
            **options,
            STAGES=2,
        )
        join_kernel[(batch_size, heads, tiles)](
            sums,
            states,
            summary,
            states_grad,
            summary_grad,
            offsets,
            part_rows,
            eps,
            floor,
            sums.stride(0),
            TILES=tiles,
            **{name: options[name] for name in ("E", "R", "BLOCK_E", "BLOCK_R")},
            num_warps=4,
        )
    return states_grad, summary_grad
