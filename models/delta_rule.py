"""The delta rule over a sequence, in chunks: what DeltaNet and Gated DeltaNet share.

One direction, each head: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t, S
as [keys values] (the papers: its transpose). What is found under key t is taken out, beta_t of it, before v_t
is put in. With pseudo-values u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t) that is S_t = exp(g_t) S_{t-1} +
k_t u_t^T, a decayed sum. Those of a chunk that starts from S solve a triangular system,
    (I + L) u = beta (v - exp(G) S^T k),   L_ij = beta_i exp(G_i - G_j) k_i . k_j for j < i,   G sums of g
so the state after the chunk is linear in S, and a scan over the chunks finds all of them (arXiv 2406.06484,
sections 3.1 and 3.2; with decay 2412.06464, section 3.3).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fla_kernels
from models.common import Place, full_precision
from models.directions import short_conv
from models.scan import CHUNK, Starts, before, decay_matrix, matrix_scan, running_sum

# b batch, l length, h heads, n chunks, c positions of a chunk, d, e head dims (keys, values)

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
    starts: Starts | None = None,
) -> Tensor:
    """scale times o of the module docstring. q, k: [b l h d], v: [b l h e], beta, log_decay g <= 0 (None: 0):
    [b l h] -> [b l h e] in the dtype of v; `chunk` is a power of two, `kernel` one of models/fla_kernels.py.

    Where beta and g are zero the state stays as it is. Stable for |beta k.k - 1| <= 1, equal keys included.
    `starts`: the chunks that start from S = 0; for packed sequences, and in torch alone.
    """
    if starts is not None:
        fla_kernels.not_packed(kernel, q, k, v)
    elif fla_kernels.chosen(kernel, q, k, v, beta, one_decay=log_decay is not None):
        return fla_kernels.delta_rule(q, k, v, beta, log_decay, scale=scale)
    dtype, length = v.dtype, v.shape[1]
    q, k, v = (_chunked(x, chunk) for x in (q, k, v))  # [b h n c d]
    beta = _chunked(beta[..., None], chunk)  # [b h n c 1]
    with full_precision(v):
        if log_decay is None:
            total = v.new_zeros(chunk, 1)
        else:
            total = running_sum(_chunked(log_decay[..., None], chunk))
        fresh = None if starts is None else starts.mask(q, 2)
        reach = None if starts is None else starts.reach
        out = _DeltaRule.apply(q, k, v, beta, total, scale, fresh, reach)
    by_token = out.permute(0, 2, 3, 1, 4).to(dtype, memory_format=torch.contiguous_format)
    return by_token.flatten(1, 2)[:, :length]


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """[b l h d] -> [b h n c d] in at least fp32, contiguous, zeros after the end; one copy, or none."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    x = x.transpose(1, 2).to(wide, memory_format=torch.contiguous_format)
    if x.shape[2] % chunk:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.contiguous().unflatten(2, (-1, chunk))


