"""Triton kernels of models/depthwise.py: products of band matrices with the rows of packed sequences.

Operands are in half precision, sums in float32. A program holds the band of its head and goes through several
blocks of rows. Sums over rows are made in parts of fixed size that are added in a fixed order, and nothing is
timed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.linear import zero_rows
from models.kernels.rows import block_size
from models.row_products import WIDEST

# b sequences, t packed rows, h heads, d channels, i rows of a block, w rows that it reads

STEPS = 4  # blocks of rows that one program goes through
PART = 256  # rows that are added up without a break
PROGRAMS = 256  # for each head, whose sums are added at last


@triton.jit
def apply_kernel(
    bands,
    x,
    base,
    out,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_parts,
    x_t,
    x_h,
    x_d,
    b_t,
    b_h,
    b_d,
    out_t,
    ADDS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    """out[t h d] = bands[h i w] times x[t h d] from (WIDTH - ROWS) / 2 rows before a block of ROWS on, plus
    base[t h d] if ADDS; zeros at filler rows.
    """
    sequence = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens + sequence)
    if sequence == num_sequences:
        first = start + part * ROWS
        zero_rows(out + head * D, first, num_rows, num_parts * ROWS, out_t, D, BLOCK_D, ROWS)
    else:
        first, last = start + part * STEPS * ROWS, tl.load(cu_seqlens + sequence + 1)
        if first < last:
            i, w, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_D)
            place = bands + (head * ROWS + i[:, None]) * WIDTH + w[None, :]
            band = tl.load(place, mask=(w < WIDTH)[None, :], other=0.0)
            band = band.to(x.dtype.element_ty)
            for row in tl.range(first, tl.minimum(last, first + STEPS * ROWS), ROWS):
                around = row - (WIDTH - ROWS) // 2 + w
                keep = ((around >= start) & (around < last) & (w < WIDTH))[:, None] & (d < D)[None, :]
                y = x + around.to(tl.int64)[:, None] * x_t + head * x_h + d[None, :] * x_d
                total = tl.dot(band, tl.load(y, mask=keep, other=0.0))
                rows = (row + i).to(tl.int64)
                keep = (rows < last)[:, None] & (d < D)[None, :]
                if ADDS:
                    y = base + rows[:, None] * b_t + head * b_h + d[None, :] * b_d
                    total += tl.load(y, mask=keep, other=0.0).to(tl.float32)
                tl.store(out + rows[:, None] * out_t + head * D + d[None, :], total, mask=keep)


@triton.jit
def gradients_kernel(
    grad,
    x,
    out,
    cu_seqlens,
    num_units,
    num_parts,
    g_t,
    g_h,
    g_d,
    x_t,
    x_h,
    x_d,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[p h i w] = sum over the blocks of program p of grad[t h d] times rows of x[t h d]."""
    head = tl.program_id(1).to(tl.int64)
    i, w, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_W], dtype=tl.float32)
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0)):
        sequence, part = unit // num_parts, unit % num_parts
        start, last = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
        first = start + part * PART
        for row in tl.range(first, tl.minimum(last, first + PART), ROWS, num_stages=STAGES):
            rows = (row + i).to(tl.int64)
            keep = (rows < last)[:, None] & (d < D)[None, :]
            g = tl.load(grad + rows[:, None] * g_t + head * g_h + d[None, :] * g_d, mask=keep, other=0.0).to(
                x.dtype.element_ty
            )
            around = row - (WIDTH - ROWS) // 2 + w
            keep = ((around >= start) & (around < last) & (w < WIDTH))[:, None] & (d < D)[None, :]
            y = x + around.to(tl.int64)[:, None] * x_t + head * x_h + d[None, :] * x_d
            total = tl.dot(g, tl.trans(tl.load(y, mask=keep, other=0.0)), total)
    out += ((tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * ROWS + i[:, None]) * WIDTH
    tl.store(out + w[None, :], total, mask=(w < WIDTH)[None, :])


def apply(bands: Tensor, x: Tensor, base: Tensor | None, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """bands [h i w], x and base [t h d] -> [t h d] in the dtype of x."""
    (num_rows, heads, d), (_, rows, width) = x.shape, bands.shape
    out = x.new_empty(x.shape)
    num_parts = max(triton.cdiv(max_len, STEPS * rows), 1)
    base_or_x = x if base is None else base
    if out.numel():
        with torch.cuda.device_of(x):
            apply_kernel[(cu_seqlens.shape[0] * num_parts, heads)](
                bands.contiguous(),
                x,
                base_or_x,
                out,
                cu_seqlens.contiguous(),
                cu_seqlens.shape[0] - 1,
                num_rows,
                num_parts,
                *x.stride(),
                *base_or_x.stride(),
                out.stride(0),
                ADDS=base is not None,
                STEPS=STEPS,
                **_options(d, rows, width),
            )
    return out


def gradients(grad: Tensor, x: Tensor, cu_seqlens: Tensor, rows: int, width: int, max_len: int) -> Tensor:
    """That of bands [h rows width], float32."""
    heads, d = x.shape[1:]
    num_parts = max(triton.cdiv(max_len, PART), 1)
    num_units = (cu_seqlens.shape[0] - 1) * num_parts
    out = x.new_empty(min(num_units, PROGRAMS), heads, rows, width, dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(x):
            gradients_kernel[(out.shape[0], heads)](
                grad,
                x,
                out,
                cu_seqlens.contiguous(),
                num_units,
                num_parts,
                *grad.stride(),
                *x.stride(),
                PART=PART,
                STAGES=3,
                **_options(d, rows, width),
            )
    return out.sum(0)


def _options(d: int, rows: int, width: int) -> dict:
    block_w = triton.next_power_of_2(width)
    sizes = {"D": d, "ROWS": rows, "WIDTH": width, "BLOCK_W": block_w, "BLOCK_D": block_size(d, WIDEST)}
    return {**sizes, "num_warps": 4}
