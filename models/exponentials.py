"""Exponentials of products of rows with fixed vectors, as random features of softmax consist of them.

In float32 with widths of at most 64, on a CUDA GPU the Triton kernels of models/kernels/exponentials.py
compute them and write neither the products nor their gradients; elsewhere torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.row_products import WIDEST, matrix_rows, runs_kernels

# b batch, t rows, h heads, l length, d width, r features


def stable_exponentials(
    x: Tensor, features: Tensor, energy: Tensor, stabiliser: Callable[[Tensor], Tensor], eps: float
) -> Tensor:
    """exp(w_r . x - energy - c) + eps with c = stabiliser(max over r of w_r . x).

    x: [t h d] or [b h l d], features: [r d], without gradient, energy: x without its last axis, as what
    `stabiliser` gets and returns -> [t h r] or [b h l r].
    """
    if x.shape[-1] > WIDEST or x.dtype != torch.float32 or not runs_kernels(x, features):
        projected = matrix_rows(x, features)
        offset = energy + stabiliser(projected.amax(dim=-1))
        return (projected - offset.unsqueeze(-1)).exp() + eps
    if x.dim() == 3:
        offset = energy + stabiliser(_row_top(x, features)[0])
        return _row_exponentials(x, features, offset, eps)
    rows = x.transpose(1, 2).flatten(0, 1)  # [b*l h d]
    shape = x.shape[0], x.shape[2]
    top = _row_top(rows, features)[0].unflatten(0, shape).transpose(1, 2)
    offset = (energy + stabiliser(top)).transpose(1, 2).flatten(0, 1)
    return _row_exponentials(rows, features, offset, eps).unflatten(0, shape).transpose(1, 2)


@torch.library.custom_op("lra::row_top", mutates_args=())
def _row_top(x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The second result is kept for the gradient of x: the mean of the vectors whose products are largest."""
    from models.kernels import exponentials

    return exponentials.top(x, features)


@_row_top.register_fake
def _(x, features):
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape)


def _keep_slope(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _top_backward(ctx, grad, unused):
    (slope,) = ctx.saved_tensors
    return grad.unsqueeze(-1) * slope, None


_row_top.register_autograd(_top_backward, setup_context=_keep_slope)


@torch.library.custom_op("lra::row_exponentials", mutates_args=())
def _row_exponentials(x: Tensor, features: Tensor, offset: Tensor, eps: float) -> Tensor:
    from models.kernels import exponentials

    return exponentials.exponentials(x, features, offset, eps)


@_row_exponentials.register_fake
def _(x, features, offset, eps):
    return x.new_empty(*x.shape[:2], features.shape[0])


@torch.library.custom_op("lra::row_exponentials_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and offset. It has none itself: autograd raises at a second derivative."""
    from models.kernels import exponentials

    return exponentials.gradients(grad, x, features, offset)


@_gradients.register_fake
def _(grad, x, features, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape[:2])


def _keep(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x_grad, offset_grad = _gradients(grad, *ctx.saved_tensors)
    return x_grad, None, offset_grad, None


_row_exponentials.register_autograd(_backward, setup_context=_keep)


@register_flop_formula([torch.ops.lra.row_top, torch.ops.lra.row_exponentials])
def _flops(x, features, *others, out_shape=None) -> int:
    t, h, d = x
    return 2 * t * h * d * features[0]


@register_flop_formula(torch.ops.lra.row_exponentials_gradients)
def _gradient_flops(grad, x, features, *others, out_shape=None) -> int:
    return 2 * _flops(x, features)
