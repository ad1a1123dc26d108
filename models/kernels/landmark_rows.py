"""Triton kernel of models/landmark_rows.py: sums over contiguous rows, one program for each landmark.

Rows are read once and added up in a fixed order in float32. Nothing is timed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# n landmarks, t packed rows, h heads, d width

BLOCK_C = 64  # columns of a program


@triton.jit
def sums_kernel(
    x,
    y,
    x_out,
    y_out,
    bounds,
    x_t,
    x_h,
    x_d,
    y_t,
    y_h,
    y_d,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x_out, y_out[n h d] = sums of x, y[t h d] over the rows from bounds[n] to bounds[n + 1]."""
    landmark = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    head, d = cols // D, cols % D
    first, last = tl.load(bounds + landmark), tl.load(bounds + landmark + 1)
    x_total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    y_total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for row in range(first, last, BLOCK_T):
        rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
        keep = (rows < last)[:, None] & (cols < HEADS * D)[None, :]
        x_at = rows[:, None] * x_t + (head * x_h + d * x_d)[None, :]
        y_at = rows[:, None] * y_t + (head * y_h + d * y_d)[None, :]
        x_total += tl.load(x + x_at, mask=keep, other=0.0).to(tl.float32)
        y_total += tl.load(y + y_at, mask=keep, other=0.0).to(tl.float32)
    place = landmark * HEADS * D + cols
    tl.store(x_out + place, tl.sum(x_total, axis=0), mask=cols < HEADS * D)
    tl.store(y_out + place, tl.sum(y_total, axis=0), mask=cols < HEADS * D)


def sums(x: Tensor, y: Tensor, bounds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x, y [t h d], bounds [n+1], landmarks of at most `size` rows -> twice [n h d] float32."""
    _, heads, d = x.shape
    num_landmarks = bounds.shape[0] - 1
    shape = num_landmarks, heads, d
    x_out, y_out = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    if x_out.numel():
        with torch.cuda.device_of(x):
            sums_kernel[(num_landmarks, triton.cdiv(heads * d, BLOCK_C))](
                x,
                y,
                x_out,
                y_out,
                bounds.contiguous(),
                *x.stride(),
                *y.stride(),
                HEADS=heads,
                D=d,
                BLOCK_T=min(triton.next_power_of_2(size), 32),
                BLOCK_C=BLOCK_C,
                num_warps=4 if size > 16 else 2,
            )
    return x_out, y_out
