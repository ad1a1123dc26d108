"""Softmax attention from packed rows to the few keys of their sequence: slots, mixtures or landmarks.

For half precision, at most 256 keys and heads of at most 64 numbers, on a CUDA GPU the Triton kernels of
models/kernels/few_keys.py compute it, gradients included; elsewhere FlashAttention where that runs, or torch
with explicit scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.common import at_least_fp32, full_precision, masked_softmax
from models.packed import CHUNK, Chunks
from models.row_products import HALF, WIDEST, runs_kernels
from models.softmax import compacted, even_bounds, flash, flash_runs

# b sequences, t packed rows, h heads, m keys of a sequence, d, e widths, n chunks, c places of a chunk

MOST_KEYS = 256


def few_keys_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    used: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax_j(scale q_i . k_j) v_j over the keys j of i's sequence, those alone with used [b m] bool if
    that is given; `scale` defaults to d ** -0.5.

    q: [t h d], k: [b m h d], v: [b m h e] -> [t h e] in the dtype of v, zeros at filler rows and for a
    sequence without a used key. Filler rows and keys that are not used reach nothing.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not fits(q, k, v):
        flash_takes = flash_runs(q, k, v) and q.shape[-1] == v.shape[-1]
        attend = _by_flash if flash_takes else _explicit
        return attend(q, k, v, cu_seqlens, max_len, used, dropout, scale)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout else None
    return _few_keys(q, k, v, used, seed, cu_seqlens, max_len, dropout, scale)[0]


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if `few_keys_attention` of these is the kernels' to compute; k: [b m h d]."""
    half = q.dtype in HALF and q.dtype == k.dtype == v.dtype
    narrow = q.shape[-1] <= WIDEST and v.shape[-1] <= WIDEST and k.shape[1] <= MOST_KEYS
    return half and narrow and runs_kernels(q, k, v)


def _by_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    used: Tensor | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """Of what the kernel leaves at filler rows and at keys without rows, gradients included, nothing reaches
    a product.
    """
    some = (cu_seqlens.diff() > 0)[:, None, None, None]  # sequences with rows
    real = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    max_keys = k.shape[1]
    if used is None:
        cu_keys = even_bounds(k)
        k, v = (torch.where(some, x, 0).flatten(0, 1) for x in (k, v))
    else:
        k, v = (torch.where(used[:, :, None, None], x, 0) for x in (k, v))
        seen = (used | ~used.any(dim=1, keepdim=True)) & some[:, :, 0, 0]  # without a used key: zeros
        k, v, cu_keys = compacted(k, v, seen)
    q = torch.where(real, q, 0) * (scale * q.shape[-1] ** 0.5)  # the kernel scales by d ** -0.5
    mixed = flash(q, k, v, cu_seqlens.to(torch.int32), cu_keys, max_len, max_keys, dropout=dropout)
    return torch.where(real, mixed, 0)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    used: Tensor | None,
    dropout: float,
    scale: float,
) -> Tensor:
    size = max(CHUNK, k.shape[1])  # each chunk gets a copy of its sequence's keys
    size = size if max_len > 4 * size else max_len
    chunks = Chunks.of(cu_seqlens, q.shape[0], size=size, max_len=max_len)
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    if used is not None:
        k, v = (x.masked_fill(~used[:, :, None, None], 0) for x in (k, v))
        used = chunks.of_sequence(used)[:, None, None]  # [n 1 1 m]
    with full_precision(q):
        q, k, v = chunks.lay_out(q), chunks.spread(k), chunks.spread(v)
        scores = torch.einsum("nchd,nmhd->nhcm", q * scale, k)
        weights = F.dropout(masked_softmax(scores, used), dropout)
        mixed = torch.einsum("nhcm,nmhe->nche", weights, v)
    return chunks.take_back(mixed).to(dtype)


@torch.library.custom_op("lra::few_keys", mutates_args=())
def _few_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    max_len: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The second result is kept for gradients: [t h], the logarithm to base 2 of the sum of exponentials;
    nothing is written at filler rows.
    """
    from models.kernels import few_keys

    return few_keys.forward(q, k, v, used, seed, cu_seqlens, max_len, dropout, scale)


@_few_keys.register_fake
def _(q, k, v, used, seed, cu_seqlens, max_len, dropout, scale):
    return v.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("lra::few_keys_gradients", mutates_args=())
def _few_keys_gradients(
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
    """Gradients of q, k and v. It has none itself: autograd raises at a second derivative."""
    from models.kernels import few_keys_gradients

    return few_keys_gradients.backward(grad, q, k, v, used, seed, cu_seqlens, sums, max_len, dropout, scale)


@_few_keys_gradients.register_fake
def _(grad, q, k, v, used, seed, cu_seqlens, sums, max_len, dropout, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.max_len, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad, unused):
    return *_few_keys_gradients(grad, *ctx.saved_tensors, ctx.max_len, ctx.dropout, ctx.scale), *[None] * 6


_few_keys.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.few_keys)
def _flops(q, k, v, *others, out_shape=None) -> int:
    return _product(q, k) + _product((*q[:2], v[-1]), k)


@register_flop_formula(torch.ops.lra.few_keys_gradients)
def _gradient_flops(grad, q, k, v, *others, out_shape=None) -> int:
    return 3 * _product(q, k) + 2 * _product(grad, k)  # scores anew, as torch counts its fused attention


def _product(rows, k) -> int:
    """Operations of one product of rows [t h d] with the keys [b m h d] of their sequences."""
    t, h, d = rows
    return 2 * t * h * d * k[1]
