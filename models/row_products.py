"""Products over packed rows that linear attention and its gradients consist of.

`row_sums` and `row_apply` are each other's gradients; `linear_sums` is both, with the normaliser. For float32
and half precision on a CUDA GPU they run the Triton kernels of models/kernels/rows.py, which read rows where
they lie and add up in float32. Elsewhere, and without Triton, torch's products run over rows laid out in
chunks.
"""

import functools
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.common import full_precision
from models.packed import CHUNK, Chunks

# b sequences, t packed rows, h heads, n chunks, c places of a chunk, d, e widths

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
WIDEST = 64  # a head's numbers that one program of most kernels holds
OLDEST = (8, 0)  # compute capability: older GPUs have no TensorFloat-32

log = logging.getLogger("lra.models.row_products")  # below `lra`: a run's log collects that

_wanted = True


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """Inside, with False, no Triton kernel of ours is used: for comparisons with torch's products."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def row_sums(a: Tensor, b: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """For each sequence the sum of a_i b_i^T over its rows i: a [t h d], b [t h e] -> [b h d e], at least
    float32, zeros for a sequence without rows.
    """
    if runs_kernels(a, b):
        return _row_sums(a, b, cu_seqlens, max_len)
    chunks = sum_chunks(cu_seqlens, a.shape[0], max_len)
    return _chunk_sums(a, b, chunks, cu_seqlens.shape[0] - 1)


def row_apply(a: Tensor, state: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """Each row times the matrix of its sequence: a [t h d], state [b h d e] -> [t h e], zeros at filler rows;
    in the wider dtype of both.
    """
    if runs_kernels(a, state):
        return _row_apply(a, state, cu_seqlens, max_len)
    return _chunk_apply(a, state, sum_chunks(cu_seqlens, a.shape[0], max_len))


def linear_sums(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """sum_j (q_i . k_j) v_j and sum_j q_i . k_j over the rows j of i's sequence.

    q, k: [t h d], v: [t h e] -> [t h e] and [t h 1], at least float32; zeros at filler rows.
    """
    if runs_kernels(q, k, v):
        mixed, norm, _ = _linear_sums(q, k, v, cu_seqlens, max_len)
        return mixed, norm
    chunks = sum_chunks(cu_seqlens, q.shape[0], max_len)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the column of ones collects the normaliser
    mixed = _chunk_apply(q, _chunk_sums(k, v, chunks, cu_seqlens.shape[0] - 1), chunks)
    return mixed[..., :-1], mixed[..., -1:]


def matrix_rows(x: Tensor, matrix: Tensor) -> Tensor:
    """Each row of x [t h d] or [b h l d] times each of matrix [r d] -> [t h r] or [b h l r]."""
    if not runs_kernels(x, matrix):
        return torch.einsum("...d,rd->...r", x, matrix)
    rows = x if x.dim() == 3 else x.transpose(1, 2).flatten(0, 1)
    num_rows, heads, _ = rows.shape
    ends = num_rows * torch.arange(2, dtype=torch.int32, device=x.device)
    out = _row_apply(rows, matrix.T.expand(1, heads, -1, -1), ends, num_rows)
    return out if x.dim() == 3 else out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def sum_chunks(cu_seqlens: Tensor, num_rows: int, max_len: int) -> Chunks:
    """Packed rows in chunks of a size for which sums over them are fast."""
    size = CHUNK if max_len > 4 * CHUNK else max_len  # cutting short sequences would leave more places unused
    return Chunks.of(cu_seqlens, num_rows, size=size, max_len=max_len)


def _chunk_sums(a: Tensor, b: Tensor, chunks: Chunks, batch_size: int) -> Tensor:
    a, b = _matched(a, b)
    with full_precision(a):
        partial = torch.einsum("nchd,nche->nhde", chunks.lay_out(a), chunks.lay_out(b))
        return chunks.sum_by_sequence(partial, batch_size)


def _chunk_apply(a: Tensor, state: Tensor, chunks: Chunks) -> Tensor:
    dtype = torch.promote_types(a.dtype, state.dtype)
    a, state = _matched(a, state)
    with full_precision(a):
        mixed = torch.einsum("nchd,nhde->nche", chunks.lay_out(a), chunks.spread(state))
    return chunks.take_back(mixed).to(dtype)


def _matched(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def runs_kernels(*tensors: Tensor) -> bool:
    """True if products over these are the Triton kernels' to compute."""
    device = tensors[0].device
    if not _wanted or device.type != "cuda" or any(x.dtype not in DTYPES for x in tensors):
        return False
    return _available(device.index)


@torch.compiler.assume_constant_result
def _available(index: int | None) -> bool:
    return not _unavailable(index)  # the compiler would trace what is cached


@functools.cache
def _unavailable(index: int | None) -> str:
    """Why Triton's kernels cannot run on a CUDA device, empty if they can; asked and logged once a device."""
    if torch.version.hip is not None:
        reason = "the kernels are written for NVIDIA's GPUs"
    elif torch.cuda.get_device_capability(index) < OLDEST:
        reason = f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]}"
    elif find_spec("triton") is None:
        reason = "triton is not installed"
    elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        reason = "triton finds no C compiler: install one or set CC"
    else:
        reason = ""
    log.info(f"products over packed rows on cuda: {f'torch, because {reason}' if reason else 'Triton'}")
    return reason


