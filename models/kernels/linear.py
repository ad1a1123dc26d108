"""Triton kernels of models/linear_rows.py, for heads of at most 64 numbers; gradients: linear_gradients.py.

Feature maps are computed where rows are read and the division where results are written, so that nothing of
the size of the rows is kept but q, k, v and the output. Products, sums over rows and block sizes are as in
rows.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.rows import block_size, part_size, tf32_parts
from models.row_products import WIDEST

# b sequences, t packed rows, h heads, d, e widths; a state [d e+1] has the sum of keys as its last column

FEATURES = {"none": 0, "elu": 1}  # x, elu(x) + 1


@triton.jit
def mapped(x, FEATURE: tl.constexpr):
    x = x.to(tl.float32)
    if FEATURE == 1:
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0)))
    return x


@triton.jit
def through_map(grad, x, FEATURE: tl.constexpr):
    """The gradient of x from that of its features."""
    if FEATURE == 1:
        grad = tl.where(x > 0, grad, grad * tl.exp(tl.minimum(x.to(tl.float32), 0)))
    return grad


@triton.jit
def zero_rows(
    out, first, num_rows, step, out_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Zeros in out[rows, WIDTH] for rows first, ..., first + ROWS - 1, again from first + step on, ..."""
    cols = tl.arange(0, BLOCK)
    for row in tl.range(first, num_rows, step):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        nothing = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        keep = (rows < num_rows)[:, None] & (cols < WIDTH)[None, :]
        tl.store(out + rows[:, None] * out_t + cols[None, :], nothing, mask=keep)


@triton.jit
def key_sums_kernel(
    k,
    v,
    real,
    out,
    cu_seqlens,
    parts,
    part_rows,
    k_t,
    k_h,
    k_d,
    v_t,
    v_h,
    v_e,
    out_part,
    FEATURE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[part, b h d e+1] = sum of f(k)[t h d] times v[t h e] and 1 over the real rows of a part."""
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
    total = tl.zeros([BLOCK_D, BLOCK_E], dtype=tl.float32)
    keys = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = rows < last
        if MASKED:
            inside = inside & (tl.load(real + rows, mask=inside, other=0) != 0)
        keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
        x = tl.load(k + rows[:, None] * k_t + head * k_h + d[None, :] * k_d, mask=keep_d, other=0.0)
        y = tl.load(v + rows[:, None] * v_t + head * v_h + e[None, :] * v_e, mask=keep_e, other=0.0)
        x = tl.where(keep_d, mapped(x, FEATURE), 0.0)
        keys += x
        total = tl.dot(tl.trans(x), y.to(tl.float32), total, input_precision=PRECISION)
    out += part.to(tl.int64) * out_part + (sequence.to(tl.int64) * tl.num_programs(1) + head) * D * (E + 1)
    tl.store(out + d[:, None] * (E + 1) + e[None, :], total, mask=(d < D)[:, None] & (e < E)[None, :])
    tl.store(out + d * (E + 1) + E, tl.sum(keys, axis=0), mask=d < D)


@triton.jit
def mixed_kernel(
    q,
    states,
    out,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_blocks,
    eps,
    q_t,
    q_h,
    q_d,
    out_t,
    FEATURE: tl.constexpr,
    ADD_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[t h e] = f(q)[t h d] states[b h d e] over the same with their last column; zeros at filler rows."""
    sequence = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens + sequence) + block * BLOCK_T
    if sequence == num_sequences:
        zero_rows(out + head * E, first, num_rows, num_blocks * BLOCK_T, out_t, E, BLOCK_E, BLOCK_T)
    else:
        last = tl.load(cu_seqlens + sequence + 1)
        if first < last:
            d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            x = tl.load(q + rows[:, None] * q_t + head * q_h + d[None, :] * q_d, mask=keep_d, other=0.0)
            x = tl.where(keep_d, mapped(x, FEATURE), 0.0)
            states += (sequence.to(tl.int64) * tl.num_programs(1) + head) * D * (E + 1)
            keep = (d < D)[:, None] & (e < E)[None, :]
            s = tl.load(states + d[:, None] * (E + 1) + e[None, :], mask=keep, other=0.0)
            z = tl.load(states + d * (E + 1) + E, mask=d < D, other=0.0)
            norm = tl.sum(x * z[None, :], axis=1)
            norm = norm + eps if ADD_EPS else tl.maximum(norm, eps)
            y = tl.dot(x, s, input_precision=PRECISION) / norm[:, None]
            tl.store(out + rows[:, None] * out_t + head * E + e[None, :], y, mask=keep_e)


def key_sums(
    k: Tensor, v: Tensor, real: Tensor | None, cu_seqlens: Tensor, max_len: int, *, feature: str
) -> Tensor:
    """k [t h d], v [t h e], real [t] bool -> states [b h d e+1] float32."""
    batch_size, (_, heads, d), e = cu_seqlens.shape[0] - 1, k.shape, v.shape[-1]
    out, parts, part_rows = state_parts(k, batch_size, heads, d, e, max_len)
    with torch.cuda.device_of(k):
        key_sums_kernel[(batch_size * parts, heads)](
            k,
            v,
            k if real is None else real.contiguous(),
            out,
            cu_seqlens.contiguous(),
            parts,
            part_rows,
            *k.stride(),
            *v.stride(),
            out.stride(0),
            FEATURE=FEATURES[feature],
            MASKED=real is not None,
            **options_of(d, e, rows=32),
            STAGES=3,
        )
    return added(out)


def mixed(
    q: Tensor,
    states: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    dtype: torch.dtype,
    feature: str,
    eps: float,
    add_eps: bool,
) -> Tensor:
    """q [t h d], states [b h d e+1] -> [t h e] of `dtype`."""
    (num_rows, heads, d), e = q.shape, states.shape[-1] - 1
    out = q.new_empty(num_rows, heads, e, dtype=dtype)
    options = options_of(d, e)
    num_blocks = max(triton.cdiv(max_len, options["BLOCK_T"]), 1)
    with torch.cuda.device_of(q):
        mixed_kernel[(cu_seqlens.shape[0] * num_blocks, heads)](
            q,
            states,
            out,
            cu_seqlens.contiguous(),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_blocks,
            eps,
            *q.stride(),
            out.stride(0),
            FEATURE=FEATURES[feature],
            ADD_EPS=add_eps,
            **options,
        )
    return out


def state_parts(
    x: Tensor, batch_size: int, heads: int, d: int, e: int, max_len: int
) -> tuple[Tensor, int, int]:
    """Memory for parts of states [b h d e+1], their number, and the rows of each."""
    part_rows = part_size(max_len, batch_size * heads)
    parts = max(triton.cdiv(max_len, part_rows), 1)
    return x.new_empty(parts, batch_size, heads, d, e + 1, dtype=torch.float32), parts, part_rows


def added(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.shape[0] > 1 else parts.squeeze(0)


def options_of(d: int, e: int, *, rows: int = 0, wide_warps: int = 4) -> dict:
    block_d, block_e = block_size(d, WIDEST), block_size(e, WIDEST)
    narrow = max(block_d, block_e) <= 32
    return {
        "PRECISION": tf32_parts(),
        "D": d,
        "E": e,
        "BLOCK_T": rows or (128 if narrow else 64),  # registers
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "num_warps": 4 if narrow else wide_warps,
    }
