"""Triton kernels of the gradients of rows in models/random_features.py, as in random_features.py.

With powers P_r = 2^(p_r - energy - stabiliser), features f = P + eps and gradients X_r of powers, those of
the exponents are G_r = P_r X_r. A stabiliser's is -sum G, for keys that over all rows: the sum of products of
states and their gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.linear import zero_rows
from models.kernels.random_features import (
    NOTHING,
    TILES_LOADED,
    energies,
    products,
    row_options,
    states_at,
    totals,
    vectors_at,
)

# b sequences, t packed rows, h heads, d, e widths, r vectors, n tiles of vectors

LN2 = tl.constexpr(0.6931471805599453)
LIFT = tl.constexpr(4096.0)  # of powers up to 1, so that small ones stay in half precision


@triton.jit
def query_gradients_kernel(
    q,
    grad,
    mixed,
    vectors,
    states,
    summary,
    center,
    stats,
    q_grad,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_blocks,
    energy,
    eps,
    q_t,
    q_h,
    q_d,
    g_t,
    g_h,
    g_e,
    mixed_t,
    q_grad_t,
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
    """From the gradient of the output that of q; the powers' are X_r = (g . s_r - (g . output) z_r) / n."""
    sequence = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + block * BLOCK_T
    if sequence == num_sequences:
        zero_rows(q_grad + head * D, first, num_rows, num_blocks * BLOCK_T, q_grad_t, D, BLOCK_D, BLOCK_T)
    else:
        last = tl.load(cu_seqlens + sequence + 1)
        if first < last:
            d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            x = tl.load(q + rows[:, None] * q_t + head * q_h + d[None, :] * q_d, mask=keep_d, other=0.0)
            g = tl.load(grad + rows[:, None] * g_t + head * g_h + e[None, :] * g_e, mask=keep_e, other=0.0)
            y = tl.load(mixed + rows[:, None] * mixed_t + head * E + e[None, :], mask=keep_e, other=0.0)
            along = tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1)
            own = stats + rows * num_heads + head
            top = tl.load(own, mask=inside, other=0.0)
            state = sequence.to(tl.int64) * num_heads + head
            _, _, scale = totals(summary + state * TILES * (E + 3), e, E, TILES)
            count = tl.load(center + state * (E + 1) + E)
            states += state * R * (E + 1)
            size = tl.sum(tl.abs(g.to(tl.float32)), axis=1) + tl.abs(along)
            shrink = 1 / tl.maximum(size, 1e-30)
            total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
            less = tl.zeros([BLOCK_T], dtype=tl.float32)
            for at in tl.range(0, R, BLOCK_R, num_stages=STAGES):
                r = at + tl.arange(0, BLOCK_R)
                high, low = vectors_at(vectors, r, d, R, D, SPLIT)
                s, z = states_at(states, r, e, E, R)
                s, z = s * scale, (z + eps * count) * scale
                power = tl.exp2(products(x, high, low, SPLIT, PRECISION) - top[:, None])
                moved = tl.dot(g, tl.trans(s.to(g.dtype)), input_precision=PRECISION)
                moved = (moved - along[:, None] * z[None, :]) * shrink[:, None]
                moved *= power
                if R % BLOCK_R:
                    moved = tl.where((r < R)[None, :], moved, 0.0)
                less += tl.sum(moved, axis=1)
                total = tl.dot(moved.to(x.dtype), high, total, input_precision=PRECISION)
            rate = 1 / tl.load(own + 2 * num_rows * num_heads, mask=inside, other=float("inf"))
            index = tl.load(own + num_rows * num_heads, mask=inside, other=0.0).to(tl.int32)
            w, rest = vectors_at(vectors, index, d, R, D, SPLIT)
            w = w.to(tl.float32)
            if SPLIT:
                w += rest.to(tl.float32)
            total -= less[:, None] * (2 * energy * x.to(tl.float32) + w)
            total *= (tl.exp2(-energies(x, energy)) * rate / (scale * shrink))[:, None]
            tl.store(q_grad + rows[:, None] * q_grad_t + head * D + d[None, :], total * LN2, mask=keep_d)


