"""Attention through positive random features of softmax within packed sequences, features never written.

For rows of one dtype, float32 or (with eps of at least 1e-8) half precision, heads of at most 64 numbers and
at most 512 features, on a CUDA GPU the Triton kernels of models/kernels/random_features.py compute it,
gradients included; where it does not fit them, models/performer.py has it in torch. In half precision the
products in exponents are exact up to float32, those of powers with values and states are of operands rounded
once.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.row_products import WIDEST, runs_kernels

# b sequences, t packed rows, h heads, d, e widths, r features

MOST_FEATURES = 512
LEAST_EPS = 1e-8  # in half precision
TILE = 64  # features that a program of a kernel holds at a time


def fits_kernels(q: Tensor, k: Tensor, v: Tensor, features: Tensor, eps: float) -> bool:
    """True if `feature_attention` can compute these.

    In half precision what gradients of k and v are made of is about eps in size, and below LEAST_EPS it would
    underflow.
    """
    narrow = q.shape[-1] <= WIDEST and v.shape[-1] <= WIDEST and features.shape[0] <= MOST_FEATURES
    alike = q.dtype == k.dtype == v.dtype and features.dtype == torch.float32
    held = q.dtype == torch.float32 or eps >= LEAST_EPS
    return narrow and alike and held and runs_kernels(q, k, v, features)


def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    eps: float,
    power: float,
    floor: float,
    real: Tensor | None = None,
) -> Tensor:
    """sum_j (f(q_i) . f(k_j)) v_j / max(sum_j f(q_i) . f(k_j), floor) over the rows j of i's sequence, those
    alone with real [t] bool if that is given; f of models/performer.py with x' = x / d^power, c the largest
    w_r . x' of q_i, or of the keys of a sequence and head; of several that attain it one gets its gradient.

    q, k: [t h d], v: [t h e], features: [r d], without gradient -> [t h e], zeros at filler rows.
    """
    return _feature_rows(q, k, v, real, features, cu_seqlens, max_len, eps, power, floor)[0]


@torch.library.custom_op("lra::feature_rows", mutates_args=())
def _feature_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    eps: float,
    power: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All but the first result are kept for gradients: vectors, states, summary, center, place, the output
    less the mean, and stats.
    """
    from models.kernels import random_features, random_features_keys

    where, energy = (cu_seqlens, max_len), _energy(q, power)
    vectors = random_features.split(features, q.shape[-1] ** -power * math.log2(math.e), q.dtype)
    kept = random_features_keys.key_sums(k, v, real, vectors, *where, energy=energy, eps=eps)
    rule = {"energy": energy, "eps": eps, "floor": floor}
    out, *own = random_features.mixed(q, vectors, *kept[:3], *where, **rule)
    return out, vectors, *kept, *own


@_feature_rows.register_fake
def _(q, k, v, real, features, cu_seqlens, max_len, eps, power, floor):
    (num_rows, heads, _), (r, d), e = q.shape, features.shape, v.shape[-1]
    num_tiles, sequences = -(-r // TILE), cu_seqlens.shape[0] - 1
    return (
        v.new_empty(v.shape),
        q.new_empty(1 if q.dtype == torch.float32 else 2, r, d),
        q.new_empty(sequences, heads, r * (e + 1), dtype=torch.float32),
        q.new_empty(sequences, heads, num_tiles, e + 3, dtype=torch.float32),
        q.new_empty(sequences, heads, e + 1, dtype=torch.float32),
        q.new_empty(sequences, heads, 2, dtype=torch.int32),
        v.new_empty(v.shape),
        q.new_empty(3, num_rows, heads, dtype=torch.float32),
    )


@torch.library.custom_op("lra::feature_rows_gradients", mutates_args=())
def _feature_rows_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor,
    vectors: Tensor,
    states: Tensor,
    summary: Tensor,
    center: Tensor,
    place: Tensor,
    part: Tensor,
    stats: Tensor,
    max_len: int,
    eps: float,
    power: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. It has none itself: autograd raises at a second derivative."""
    from models.kernels import random_features_gradients as gradients
    from models.kernels.random_features_states import state_gradients

    where, rule = (cu_seqlens, max_len), {"energy": _energy(q, power), "eps": eps}
    given = q, grad, part, vectors
    states_grad = state_gradients(*given, states, summary, stats, *where, **rule, floor=floor)
    q_grad = gradients.query_gradients(*given, states, summary, center, stats, *where, **rule)
    return q_grad, *gradients.key_gradients(
        k, v, real, vectors, *states_grad, summary, center, place, *where, **rule
    )


@_feature_rows_gradients.register_fake
def _(grad, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _energy(q: Tensor, power: float) -> float:
    """What a row's squares are multiplied by in exponents of base 2."""
    return q.shape[-1] ** (-2 * power) / 2 * math.log2(math.e)


def _keep(ctx, inputs, output):
    q, k, v, real, _, cu_seqlens, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, real, cu_seqlens, *output[1:])


def _backward(ctx, grad, *unused):
    return *_feature_rows_gradients(grad, *ctx.saved_tensors, *ctx.rule), *[None] * 7


_feature_rows.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.feature_rows)
def _flops(q, k, v, real, features, *others, out_shape=None) -> int:
    t, h, d = q
    return 2 * 2 * t * h * features[0] * (d + v[-1] + 1)  # exponents, and sums with their normaliser


@register_flop_formula(torch.ops.lra.feature_rows_gradients)
def _gradient_flops(grad, q, k, v, real, cu_seqlens, vectors, *others, out_shape=None) -> int:
    t, h, d = q
    return 2 * 2 * t * h * vectors[1] * (d + 2 * (v[-1] + 1))  # those of exponents are for q and k alone
