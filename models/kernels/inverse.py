"""Triton kernels of models/landmarks.py: the iterated inverse, one program for each matrix.

A program runs all iterations. Its products read both operands from memory, where they stay in the caches, in
slices of STEP columns and rows: registers hold one result, and up to 64 rows nothing spills from them. They
run on tensor cores in three parts of TensorFloat-32 (close to float32), or in one where torch's own products
take one. Nothing is timed, and every sum has a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# k iterations, c matrices, m rows and columns


@triton.jit
def product(
    x,
    x_row,
    x_col,
    y,
    y_row,
    y_col,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y of two matrices in memory, zeros beyond M rows and columns."""
    rows = tl.arange(0, BLOCK)
    keep = rows < M
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for at in range(0, M, STEP):
        inner = at + tl.arange(0, STEP)
        left = x + rows[:, None] * x_row + inner[None, :] * x_col
        right = y + inner[:, None] * y_row + rows[None, :] * y_col
        left = tl.load(left, mask=keep[:, None] & (inner < M)[None, :], other=0.0)
        right = tl.load(right, mask=(inner < M)[:, None] & keep[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def put(place, x, inside):
    """Stores x, when all threads have read what lies there, and lets all threads read it."""
    tl.debug_barrier()
    tl.store(place, x, mask=inside)
    tl.debug_barrier()


@triton.jit
def factors(
    a,
    z,
    p,
    s,
    u,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p = a z, s = 15 I - p (7 I - p) and u = 13 I - p s, in memory; u may lie where s does."""
    rows = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (rows < M)[None, :]
    place = rows[:, None] * M + rows[None, :]
    eye = (rows[:, None] == rows[None, :]).to(tl.float32)
    x = product(a, M, 1, z, M, 1, M, BLOCK, STEP, PRECISION)
    put(p + place, x, inside)
    x = 15 * eye - 7 * x + product(p, M, 1, p, M, 1, M, BLOCK, STEP, PRECISION)
    put(s + place, x, inside)
    x = 13 * eye - product(p, M, 1, s, M, 1, M, BLOCK, STEP, PRECISION)
    put(u + place, x, inside)


@triton.jit
def forward_kernel(
    a,
    start,
    kept,
    inverse,
    scratch,
    num_iterations,
    num_matrices,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """kept[k c m m] = Z_(k + 1) with Z_0 = start[c m m], but the last one is inverse[c m m].

    scratch: [c 2 m m]; all are contiguous.
    """
    rows = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (rows < M)[None, :]
    place = rows[:, None] * M + rows[None, :]
    own = tl.program_id(0).to(tl.int64) * M * M
    z = start + own
    p = scratch + 2 * own
    u = p + M * M
    for k in range(num_iterations):
        factors(a + own, z, p, u, u, M, BLOCK, STEP, PRECISION)
        x = product(z, M, 1, u, M, 1, M, BLOCK, STEP, PRECISION) * 0.25
        z = kept + (k * num_matrices).to(tl.int64) * M * M + own
        if k == num_iterations - 1:
            z = inverse + own
        put(z + place, x, inside)


@triton.jit
def backward_kernel(
    a,
    start,
    kept,
    scratch,
    a_grad,
    g,
    num_iterations,
    num_matrices,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g[c m m] holds the gradient of the inverse first and that of start at last, a_grad[c m m] that of a.

    scratch: [c 5 m m]; all are contiguous.
    """
    rows = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (rows < M)[None, :]
    place = rows[:, None] * M + rows[None, :]
    own = tl.program_id(0).to(tl.int64) * M * M
    a += own
    g += own
    p = scratch + 5 * own
    s = p + M * M
    u = s + M * M
    u_grad = u + M * M
    s_grad = u_grad + M * M  # negated
    for k in range(num_iterations):
        z = kept + ((num_iterations - 2 - k) * num_matrices).to(tl.int64) * M * M + own
        if k == num_iterations - 1:
            z = start + own
        factors(a, z, p, s, u, M, BLOCK, STEP, PRECISION)
        x = product(z, 1, M, g, M, 1, M, BLOCK, STEP, PRECISION) * 0.25
        put(u_grad + place, x, inside)
        x = product(p, 1, M, u_grad, M, 1, M, BLOCK, STEP, PRECISION)
        put(s_grad + place, x, inside)
        x = 7 * x - product(u_grad, M, 1, s, 1, M, M, BLOCK, STEP, PRECISION)
        x -= product(s_grad, M, 1, p, 1, M, M, BLOCK, STEP, PRECISION)
        x -= product(p, 1, M, s_grad, M, 1, M, BLOCK, STEP, PRECISION)
        p_grad = s
        put(p_grad + place, x, inside)
        x = product(p_grad, M, 1, z, 1, M, M, BLOCK, STEP, PRECISION)
        if k > 0:
            x += tl.load(a_grad + own + place, mask=inside, other=0.0)
        tl.store(a_grad + own + place, x, mask=inside)
        x = product(g, M, 1, u, 1, M, M, BLOCK, STEP, PRECISION) * 0.25
        x += product(a, 1, M, p_grad, M, 1, M, BLOCK, STEP, PRECISION)
        put(g + place, x, inside)


def forward(a: Tensor, start: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """The last iterate and those between start and it: a, start [c m m] float32 -> [c m m], [k-1 c m m]."""
    a, start = a.contiguous(), start.contiguous()
    inverse, kept = torch.empty_like(a), a.new_empty(num_iterations - 1, *a.shape)
    scratch = a.new_empty(a.shape[0], 2, *a.shape[1:])
    if a.numel():
        arguments = a, start, kept, inverse, scratch, num_iterations, a.shape[0]
        with torch.cuda.device_of(a):
            forward_kernel[(a.shape[0],)](*arguments, **_options(a.shape[-1]))
    return inverse, kept


def backward(grad: Tensor, a: Tensor, start: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and start from that of the inverse: all [c m m] float32, kept [k-1 c m m]."""
    a, start, kept = a.contiguous(), start.contiguous(), kept.contiguous()
    a_grad, start_grad = torch.empty_like(a), grad.clone(memory_format=torch.contiguous_format)
    scratch = a.new_empty(a.shape[0], 5, *a.shape[1:])
    if a.numel():
        arguments = a, start, kept, scratch, a_grad, start_grad, kept.shape[0] + 1, a.shape[0]
        with torch.cuda.device_of(a):
            backward_kernel[(a.shape[0],)](*arguments, **_options(a.shape[-1]))
    return a_grad, start_grad


def _options(rows: int) -> dict[str, int | str]:
    block = max(triton.next_power_of_2(rows), 16)  # a tensor core's product has sides of 16
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    step = min(block, 32)
    return {"M": rows, "BLOCK": block, "STEP": step, "PRECISION": precision, "num_warps": 4, "num_stages": 2}