class _DeltaRule(torch.autograd.Function):
    """All chunks at once. The gradient goes backwards through the recurrence itself, from chunk to chunk and
    through the system inside each, not through the products that make it linear in S.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        total: Tensor,
        scale: float,
        fresh: Tensor | None,
        reach: int | None,
    ) -> Tensor:
        """q, k: [b h n c d], v: [b h n c e], beta: [b h n c 1], total: sums of g, broadcast to beta."""
        end, ratios, weighed = total[..., -1:, :], decay_matrix(total), k * beta
        inverse = unit_inverse((weighed @ k.mT).mul_(ratios))
        seen = inverse @ (weighed * total.exp())  # u is `own` minus `seen` S
        own = inverse @ (v * beta)
        left = (k * (end - total).exp()).mT
        transition = end.exp() * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - left @ seen
        if fresh is not None:
            transition.masked_fill_(fresh, 0)
        states = before(matrix_scan(transition, left @ own, reach=reach), dim=2)  # [b h n d e]
        if fresh is not None:
            states.masked_fill_(fresh, 0)
        u = _plus_product(own, seen, states, alpha=-1)
        scaled = q * scale
        out = _plus_product((scaled @ k.mT).mul_(ratios) @ u, scaled * total.exp(), states)
        ctx.save_for_backward(q, k, v, beta, total, fresh, ratios, inverse, seen, transition, states, u)
        ctx.scale, ctx.reach = scale, reach
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, beta, total, fresh, ratios, inverse, seen, transition, states, u = ctx.saved_tensors
        with full_precision(grad):
            grad, end, grown = grad.contiguous(), total[..., -1:, :], total.exp()
            q, kept = q * ctx.scale, (end - total).exp()
            back = (q @ k.mT).mul_(ratios).mT @ grad  # through the own chunk
            of_states = _plus_product((q * grown).mT @ grad, seen.mT, back, alpha=-1)
            if fresh is not None:
                of_states.masked_fill_(fresh, 0)
            later = matrix_scan(transition.mT.flip(2), of_states.flip(2), reach=ctx.reach)
            later = before(later, dim=2).flip(2)  # of the state after the chunk: [b h n d e]
            right = inverse.mT @ _plus_product(back, k * kept, later)  # of beta (v - exp(G) S^T k)
            scores = (grad @ u.mT).mul_(ratios)
            lower = (right @ u.mT).mul_(ratios)
            lower.diagonal(dim1=-2, dim2=-1).zero_()
            grad_q = _plus_product((grad @ states.mT).mul_(grown), scores, k)
            as_query = _plus_product((right @ states.mT).mul_(grown), lower, k)  # of -k, times 1 / beta
            written = (u @ later.mT).mul_(kept)
            as_key = _plus_product(written, scores.mT, q)
            as_key = _plus_product(as_key, lower.mT, k * beta, alpha=-1)
            found = (k * as_query).sum(-1, keepdim=True)
            grad_total = None
            if ctx.needs_input_grad[4]:
                # G_i stands beside q_i, and beside k_i where it reads; -G_j beside k_j where it is written to
                grad_total = (q * grad_q - k * as_key).sum(-1, keepdim=True) - beta * found
                last = (k * written).sum((-2, -1), keepdim=True)
                grad_total[..., -1:, :] += last + end.exp() * (later * states).sum((-2, -1), keepdim=True)
            grad_beta = (right * v).sum(-1, keepdim=True) - found
            grads = grad_q * ctx.scale, as_key - beta * as_query, right * beta, grad_beta, grad_total
            return *grads, None, None, None


def _plus_product(x: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    """x + alpha a @ b over three leading dimensions, in one kernel."""
    return torch.baddbmm(*(part.flatten(0, 2) for part in (x, a, b)), alpha=alpha).unflatten(0, x.shape[:3])


def unit_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1, lower [... c c] below its diagonal, the rest not read; c a power of two.

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
    """x over the length of its last axis, l2 or l1, in at least fp32; finite gradients at zero."""
    return _Unit.apply(x, norm, eps)


class _Unit(torch.autograd.Function):
    """Keeps its result, contiguous in the order of x's axes, and nothing else of that size."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: str, eps: float) -> Tensor:
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(x, 1 if norm == "l1" else 2, dim=-1, keepdim=True, dtype=wide)
        factor = (length + eps).reciprocal() if norm == "l1" else (length.square() + eps).rsqrt()
        out = torch.mul(x, factor, out=torch.empty(x.shape, dtype=wide, device=x.device))
        ctx.save_for_backward(out, factor)
        ctx.norm, ctx.dtype = norm, x.dtype
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        out, factor = ctx.saved_tensors
        along = (grad * out).sum(-1, keepdim=True)
        direction = out.sign() if ctx.norm == "l1" else out
        return torch.addcmul(grad, direction, along, value=-1).mul_(factor).to(ctx.dtype), None, None


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

    Convolved and mapped in the dtype of u. q and k lie in memory as [... h l d], which `delta_rule` wants.
    """
    keys = width * num_heads
    u = short_conv(u, conv.to(u.dtype))
    q, k, v = (
        x.unflatten(-1, (num_heads, -1)) for x in u.split([keys, keys, u.shape[-1] - 2 * keys], dim=-1)
    )
    q, k = (unit(feature_map(x).transpose(-2, -3), norm=norm).transpose(-2, -3) for x in (q, k))
    return q, k, F.silu(v)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = NORM_EPS) -> Tensor:
    """Each head over its root mean square, times weight, which broadcasts: x [... h e]; x alone is kept."""
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """In at least fp32, each result written in the dtype of x at once."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = (length.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, factor)
        return torch.mul(x, factor, out=torch.empty(x.shape, dtype=x.dtype, device=x.device)).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        normed = x * factor
        shares = grad * normed
        grad_weight = shares.sum_to_size(weight.shape).to(weight.dtype)
        along = shares.mul_(weight).mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad * weight.to(factor.dtype), normed, along, value=-1)
        return grad_x.mul_(factor).to(x.dtype), grad_weight, None


def linear_map(place: Place, width_in: int, width_out: int) -> nn.Linear:
    """Started as torch starts it, but for a bias of zero."""
    linear = nn.Linear(width_in, width_out, bias=place.bias)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
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