@triton.jit
def key_gradients_kernel(
    k,
    v,
    real,
    vectors,
    states_grad,
    summary_grad,
    summary,
    center,
    place,
    k_grad,
    v_grad,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_blocks,
    energy,
    eps,
    k_t,
    k_h,
    k_d,
    v_t,
    v_h,
    v_e,
    k_grad_t,
    v_grad_t,
    MASKED: tl.constexpr,
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
    """From the gradients of states s, z those of k and v, zeros at filler rows and those that are not real;
    the powers' are X_r = s_r . v + z_r.
    """
    sequence = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens + sequence) + block * BLOCK_T
    if sequence == num_sequences:
        step = num_blocks * BLOCK_T
        zero_rows(k_grad + head * D, first, num_rows, step, k_grad_t, D, BLOCK_D, BLOCK_T)
        zero_rows(v_grad + head * E, first, num_rows, step, v_grad_t, E, BLOCK_E, BLOCK_T)
    else:
        last = tl.load(cu_seqlens + sequence + 1)
        if first < last:
            d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            written = rows < last
            inside = written
            if MASKED:
                inside = inside & (tl.load(real + rows, mask=inside, other=0) != 0)
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            x = tl.load(k + rows[:, None] * k_t + head * k_h + d[None, :] * k_d, mask=keep_d, other=0.0)
            y = tl.load(v + rows[:, None] * v_t + head * v_h + e[None, :] * v_e, mask=keep_e, other=0.0)
            state = sequence.to(tl.int64) * tl.num_programs(1) + head
            summary_grad += state * TILES * (E + 3)
            sums, _, scale = totals(summary_grad, e, E, TILES)
            states_grad += state * R * (E + 1)
            mean = tl.load(center + state * (E + 1) + e, mask=e < E, other=0.0)
            y = tl.where(keep_e, y.to(tl.float32) - mean[None, :], 0.0).to(y.dtype)
            shrink = 1 / (1 + tl.sum(tl.abs(y.to(tl.float32)), axis=1))
            top = tl.full([BLOCK_T], NOTHING, dtype=tl.float32)
            along = tl.zeros([BLOCK_T], dtype=tl.float32)
            x_grad = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
            y_grad = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
            for at in tl.range(0, R, BLOCK_R, num_stages=STAGES):
                r = at + tl.arange(0, BLOCK_R)
                high, low = vectors_at(vectors, r, d, R, D, SPLIT)
                s, z = states_at(states_grad, r, e, E, R)
                s = (s * scale).to(y.dtype)
                p = products(x, high, low, SPLIT, PRECISION)
                if R % BLOCK_R:
                    p = tl.where((r < R)[None, :], p, float("-inf"))
                larger = tl.maximum(top, tl.max(p, axis=1))
                rise = tl.exp2(top - larger)
                power = tl.exp2(p - larger[:, None])
                moved = (tl.dot(y, tl.trans(s), input_precision=PRECISION) + (z * scale)[None, :]) * shrink[
                    :, None
                ]
                moved *= power
                along = along * rise + tl.sum(moved, axis=1)
                x_grad = tl.dot(moved.to(x.dtype), high, x_grad * rise[:, None], input_precision=PRECISION)
                power = (power * LIFT).to(y.dtype)
                y_grad = tl.dot(power, s, y_grad * rise[:, None], input_precision=PRECISION)
                top = larger
            tile = tl.arange(0, TILES_LOADED)
            more = tl.load(summary_grad + tile * (E + 3) + E + 2, mask=tile < TILES, other=0.0)
            stabiliser = tl.load(summary + state * TILES * (E + 3) + E + 2)
            down = tl.exp2(top - energies(x, energy) - stabiliser) / scale
            index = tl.load(place + 2 * state + 1)
            w = tl.load(vectors + index * D + d, mask=d < D, other=0.0).to(tl.float32)
            if SPLIT:
                w += tl.load(vectors + (R + index) * D + d, mask=d < D, other=0.0).to(tl.float32)
            x_grad -= along[:, None] * (2 * energy) * x.to(tl.float32)
            x_grad *= (down / shrink)[:, None]
            attains = rows == tl.load(place + 2 * state)
            x_grad -= tl.where(attains, tl.sum(more, axis=0), 0.0)[:, None] * w[None, :]
            y_grad = y_grad * (down / LIFT)[:, None] + eps * sums[None, :]
            x_grad, y_grad = tl.where(keep_d, x_grad * LN2, 0.0), tl.where(keep_e, y_grad, 0.0)
            place_d = k_grad + rows[:, None] * k_grad_t + head * D + d[None, :]
            place_e = v_grad + rows[:, None] * v_grad_t + head * E + e[None, :]
            tl.store(place_d, x_grad, mask=written[:, None] & (d < D)[None, :])
            tl.store(place_e, y_grad, mask=written[:, None] & (e < E)[None, :])


def query_gradients(
    q: Tensor,
    grad: Tensor,
    mixed: Tensor,
    vectors: Tensor,
    states: Tensor,
    summary: Tensor,
    center: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    energy: float,
    eps: float,
) -> Tensor:
    (num_rows, heads, _), e = q.shape, grad.shape[-1]
    q_grad = torch.empty_like(q, memory_format=torch.contiguous_format)
    options = row_options(vectors, e)
    num_blocks = max(triton.cdiv(max_len, options["BLOCK_T"]), 1)
    with torch.cuda.device_of(q):
        query_gradients_kernel[(cu_seqlens.shape[0] * num_blocks, heads)](
            q,
            grad,
            mixed,
            vectors,
            states,
            summary,
            center,
            stats,
            q_grad,
            cu_seqlens.contiguous(),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_blocks,
            energy,
            eps,
            *q.stride(),
            *grad.stride(),
            mixed.stride(0),
            q_grad.stride(0),
            TILES=summary.shape[2],
            **options,
            STAGES=2,
        )
    return q_grad


def key_gradients(
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    vectors: Tensor,
    states_grad: Tensor,
    summary_grad: Tensor,
    summary: Tensor,
    center: Tensor,
    place: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    energy: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    (num_rows, heads, _), e = k.shape, v.shape[-1]
    k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    options = row_options(vectors, e)
    num_blocks = max(triton.cdiv(max_len, options["BLOCK_T"]), 1)
    with torch.cuda.device_of(k):
        key_gradients_kernel[(cu_seqlens.shape[0] * num_blocks, heads)](
            k,
            v,
            k if real is None else real.contiguous(),
            vectors,
            states_grad,
            summary_grad,
            summary,
            center,
            place,
            k_grad,
            v_grad,
            cu_seqlens.contiguous(),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_blocks,
            energy,
            eps,
            *k.stride(),
            *v.stride(),
            k_grad.stride(0),
            v_grad.stride(0),
            MASKED=real is not None,
            TILES=summary_grad.shape[2],
            **options,
            STAGES=2,
        )
    return k_grad, v_grad
