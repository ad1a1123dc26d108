"""Triton kernels of models/landmarks.py: the iterated inverse with operands in float16.

They have as many bits there as in TensorFloat-32, and the range is enough: no entry of a softmax is above 1,
and that of the largest iterate is some 3.25^(k / 2). Gradients are divided by their largest before each step.
One program for each matrix of at most 64 rows runs all iterations; what inverse.py writes between products
stays in its registers. Sums are in float32 and in a fixed order, and nothing is timed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# k iterations, c matrices, m rows and columns


@triton.jit
def polynomials(p, eye):
    """S = 15 I - P (7 I - P), in float16, and U = 13 I - P S of P = A Z."""
    half = p.to(tl.float16)
    s = (15 * eye - 7 * p + tl.dot(half, half)).to(tl.float16)
    return s, 13 * eye - tl.dot(half, s)


@triton.jit
def forward_kernel(
    a, start, kept, inverse, num_iterations, num_matrices, M: tl.constexpr, BLOCK: tl.constexpr
):
    """kept[k c m m] = Z_k in float16 with Z_0 = start[c m m], and the one after the last is inverse[c m m];
    all are contiguous.
    """
    rows = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (rows < M)[None, :]
    place = rows[:, None] * M + rows[None, :]
    eye = (rows[:, None] == rows[None, :]).to(tl.float32)
    own = tl.program_id(0).to(tl.int64) * M * M
    x = tl.load(a + own + place, mask=inside, other=0.0).to(tl.float16)
    z = tl.load(start + own + place, mask=inside, other=0.0)
    for k in range(num_iterations):
        half = z.to(tl.float16)
        tl.store(kept + tl.cast(k, tl.int64) * num_matrices * M * M + own + place, half, mask=inside)
        _, u = polynomials(tl.dot(x, half), eye)
        z = tl.dot(half, u.to(tl.float16)) * 0.25
    tl.store(inverse + own + place, z, mask=inside)


@triton.jit
def backward_kernel(
    grad,
    a,
    kept,
    a_grad,
    start_grad,
    num_iterations,
    num_matrices,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a_grad and start_grad[c m m] from the gradient grad[c m m] of the inverse; all are contiguous."""
    rows = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (rows < M)[None, :]
    place = rows[:, None] * M + rows[None, :]
    eye = (rows[:, None] == rows[None, :]).to(tl.float32)
    own = tl.program_id(0).to(tl.int64) * M * M
    x = tl.load(a + own + place, mask=inside, other=0.0).to(tl.float16)
    g = tl.load(grad + own + place, mask=inside, other=0.0)
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for k in range(num_iterations):
        before = kept + tl.cast(num_iterations - 1 - k, tl.int64) * num_matrices * M * M + own
        z = tl.load(before + place, mask=inside, other=0.0)
        largest = tl.max(tl.max(tl.abs(g), axis=1), axis=0)
        largest = tl.where(largest > 0, largest, 1.0)
        g_half = (g / largest).to(tl.float16)
        p = tl.dot(x, z)
        s, u = polynomials(p, eye)
        p = p.to(tl.float16)
        u_grad = (tl.dot(tl.trans(z), g_half) * 0.25).to(tl.float16)
        g = tl.dot(g_half, tl.trans(u.to(tl.float16))) * 0.25
        s_grad = -tl.dot(tl.trans(p), u_grad)
        p_grad = -7 * s_grad - tl.dot(u_grad, tl.trans(s))
        s_grad = s_grad.to(tl.float16)
        p_grad = tl.dot(s_grad, tl.trans(p), p_grad)
        p_grad = tl.dot(tl.trans(p), s_grad, p_grad).to(tl.float16)
        total += tl.dot(p_grad, tl.trans(z)) * largest
        g = tl.dot(tl.trans(x), p_grad, g) * largest
    tl.store(a_grad + own + place, total, mask=inside)
    tl.store(start_grad + own + place, g, mask=inside)


def forward(a: Tensor, start: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """The last iterate, and all before it in float16: a, start [c m m] float32 -> [c m m], [k c m m]."""
    a, start = a.contiguous(), start.contiguous()
    inverse, kept = torch.empty_like(a), a.new_empty(num_iterations, *a.shape, dtype=torch.float16)
    if a.numel():
        with torch.cuda.device_of(a):
            forward_kernel[(a.shape[0],)](
                a, start, kept, inverse, num_iterations, a.shape[0], **_options(a.shape[-1])
            )
    return inverse, kept


def backward(grad: Tensor, a: Tensor, start: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and start from that of the inverse: all [c m m] float32; kept as `forward` gives it,
    start among it.
    """
    grad, a, kept = grad.contiguous(), a.contiguous(), kept.contiguous()
    a_grad, start_grad = torch.empty_like(a), torch.empty_like(a)
    if a.numel():
        arguments = grad, a, kept, a_grad, start_grad, kept.shape[0], a.shape[0]
        with torch.cuda.device_of(a):
            backward_kernel[(a.shape[0],)](*arguments, **_options(a.shape[-1]))
    return a_grad, start_grad


def _options(rows: int) -> dict[str, int]:
    block = max(triton.next_power_of_2(rows), 16)  # a tensor core's product has sides of 16
    return {"M": rows, "BLOCK": block, "num_warps": 4, "num_stages": 2}
