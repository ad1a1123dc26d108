"""Triton kernels of the gradients in models/linear_rows.py; the conventions are those of linear.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.linear import FEATURES, added, mapped, options_of, state_parts, through_map, zero_rows

# b sequences, t packed rows, h heads, d, e widths


@triton.jit
def query_gradients_kernel(
    q,
    grad,
    states,
    q_grad,
    out,
    cu_seqlens,
    num_sequences,
    num_rows,
    parts,
    part_rows,
    eps,
    q_t,
    q_h,
    q_d,
    g_t,
    g_h,
    g_e,
    q_grad_t,
    out_part,
    FEATURE: tl.constexpr,
    ADD_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """From the gradient of the output that of q, and of the states in parts, out[part, b h d e+1].

    With x = f(q), m = x s, n = x . z and the output m / n: the gradient of m is g / n, that of n is
    -(g . m) / n^2, and g . m = x . (g s^T).
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    if sequence == num_sequences:
        for row in tl.range(first, num_rows, parts * part_rows):
            last = tl.minimum(num_rows, row + part_rows)
            zero_rows(q_grad + head * D, row, last, BLOCK_T, q_grad_t, D, BLOCK_D, BLOCK_T)
    else:
        last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        state = (sequence.to(tl.int64) * tl.num_programs(1) + head) * D * (E + 1)
        keep = (e < E)[:, None] & (d < D)[None, :]
        s = tl.load(states + state + d[None, :] * (E + 1) + e[:, None], mask=keep, other=0.0)  # [e d]
        z = tl.load(states + state + d * (E + 1) + E, mask=d < D, other=0.0)
        total = tl.zeros([BLOCK_D, BLOCK_E], dtype=tl.float32)
        keys = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            raw = tl.load(q + rows[:, None] * q_t + head * q_h + d[None, :] * q_d, mask=keep_d, other=0.0)
            g = tl.load(grad + rows[:, None] * g_t + head * g_h + e[None, :] * g_e, mask=keep_e, other=0.0)
            x, g = tl.where(keep_d, mapped(raw, FEATURE), 0.0), g.to(tl.float32)
            along = tl.dot(g, s, input_precision=PRECISION)  # [t d]
            norm = tl.sum(x * z[None, :], axis=1)
            norm_grad = -tl.sum(x * along, axis=1)
            if ADD_EPS:
                rate = 1 / (norm + eps)
                norm_grad = norm_grad * rate * rate
            else:
                rate = 1 / tl.maximum(norm, eps)
                norm_grad = tl.where(norm >= eps, norm_grad * rate * rate, 0.0)
            x_grad = along * rate[:, None] + norm_grad[:, None] * z[None, :]
            place = q_grad + rows[:, None] * q_grad_t + head * D + d[None, :]
            tl.store(place, through_map(x_grad, raw, FEATURE), mask=keep_d)
            keys += x * norm_grad[:, None]
            total = tl.dot(tl.trans(x), g * rate[:, None], total, input_precision=PRECISION)
        out += part.to(tl.int64) * out_part + state
        tl.store(out + d[:, None] * (E + 1) + e[None, :], total, mask=(d < D)[:, None] & (e < E)[None, :])
        tl.store(out + d * (E + 1) + E, tl.sum(keys, axis=0), mask=d < D)


@triton.jit
def key_gradients_kernel(
    k,
    v,
    real,
    states,
    k_grad,
    v_grad,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_blocks,
    k_t,
    k_h,
    k_d,
    v_t,
    v_h,
    v_e,
    k_grad_t,
    v_grad_t,
    FEATURE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """From the gradients of the states those of k and v, zeros at filler rows and those that are not real."""
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
            raw = tl.load(k + rows[:, None] * k_t + head * k_h + d[None, :] * k_d, mask=keep_d, other=0.0)
            y = tl.load(v + rows[:, None] * v_t + head * v_h + e[None, :] * v_e, mask=keep_e, other=0.0)
            states += (sequence.to(tl.int64) * tl.num_programs(1) + head) * D * (E + 1)
            keep = (d < D)[:, None] & (e < E)[None, :]
            s = tl.load(states + d[:, None] * (E + 1) + e[None, :], mask=keep, other=0.0)
            z = tl.load(states + d * (E + 1) + E, mask=d < D, other=0.0)
            x_grad = tl.dot(y.to(tl.float32), tl.trans(s), input_precision=PRECISION) + z[None, :]
            x_grad = tl.where(keep_d, through_map(x_grad, raw, FEATURE), 0.0)
            x = tl.where(keep_d, mapped(raw, FEATURE), 0.0)
            y_grad = tl.dot(x, s, input_precision=PRECISION)
            place_d = k_grad + rows[:, None] * k_grad_t + head * D + d[None, :]
            place_e = v_grad + rows[:, None] * v_grad_t + head * E + e[None, :]
            tl.store(place_d, x_grad, mask=written[:, None] & (d < D)[None, :])
            tl.store(place_e, y_grad, mask=written[:, None] & (e < E)[None, :])


def query_gradients(
    q: Tensor,
    grad: Tensor,
    states: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    feature: str,
    eps: float,
    add_eps: bool,
) -> tuple[Tensor, Tensor]:
    """q [t h d], grad [t h e] of the output -> gradients of q and of states [b h d e+1]."""
    batch_size, (num_rows, heads, d), e = cu_seqlens.shape[0] - 1, q.shape, grad.shape[-1]
    out, parts, part_rows = state_parts(q, batch_size, heads, d, e, max_len)
    q_grad = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        query_gradients_kernel[((batch_size + 1) * parts, heads)](
            q,
            grad,
            states,
            q_grad,
            out,
            cu_seqlens.contiguous(),
            batch_size,
            num_rows,
            parts,
            part_rows,
            eps,
            *q.stride(),
            *grad.stride(),
            q_grad.stride(0),
            out.stride(0),
            FEATURE=FEATURES[feature],
            ADD_EPS=add_eps,
            **options_of(d, e, rows=64, wide_warps=8),
            STAGES=2,
        )
    return q_grad, added(out)


def key_gradients(
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    states_grad: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    feature: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of k [t h d] and v [t h e] from those of states [b h d e+1]."""
    (num_rows, heads, d), e = k.shape, v.shape[-1]
    k_grad, v_grad = k.new_empty(k.shape), v.new_empty(v.shape)
    options = options_of(d, e, rows=64, wide_warps=8)
    num_blocks = max(triton.cdiv(max_len, options["BLOCK_T"]), 1)
    with torch.cuda.device_of(k):
        key_gradients_kernel[(cu_seqlens.shape[0] * num_blocks, heads)](
            k,
            v,
            k if real is None else real.contiguous(),
            states_grad,
            k_grad,
            v_grad,
            cu_seqlens.contiguous(),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_blocks,
            *k.stride(),
            *v.stride(),
            k_grad.stride(0),
            v_grad.stride(0),
            FEATURE=FEATURES[feature],
            MASKED=real is not None,
            **options,
        )
    return k_grad, v_grad
