"""Softmax attention from the few queries of a sequence, slots or landmarks, to its packed rows.

For half precision, at most 64 queries and heads of at most 64 numbers, on a CUDA GPU the Triton kernels of
models/kernels/few_queries.py compute it, gradients included; elsewhere FlashAttention where that runs and all
rows are real, or torch with explicit scores.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.row_products import HALF, WIDEST, runs_kernels, sum_chunks
from models.softmax import even_bounds, flash, flash_runs
from models.sums import segment_softmax

# b sequences, t packed rows, h heads, m queries of a sequence, d, e widths

MOST_QUERIES = 64


def few_queries_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    real: Tensor | None = None,
    dropout: float = 0.0,
    filler: bool = True,
) -> Tensor:
    """softmax_j(q_i . k_j / sqrt(d)) v_j over the rows j of i's sequence, those alone with real [t] bool if
    that is given.

    q: [b m h d], k: [t h d], v: [t h e] -> [b m h e] in the dtype of v, zeros for a sequence without such
    rows. Filler rows and rows that are not real reach nothing. `filler` False: every row is a sequence's, and
    every sequence has one.
    """
    if fits(q, k, v):
        seed = torch.randint(2**62, (1,), device=q.device) if dropout else None
        return _few_queries(q, k, v, real, seed, cu_seqlens, max_len, dropout, q.shape[-1] ** -0.5)[0]
    if real is None and flash_runs(q, k, v) and k.shape[-1] == v.shape[-1]:
        return _by_flash(q, k, v, cu_seqlens, max_len, dropout, filler)
    chunks = sum_chunks(cu_seqlens, k.shape[0], max_len)
    if real is not None:
        k, v = (x.masked_fill(~real[:, None, None], 0) for x in (k, v))
        chunks = replace(chunks, inside=chunks.lay_out(real.to(k.dtype)) > 0)
    return segment_softmax(q, chunks.lay_out(k), chunks.lay_out(v), chunks, dropout=dropout)


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if `few_queries_attention` of these is the kernels' to compute; q: [b m h d]."""
    half = q.dtype in HALF and q.dtype == k.dtype == v.dtype
    narrow = q.shape[-1] <= WIDEST and v.shape[-1] <= WIDEST and q.shape[1] <= MOST_QUERIES
    return half and narrow and runs_kernels(q, k, v)


def _by_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, dropout: float, filler: bool
) -> Tensor:
    """With `filler`, of what the kernel leaves there and where a sequence has no rows, gradients included,
    nothing reaches a product.
    """
    if filler:
        some = (cu_seqlens.diff() > 0)[:, None, None, None]  # sequences with rows
        real = (torch.arange(k.shape[0], device=k.device) < cu_seqlens[-1])[:, None, None]
        q, k, v = torch.where(some, q, 0), torch.where(real, k, 0), torch.where(real, v, 0)
    sizes = even_bounds(q), cu_seqlens.to(torch.int32), q.shape[1], max_len
    mixed = flash(q.flatten(0, 1), k, v, *sizes, dropout=dropout).unflatten(0, q.shape[:2])
    return torch.where(some, mixed, 0) if filler else mixed


@torch.library.custom_op("lra::few_queries", mutates_args=())
def _few_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    max_len: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The second result is kept for gradients: [b m h], log2 of the sums of exponentials."""
    from models.kernels import few_queries

    return few_queries.forward(q, k, v, real, seed, cu_seqlens, max_len, dropout, scale)


@_few_queries.register_fake
def _(q, k, v, real, seed, cu_seqlens, max_len, dropout, scale):
    return v.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("lra::few_queries_gradients", mutates_args=())
def _few_queries_gradients(
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
    """Gradients of q, k and v. It has none itself: autograd raises at a second derivative."""
    from models.kernels import few_queries_gradients

    return few_queries_gradients.backward(
        grad, q, k, v, real, seed, cu_seqlens, out, sums, max_len, dropout, scale
    )


@_few_queries_gradients.register_fake
def _(grad, q, k, v, real, seed, cu_seqlens, out, sums, max_len, dropout, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.max_len, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, unused):
    grads = _few_queries_gradients(grad, *ctx.saved_tensors, ctx.max_len, ctx.dropout, ctx.scale)
    return *grads, *[None] * 6


_few_queries.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.few_queries)
def _flops(q, k, v, *others, out_shape=None) -> int:
    return _product(q, k) + _product(q, v)


@register_flop_formula(torch.ops.lra.few_queries_gradients)
def _gradient_flops(grad, q, k, v, *others, out_shape=None) -> int:
    return 3 * _product(q, k) + 2 * _product(q, v)  # scores anew, as torch counts its fused attention


def _product(q, rows) -> int:
    """Operations of one product of the queries [b m h d] of sequences with their rows [t h d]."""
    t, h, d = rows
    return 2 * t * h * d * q[1]
