"""Normalised linear attention within packed sequences: sums over rows, feature map and division in one.

For float32 and half precision and heads of at most 64 numbers, on a CUDA GPU the Triton kernels of
models/kernels/linear.py compute it, gradients included; elsewhere torch, around models/row_products.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.common import at_least_fp32
from models.row_products import WIDEST, linear_sums, runs_kernels

# b sequences, t packed rows, h heads, d, e widths


def normalised_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    eps: float,
    add_eps: bool = False,
    feature: str = "none",
    real: Tensor | None = None,
) -> Tensor:
    """sum_j (f(q_i) . f(k_j)) v_j / max(sum_j f(q_i) . f(k_j), eps) over the rows j of i's sequence, those
    alone with real [t] bool if that is given; `add_eps` adds eps in place of the maximum.

    q, k: [t h d], v: [t h e], feature: a name that `mapped` knows -> [t h e] in the dtype of v, zeros at
    filler rows.
    """
    if fits_kernels(q, k, v):
        return _linear_rows(q, k, v, real, cu_seqlens, max_len, feature, eps, add_eps)[0]
    q, k = mapped(q, feature), mapped(k, feature)
    if real is not None:
        k = k * real[:, None, None]
    return divided(*linear_sums(q, k, v, cu_seqlens, max_len), eps, add_eps).to(v.dtype)


def fits_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if `normalised_sums` of these is the kernels' to compute."""
    return q.shape[-1] <= WIDEST and v.shape[-1] <= WIDEST and runs_kernels(q, k, v)


def mapped(x: Tensor, feature: str) -> Tensor:
    """Features by name: "none", x itself, or "elu", elu(x) + 1 in at least float32."""
    if feature == "none":
        return x
    assert feature == "elu", feature
    (x,) = at_least_fp32(x)
    return F.elu(x) + 1


def divided(mixed: Tensor, norm: Tensor, eps: float, add_eps: bool) -> Tensor:
    return mixed / (norm + eps if add_eps else norm.clamp_min(eps))


@torch.library.custom_op("lra::linear_rows", mutates_args=())
def _linear_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor,
    max_len: int,
    feature: str,
    eps: float,
    add_eps: bool,
) -> tuple[Tensor, Tensor]:
    """The second result is kept for gradients: [b h d e+1], the states and behind them the sums of keys."""
    from models.kernels import linear

    where = cu_seqlens, max_len
    states = linear.key_sums(k, v, real, *where, feature=feature)
    out = linear.mixed(q, states, *where, dtype=v.dtype, feature=feature, eps=eps, add_eps=add_eps)
    return out, states


@_linear_rows.register_fake
def _(q, k, v, real, cu_seqlens, max_len, feature, eps, add_eps):
    _, heads, d = q.shape
    states = q.new_empty(cu_seqlens.shape[0] - 1, heads, d, v.shape[-1] + 1, dtype=torch.float32)
    return v.new_empty(v.shape), states


@torch.library.custom_op("lra::linear_rows_gradients", mutates_args=())
def _linear_rows_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    feature: str,
    eps: float,
    add_eps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. It has none itself: autograd raises at a second derivative."""
    from models.kernels import linear_gradients

    where, rule = (cu_seqlens, max_len), {"feature": feature, "eps": eps, "add_eps": add_eps}
    q_grad, states_grad = linear_gradients.query_gradients(q, grad, states, *where, **rule)
    return q_grad, *linear_gradients.key_gradients(k, v, real, states_grad, *where, feature=feature)


@_linear_rows_gradients.register_fake
def _(grad, q, k, v, real, states, cu_seqlens, max_len, feature, eps, add_eps):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.max_len, ctx.feature, ctx.eps, ctx.add_eps = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad, unused):
    q, k, v, real, cu_seqlens, states = ctx.saved_tensors
    rule = ctx.max_len, ctx.feature, ctx.eps, ctx.add_eps
    return *_linear_rows_gradients(grad, q, k, v, real, states, cu_seqlens, *rule), *[None] * 6


_linear_rows.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.linear_rows)
def _flops(q, k, v, *others, out_shape=None) -> int:
    return 2 * _products(q, v)


@register_flop_formula(torch.ops.lra.linear_rows_gradients)
def _gradient_flops(grad, q, k, v, *others, out_shape=None) -> int:
    return 4 * _products(q, v)


def _products(q, v) -> int:
    """Operations of one product of rows [t h d] with [t h e] or with states, the normaliser included."""
    t, h, d = q
    return 2 * t * h * d * (v[-1] + 1)
