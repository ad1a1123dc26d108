"""The delta rule over a sequence, in chunks: what DeltaNet and Gated DeltaNet share.

One direction, each head: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t, S
as [keys values] (the papers: its transpose). What is found under key t is taken out, beta_t of it, before v_t
is put in. With pseudo-values u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t) that is S_t = exp(g_t) S_{t-1} +
k_t u_t^T, a decayed sum. Those of a chunk that starts from S solve a triangular system,
    (I + L) u = beta (v - exp(G) S^T k),   L_ij = beta_i exp(G_i - G_j) k_i . k_j for j < i,   G sums of g
so the state after the chunk is linear in S, and a scan over the chunks finds all of them (arXiv 2406.06484,
sections 3.1 and 3.2; with decay 2412.06464, section 3.3).
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import fla_kernels
from models.common import Place, at_least_fp32, full_precision
from models.directions import short_conv
from models.head_norm import head_norm
from models.scan import CHUNK, before, decay_matrix, in_chunks, matrix_scan, out_of_chunks, running_sum

# b batch, l length, h heads, n chunks, c positions of a chunk, d, e head dims (keys, values)

GAIN = 2**-2.5  # of the authors' Xavier initialisation
NORM_EPS, UNIT_EPS = 1e-5, 1e-6  # of the output's root mean square, of the squared length of a key
BLOCK = 16  # a triangle of this size is inverted by products of whole matrices


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = CHUNK,
    kernel: str = "torch",
) -> Tensor:
    """scale times o of the module docstring. q, k: [b l h d], v: [b l h e], beta, log_decay g <= 0 (None: 0):
    [b l h] -> [b l h e] in the dtype of v; `chunk` is a power of two, `kernel` one of models/fla_kernels.py.

    Where beta and g are zero the state stays as it is. Stable for |beta k.k - 1| <= 1, equal keys included.
    """
    if fla_kernels.chosen(kernel, q, k, v, beta, one_decay=log_decay is not None):
        return fla_kernels.delta_rule(q, k, v, beta, log_decay, scale=scale)
    dtype, length = v.dtype, v.shape[1]
    q, k, v = (in_chunks(x, chunk).contiguous() for x in at_least_fp32(q, k, v))  # [b h n c d]
    beta = in_chunks(*at_least_fp32(beta[..., None]), chunk)  # [b h n c 1]
    with full_precision(v):
        if log_decay is None:
            total = v.new_zeros(chunk, 1)
        else:
            total = running_sum(in_chunks(*at_least_fp32(log_decay[..., None]), chunk))
        end, ratios = total[..., -1:, :], decay_matrix(total)
        inverse = _UnitInverse.apply(_kept_small(_scores, k * beta, k, ratios).tril(-1))
        right = torch.cat([v * beta, k * (beta * total.exp())], dim=-1)
        solved = inverse @ right  # u is its first e columns minus (the other d columns) S
        left = (k * (end - total).exp()).mT @ solved
        update, lost = left.split([v.shape[-1], k.shape[-1]], dim=-1)
        transition = end.exp() * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - lost
        states = before(matrix_scan(transition, update), dim=2)  # [b h n d e]
        within = _kept_small(_scores, q, k, ratios) @ solved
        own, lost = within.split([v.shape[-1], k.shape[-1]], dim=-1)
        out = scale * (own + (q * total.exp() - lost) @ states)
    return out_of_chunks(out, length).to(dtype)


def _scores(x: Tensor, k: Tensor, ratios: Tensor) -> Tensor:
    """x_i . k_j times what is left at i of j, nothing of a later j: [... c d] -> [... c c]."""
    return (x @ k.mT) * ratios


def _kept_small(function: Callable, *args: Tensor):
    """function(*args), computed again in the backward pass instead of kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _UnitInverse(torch.autograd.Function):
    """The inverse of I + lower, lower strictly triangular; for the backward pass it keeps nothing else."""

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        inverse = unit_inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def unit_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1, lower [... c c] strictly triangular, c a power of two.

    By halves: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]. Its entries are those of products of
    (I - beta k k^T), so they stay small; the powers of `lower`, whose sum it is too, do not.
    """
    c = lower.shape[-1]
    if c <= BLOCK:
        return _small_inverse(lower)
    half = c // 2
    corners = torch.stack([lower[..., :half, :half], lower[..., half:, half:]], dim=-3)
    first, second = unit_inverse(corners).unbind(-3)
    corner = -(second @ (lower[..., half:, :half] @ first))
    return torch.cat([F.pad(first, (0, half)), torch.cat([corner, second], dim=-1)], dim=-2)


def _small_inverse(lower: Tensor) -> Tensor:
    """The same from the smallest halves up, all of one size in one product: with T the inverse of the blocks
    on the diagonal and C what lies between two of them, T - T C T is that of blocks twice as large.
    """
    place = torch.arange(lower.shape[-1], device=lower.device)
    inverse, half = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower), 1
    while half < lower.shape[-1]:
        side = place // half
        between = (side[:, None] == side + 1) & (side[:, None] % 2 == 1)
        corner = lower.masked_fill(~between, 0)
        inverse = inverse - (corner if half == 1 else inverse @ corner @ inverse)
        half *= 2
    return inverse


def unit(x: Tensor, *, norm: str = "l2", eps: float = UNIT_EPS) -> Tensor:
    """x over the length of its last axis, l2 or l1; finite gradients at zero."""
    dtype, (x,) = x.dtype, at_least_fp32(x)
    if norm == "l1":
        return (x / (x.abs().sum(-1, keepdim=True) + eps)).to(dtype)
    return (x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()).to(dtype)


def queries_keys_values(
    u: Tensor,
    conv: Tensor,
    *,
    width: int,
    num_heads: int,
    feature_map: Callable[[Tensor], Tensor] = F.silu,
    norm: str = "l2",
) -> tuple[Tensor, Tensor, Tensor]:
    """u: [... l 2hd+he] the three projections side by side, conv: [... 2hd+he w], d = width -> q, k [... l h
    d] of length 1, v [... l h e]: each channel convolved with its past and mapped, values by silu.

    They are computed again in the backward pass, from u.
    """
    options = {"width": width, "num_heads": num_heads, "feature_map": feature_map, "norm": norm}
    return _kept_small(functools.partial(_queries_keys_values, **options), u, conv)


def _queries_keys_values(u: Tensor, conv: Tensor, *, width, num_heads, feature_map, norm):
    keys = width * num_heads
    parts = short_conv(u, conv).split([keys, keys, u.shape[-1] - 2 * keys], dim=-1)
    q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in parts)
    return unit(feature_map(q), norm=norm), unit(feature_map(k), norm=norm), F.silu(v)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = NORM_EPS) -> Tensor:
    """Each head over its root mean square, times weight: x [... h e]; x alone is kept."""
    return _kept_small(functools.partial(head_norm, eps=eps), x, weight)


def small_xavier(linear: nn.Linear, widths: list[int]) -> nn.Linear:
    """A linear map that stands for several, side by side, started as the authors start each."""
    with torch.no_grad():
        for part in linear.weight.split(widths):
            nn.init.xavier_uniform_(part, gain=GAIN)
        if linear.bias is not None:
            linear.bias.zero_()
    return linear


def short_filters(name: str, sets: int, channels: int, kernel_size: int) -> nn.Parameter:
    """[s channels w], started as torch starts a convolution of single channels."""
    if kernel_size < 1:
        raise ValueError(f"{name} needs kernel_size >= 1, got {kernel_size}")
    bound = kernel_size**-0.5
    return nn.Parameter(torch.empty(sets, channels, kernel_size).uniform_(-bound, bound))


def width_of(place: Place, name: str, **expand: float) -> int:
    """The head width times a factor, given by its name, if that is a whole number."""
    ((option, factor),) = expand.items()
    width = place.head_dim * factor
    if not (0 < width < math.inf and width == int(width)):
        raise ValueError(
            f"{name} needs {option} times the head width {place.head_dim} to be a whole number above 0, "
            f"got {option}={factor}"
        )
    return int(width)
