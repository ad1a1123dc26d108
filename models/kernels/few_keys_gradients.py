"""Triton kernels of the gradients in models/few_keys.py; the conventions are those of few_keys.py.

Weights are computed anew, keys along the first side: so the gradients of keys and values, sums over rows,
stay with the program that holds the keys, and those of a sequence that several programs share are added up by
a second kernel in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.few_keys import (
    LOG2_E,
    kept,
    keys_of,
    options_of,
    part_size,
    row_bits,
    rows_of,
    valid_keys,
)
from models.kernels.linear import zero_rows

# b sequences, t packed rows, h heads, m keys of a sequence, d, e widths

MIN_PART = 256  # rows
ADDED = 1024  # numbers that one program adds up


@triton.jit
def gradients_kernel(
    q,
    k,
    v,
    used,
    seed,
    grad,
    sums,
    q_grad,
    k_grad,
    v_grad,
    cu_seqlens,
    num_sequences,
    num_rows,
    parts,
    part_rows,
    scale,
    scale_2,
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
    g_t,
    g_h,
    g_e,
    q_grad_t,
    k_grad_part,
    k_grad_b,
    k_grad_m,
    k_grad_h,
    v_grad_part,
    v_grad_b,
    v_grad_m,
    v_grad_h,
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
    """The gradient of q [t h d], and those of k and v in parts: k_grad[part b m h d], v_grad[part b m h e].

    With weights p and the gradient g of the output, that of p is r = g v^T, that of scores p (r - sum p r).
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    if sequence == num_sequences:
        for row in tl.range(first, num_rows, parts * part_rows):
            last = tl.minimum(num_rows, row + part_rows)
            zero_rows(q_grad + head * D, row, last, BLOCK_T, q_grad_t, D, BLOCK_D, BLOCK_T)
    else:
        last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
        if (first < last) | (part == 0):
            at = sequence.to(tl.int64)
            keys, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            valid = valid_keys(used, at, keys, USED, M)
            y = keys_of(k + at * k_b + head * k_h, keys, valid, k_m, k_d, D, BLOCK_D)
            z = keys_of(v + at * v_b + head * v_h, keys, valid, v_m, v_e, E, BLOCK_E)
            of_k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            of_v = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
            for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
                rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
                inside = rows < last
                x = rows_of(q + head * q_h, rows, inside, q_t, q_d, D, BLOCK_D)
                g = rows_of(grad + head * g_h, rows, inside, g_t, g_e, E, BLOCK_E)
                total = tl.load(sums + rows * heads + head, mask=inside, other=0.0)
                weights = tl.exp2(tl.dot(y, tl.trans(x)) * scale_2 - total[None, :])  # [m t]
                if USED or M < BLOCK_M:
                    weights = tl.where(valid[:, None], weights, 0.0)
                of_weights = tl.dot(z, tl.trans(g))
                if KEEP_FROM:
                    bits = row_bits(seed, rows, head)
                    stay = kept(bits[None, :], keys[:, None], KEEP_FROM)
                    of_weights = tl.where(stay, of_weights * GAIN, 0.0)
                    of_v = tl.dot(tl.where(stay, weights * GAIN, 0.0).to(g.dtype), g, of_v)
                else:
                    of_v = tl.dot(weights.to(g.dtype), g, of_v)
                of_weights -= tl.sum(weights * of_weights, axis=0)[None, :]
                of_scores = (weights * of_weights).to(x.dtype)
                of_k = tl.dot(of_scores, x, of_k)
                of_q = tl.dot(tl.trans(of_scores), y) * scale
                keep = inside[:, None] & (d < D)[None, :]
                tl.store(q_grad + rows[:, None] * q_grad_t + head * D + d[None, :], of_q, mask=keep)
            keep_k, keep_v = (keys < M)[:, None] & (d < D)[None, :], (keys < M)[:, None] & (e < E)[None, :]
            k_grad += part.to(tl.int64) * k_grad_part + at * k_grad_b + head * k_grad_h
            v_grad += part.to(tl.int64) * v_grad_part + at * v_grad_b + head * v_grad_h
            tl.store(k_grad + keys[:, None] * k_grad_m + d[None, :], of_k * scale, mask=keep_k)
            tl.store(v_grad + keys[:, None] * v_grad_m + e[None, :], of_v, mask=keep_v)


@triton.jit
def add_parts_kernel(
    parts,
    k_grad,
    v_grad,
    cu_seqlens,
    part_rows,
    parts_part,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """k_grad and v_grad [b SIZE d], [b SIZE e] from parts[part b SIZE d+e], those of a sequence that have
    rows and the first.
    """
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place, col = at < SIZE * (D + E), at // (D + E), at % (D + E)
    length = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
    parts += sequence * SIZE * (D + E) + at
    total = tl.load(parts, mask=inside, other=0.0)
    for _ in tl.range(1, tl.cdiv(length, part_rows)):
        parts += parts_part
        total += tl.load(parts, mask=inside, other=0.0)
    tl.store(k_grad + (sequence * SIZE + place) * D + col, total, mask=inside & (col < D))
    tl.store(v_grad + (sequence * SIZE + place) * E + col - D, total, mask=inside & (col >= D))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    sums: Tensor,
    max_len: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype from that of the output, [t h e]; the rest as in `forward`."""
    (num_rows, heads, d), (batch_size, m, _, e) = q.shape, v.shape
    q_grad, k_grad, v_grad = (x.new_empty(x.shape) for x in (q, k, v))
    options = options_of(k, v, used, dropout)
    programs = 512 * max(1, min(128 // options["BLOCK_M"], 4))  # each writes gradients of all keys
    part_rows = part_size(num_rows * heads, max_len, programs, MIN_PART)
    parts = max(triton.cdiv(max_len, part_rows), 1)
    cu_seqlens = cu_seqlens.contiguous()
    if parts > 1:
        partial = q.new_empty(parts, batch_size, m, heads, d + e, dtype=torch.float32)
        k_out, v_out = partial.split([d, e], dim=-1)
    else:
        k_out, v_out = k_grad[None], v_grad[None]
    with torch.cuda.device_of(q):
        gradients_kernel[(cu_seqlens.shape[0] * parts, heads)](
            q,
            k,
            v,
            k if used is None else used.contiguous(),
            q if seed is None else seed,
            grad,
            sums,
            q_grad,
            k_out,
            v_out,
            cu_seqlens,
            batch_size,
            num_rows,
            parts,
            part_rows,
            scale,
            scale * LOG2_E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *grad.stride(),
            q_grad.stride(0),
            *k_out.stride()[:-1],
            *v_out.stride()[:-1],
            **options,
            **shape_of(options["BLOCK_M"], max(options["BLOCK_D"], options["BLOCK_E"])),
        )
        if parts > 1:
            size = m * heads
            grid = batch_size, triton.cdiv(size * (d + e), ADDED)
            places = cu_seqlens, part_rows, partial.stride(0)
            add_parts_kernel[grid](partial, k_grad, v_grad, *places, SIZE=size, D=d, E=e, BLOCK=ADDED)
    return q_grad, k_grad, v_grad


def shape_of(block_m: int, width: int) -> dict[str, int]:
    """Rows of a block and warps, such that all that a program holds fits its registers."""
    if block_m <= 32:
        return {"BLOCK_T": 128, "num_warps": 4, "STAGES": 2}
    if block_m <= 64:
        return {"BLOCK_T": 64, "num_warps": 4, "STAGES": 2}
    return {"BLOCK_T": 32 if block_m > 128 and width > 32 else 64, "num_warps": 8, "STAGES": 2}
