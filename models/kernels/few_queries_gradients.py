"""Triton kernels of the gradients in models/few_queries.py; the conventions are those of few_queries.py.

Weights are computed anew, rows along the first side: so the gradients of a row's key and value stay where the
row is. Those of the queries, sums over rows, are added up by a second kernel where several programs share a
sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.few_keys import LOG2_E, kept, keys_of, options_of, part_size, row_bits, rows_of
from models.kernels.few_keys_gradients import ADDED, add_parts_kernel
from models.kernels.few_queries import MIN_PART, PROGRAMS, finite, seen_rows
from models.kernels.linear import zero_rows

# b sequences, t packed rows, h heads, m queries of a sequence, d, e widths


@triton.jit
def gradients_kernel(
    q,
    k,
    v,
    real,
    seed,
    grad,
    mixed,
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
    g_b,
    g_m,
    g_h,
    g_e,
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
    """The gradients of k [t h d] and v [t h e], and that of q in parts, q_grad[part b m h d].

    With weights p, the output o = p v and its gradient g, that of scores is p (g v^T - g . o).
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    if sequence == num_sequences:
        for row in tl.range(first, num_rows, parts * part_rows):
            last = tl.minimum(num_rows, row + part_rows)
            zero_rows(k_grad + head * D, row, last, BLOCK_T, heads * D, D, BLOCK_D, BLOCK_T)
            zero_rows(v_grad + head * E, row, last, BLOCK_T, heads * E, E, BLOCK_E, BLOCK_T)
    else:
        last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
        if (first < last) | (part == 0):
            at = sequence.to(tl.int64)
            slots, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            valid, place = slots < M, at * M * heads + head
            y = keys_of(q + at * q_b + head * q_h, slots, valid, q_m, q_d, D, BLOCK_D)
            g = keys_of(grad + at * g_b + head * g_h, slots, valid, g_m, g_e, E, BLOCK_E)
            o = keys_of(mixed + place * E, slots, valid, heads * E, 1, E, BLOCK_E)
            drift = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
            total = finite(tl.load(sums + place + slots * heads, mask=valid, other=0.0))
            of_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
                rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
                inside = rows < last
                seen = seen_rows(real, rows, inside, USED)
                x = rows_of(k + head * k_h, rows, seen, k_t, k_d, D, BLOCK_D)
                z = rows_of(v + head * v_h, rows, seen, v_t, v_e, E, BLOCK_E)
                weights = tl.exp2(tl.dot(x, tl.trans(y)) * scale_2 - total[None, :])  # [t m]
                weights = tl.where(seen[:, None], weights, 0.0)
                of_weights = tl.dot(z, tl.trans(g))
                if KEEP_FROM:
                    bits = row_bits(seed, rows, head)
                    stay = kept(bits[:, None], slots[None, :], KEEP_FROM)
                    of_weights = tl.where(stay, of_weights * GAIN, 0.0)
                    of_v = tl.dot(tl.where(stay, weights * GAIN, 0.0).to(g.dtype), g)
                else:
                    of_v = tl.dot(weights.to(g.dtype), g)
                of_scores = (weights * (of_weights - drift[None, :])).to(x.dtype)
                of_k = tl.dot(of_scores, y) * scale
                of_q = tl.dot(tl.trans(of_scores), x, of_q)
                keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
                tl.store(k_grad + (rows[:, None] * heads + head) * D + d[None, :], of_k, mask=keep_d)
                tl.store(v_grad + (rows[:, None] * heads + head) * E + e[None, :], of_v, mask=keep_e)
            q_grad += (part.to(tl.int64) * num_sequences * M * heads + place) * D
            keep = valid[:, None] & (d < D)[None, :]
            tl.store(q_grad + slots[:, None] * heads * D + d[None, :], of_q * scale, mask=keep)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    sums: Tensor,
    max_len: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype from that of the output, [b m h e]; the rest as in `forward`."""
    (batch_size, m, heads, d), num_rows = q.shape, k.shape[0]
    q_grad, k_grad, v_grad = (x.new_empty(x.shape) for x in (q, k, v))
    part_rows = part_size(num_rows * heads, max_len, PROGRAMS, MIN_PART)
    parts = max(triton.cdiv(max_len, part_rows), 1)
    cu_seqlens = cu_seqlens.contiguous()
    partial = q.new_empty(parts, *q.shape, dtype=torch.float32) if parts > 1 else q_grad
    options = options_of(q, v, real, dropout)
    few = options["BLOCK_M"] <= 16 and max(options["BLOCK_D"], options["BLOCK_E"]) <= 32
    with torch.cuda.device_of(q):
        gradients_kernel[((batch_size + 1) * parts, heads)](
            q,
            k,
            v,
            q if real is None else real.contiguous(),
            q if seed is None else seed,
            grad,
            out.contiguous(),
            sums.contiguous(),
            partial,
            k_grad,
            v_grad,
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
            **options,
            BLOCK_T=128 if few else 64,  # registers
            STAGES=2,
            num_warps=4,
        )
        if parts > 1:
            size = m * heads
            grid = batch_size, triton.cdiv(size * d, ADDED)
            places = cu_seqlens, part_rows, partial.stride(0)
            add_parts_kernel[grid](partial, q_grad, q_grad, *places, SIZE=size, D=d, E=0, BLOCK=ADDED)
    return q_grad, k_grad, v_grad