@torch.library.custom_op("lra::row_sums", mutates_args=())
def _row_sums(a: Tensor, b: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    from models.kernels import rows

    return rows.sums(a, b, cu_seqlens, max_len).view(*_states(a, cu_seqlens), b.shape[-1])


@_row_sums.register_fake
def _(a, b, cu_seqlens, max_len):
    return a.new_empty(*_states(a, cu_seqlens), b.shape[-1], dtype=torch.float32)


def _row_sums_backward(ctx, grad):
    a, b, cu_seqlens = ctx.saved_tensors
    where, (of_a, of_b, *_) = (cu_seqlens, ctx.max_len), ctx.needs_input_grad
    grad_a = _row_apply(b, grad.mT, *where).to(a.dtype) if of_a else None
    return grad_a, _row_apply(a, grad, *where).to(b.dtype) if of_b else None, None, None


def _keep(ctx, inputs, output):
    *tensors, ctx.max_len = inputs
    ctx.save_for_backward(*tensors)


_row_sums.register_autograd(_row_sums_backward, setup_context=_keep)


@torch.library.custom_op("lra::row_apply", mutates_args=())
def _row_apply(a: Tensor, state: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    from models.kernels import rows

    return rows.apply(a, state, cu_seqlens, max_len, dtype=torch.promote_types(a.dtype, state.dtype))[0]


@_row_apply.register_fake
def _(a, state, cu_seqlens, max_len):
    dtype = torch.promote_types(a.dtype, state.dtype)
    return a.new_empty(*a.shape[:2], state.shape[-1], dtype=dtype)


def _row_apply_backward(ctx, grad):
    a, state, cu_seqlens = ctx.saved_tensors
    where, (of_a, of_state, *_) = (cu_seqlens, ctx.max_len), ctx.needs_input_grad
    grad_a = _row_apply(grad, state.mT, *where).to(a.dtype) if of_a else None
    return grad_a, _row_sums(a, grad, *where).to(state.dtype) if of_state else None, None, None


_row_apply.register_autograd(_row_apply_backward, setup_context=_keep)


@torch.library.custom_op("lra::linear_sums", mutates_args=())
def _linear_sums(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The third result is kept for gradients: the numbers of states [b h d e] and of sums of keys [b h d]."""
    from models.kernels import rows

    sums = rows.sums(k, v, cu_seqlens, max_len, column=rows.ONES)
    state, column = rows.split(sums, *_states(k, cu_seqlens), v.shape[-1])
    mixed, norm = rows.apply(q, state, cu_seqlens, max_len, dtype=torch.float32, inner=column)
    return mixed, norm, sums


@_linear_sums.register_fake
def _(q, k, v, cu_seqlens, max_len):
    mixed = q.new_empty(*q.shape[:2], v.shape[-1], dtype=torch.float32)
    norm = q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
    size = math.prod(_states(k, cu_seqlens)) * (v.shape[-1] + 1)
    return mixed, norm, q.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("lra::linear_sums_gradients", mutates_args=())
def _linear_sums_gradients(
    mixed_grad: Tensor,
    norm_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. It has none itself: autograd raises at a second derivative."""
    from models.kernels import rows

    where, weight = (cu_seqlens, max_len), norm_grad.squeeze(-1)
    sizes = *_states(k, cu_seqlens), v.shape[-1]
    state, column = rows.split(sums, *sizes)
    q_grad, _ = rows.apply(mixed_grad, state.mT, *where, dtype=q.dtype, outer=column, weight=weight)
    sums_grad = rows.sums(q, mixed_grad, *where, column=rows.WEIGHTS, weight=weight)
    state, column = rows.split(sums_grad, *sizes)
    k_grad, _ = rows.apply(v, state.mT, *where, dtype=k.dtype, outer=column)
    v_grad, _ = rows.apply(k, state, *where, dtype=v.dtype)
    return q_grad, k_grad, v_grad


@_linear_sums_gradients.register_fake
def _(mixed_grad, norm_grad, q, k, v, sums, cu_seqlens, max_len):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep_with_sums(ctx, inputs, output):
    *tensors, ctx.max_len = inputs
    ctx.save_for_backward(*tensors, output[-1])


def _linear_sums_backward(ctx, mixed_grad, norm_grad, unused):
    q, k, v, cu_seqlens, sums = ctx.saved_tensors
    grads = _linear_sums_gradients(mixed_grad, norm_grad, q, k, v, sums, cu_seqlens, ctx.max_len)
    return *grads, None, None


_linear_sums.register_autograd(_linear_sums_backward, setup_context=_keep_with_sums)


@register_flop_formula([torch.ops.lra.row_sums, torch.ops.lra.row_apply])
def _product_flops(a, other, cu_seqlens, max_len, *, out_shape=None) -> int:
    """Of shapes a [t h d] and other [t h e] or [b h d e]."""
    return 2 * math.prod(a) * other[-1]


@register_flop_formula(torch.ops.lra.linear_sums)
def _linear_flops(q, k, v, cu_seqlens, max_len, *, out_shape=None) -> int:
    return 2 * 2 * math.prod(q) * (v[-1] + 1)  # 1: the normaliser


@register_flop_formula(torch.ops.lra.linear_sums_gradients)
def _gradient_flops(mixed, norm, q, k, v, sums, cu_seqlens, max_len, *, out_shape=None) -> int:
    return 2 * _linear_flops(q, k, v, cu_seqlens, max_len)


def _states(a: Tensor, cu_seqlens: Tensor) -> tuple[int, int, int]:
    """b, h and d of the states of rows a [t h d]."""
    return cu_seqlens.shape[0] - 1, *a.shape[1:]
