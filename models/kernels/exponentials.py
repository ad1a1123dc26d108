"""Triton kernels of models/exponentials.py. Projections are not kept but computed wherever they are used."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.rows import block_size, tf32_parts

# t rows, h heads, d width (at most 64), r features

BLOCK_T = BLOCK_R = 64


@triton.jit
def top_kernel(
    x,
    features,
    top,
    slope,
    num_rows,
    x_t,
    x_h,
    x_d,
    D: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """top[t h] = max over r of x . features[r], slope[t h d] its gradient by x: the mean of those largest."""
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    keep = (rows < num_rows)[:, None] & (d < D)[None, :]
    y = tl.load(x + rows[:, None] * x_t + head * x_h + d[None, :] * x_d, mask=keep, other=0.0)
    best = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    count = tl.zeros([BLOCK_T], dtype=tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for at in tl.range(0, R, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        w = tl.load(
            features + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0
        )
        projected = tl.dot(y, tl.trans(w), input_precision=PRECISION)
        projected = tl.where((r < R)[None, :], projected, float("-inf"))
        larger = tl.maximum(best, tl.max(projected, axis=1))
        is_top = tl.where(projected == larger[:, None], 1.0, 0.0)
        before = tl.where(best == larger, 1.0, 0.0)
        count = count * before + tl.sum(is_top, axis=1)
        total = tl.dot(is_top, w, total * before[:, None], input_precision=PRECISION)
        best = larger
    place = rows * num_heads + head
    tl.store(top + place, best, mask=rows < num_rows)
    tl.store(slope + place[:, None] * D + d[None, :], total / count[:, None], mask=keep)


@triton.jit
def exponentials_kernel(
    x,
    features,
    offset,
    out,
    num_rows,
    eps,
    x_t,
    x_h,
    x_d,
    o_t,
    o_h,
    D: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[t h r] = exp(x . features[r] - offset[t h]) + eps"""
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < num_rows
    d, r = tl.arange(0, BLOCK_D), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep = inside[:, None] & (d < D)[None, :]
    y = tl.load(x + rows[:, None] * x_t + head * x_h + d[None, :] * x_d, mask=keep, other=0.0)
    w = tl.load(features + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    less = tl.load(offset + rows * o_t + head * o_h, mask=inside, other=0.0)
    power = tl.exp(tl.dot(y, tl.trans(w), input_precision=PRECISION) - less[:, None])
    place = out + (rows * num_heads + head)[:, None] * R + r[None, :]
    tl.store(place, power + eps, mask=inside[:, None] & (r < R)[None, :])


@triton.jit
def gradients_kernel(
    grad,
    x,
    features,
    offset,
    x_grad,
    offset_grad,
    num_rows,
    g_t,
    g_h,
    g_r,
    x_t,
    x_h,
    x_d,
    o_t,
    o_h,
    D: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Those of x [t h d] and offset [t h] from grad [t h r] of the exponentials."""
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < num_rows
    d = tl.arange(0, BLOCK_D)
    keep = inside[:, None] & (d < D)[None, :]
    y = tl.load(x + rows[:, None] * x_t + head * x_h + d[None, :] * x_d, mask=keep, other=0.0)
    less = tl.load(offset + rows * o_t + head * o_h, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    along = tl.zeros([BLOCK_T], dtype=tl.float32)
    for at in tl.range(0, R, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        w = tl.load(
            features + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0
        )
        keep_r = inside[:, None] & (r < R)[None, :]
        g = tl.load(grad + rows[:, None] * g_t + head * g_h + r[None, :] * g_r, mask=keep_r, other=0.0)
        power = tl.exp(tl.dot(y, tl.trans(w), input_precision=PRECISION) - less[:, None])
        g = tl.where(keep_r, g * power, 0.0)
        along += tl.sum(g, axis=1)
        total = tl.dot(g, w, total, input_precision=PRECISION)
    place = rows * num_heads + head
    tl.store(x_grad + place[:, None] * D + d[None, :], total, mask=keep)
    tl.store(offset_grad + place, -along, mask=inside)


def top(x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """x [t h d], features [r d], both float32 -> the largest products [t h] and their gradients [t h d]."""
    num_rows, heads, d = x.shape
    out, slope = x.new_empty(num_rows, heads), x.new_empty(x.shape)
    if out.numel():
        with torch.cuda.device_of(x):
            top_kernel[(triton.cdiv(num_rows, BLOCK_T), heads)](
                x, features.contiguous(), out, slope, num_rows, *x.stride(), **_options(d, len(features))
            )
    return out, slope


def exponentials(x: Tensor, features: Tensor, offset: Tensor, eps: float) -> Tensor:
    """x [t h d], features [r d], offset [t h], all float32 -> [t h r]."""
    (num_rows, heads, d), num_features = x.shape, len(features)
    out = x.new_empty(num_rows, heads, num_features)
    if out.numel():
        grid = triton.cdiv(num_rows, BLOCK_T), heads, triton.cdiv(num_features, BLOCK_R)
        with torch.cuda.device_of(x):
            exponentials_kernel[grid](
                x,
                features.contiguous(),
                offset,
                out,
                num_rows,
                eps,
                *x.stride(),
                *offset.stride(),
                **_options(d, num_features),
            )
    return out


def gradients(grad: Tensor, x: Tensor, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and of offset."""
    num_rows, heads, d = x.shape
    x_grad, offset_grad = x.new_empty(x.shape), x.new_empty(num_rows, heads)
    if x_grad.numel():
        with torch.cuda.device_of(x):
            gradients_kernel[(triton.cdiv(num_rows, BLOCK_T), heads)](
                grad,
                x,
                features.contiguous(),
                offset,
                x_grad,
                offset_grad,
                num_rows,
                *grad.stride(),
                *x.stride(),
                *offset.stride(),
                **_options(d, len(features)),
            )
    return x_grad, offset_grad


def _options(d: int, num_features: int) -> dict:
    return {
        "D": d,
        "R": num_features,
        "PRECISION": tf32_parts(),
        "BLOCK_T": BLOCK_T,
        "BLOCK_D": block_size(d, 64),
        "BLOCK_R": BLOCK_R,
        "num_warps": 4,
    }
