"""Recurrences over a sequence without a loop over it: scans, and decayed attention in chunks.

Decays are given as logarithms (at most 0), so that zero is the neutral value of every input: a position where
log decay, key, value or update is zero leaves the state as it was. States are float32 or better.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_fp32, full_precision

# b batch, l length, h heads, n chunks, c positions of a chunk, d, e head dims (keys, values)

CHUNK = 64  # positions


def scan(decay: Tensor, update: Tensor, *, dim: int = 1) -> Tensor:
    """h_t = decay_t h_{t-1} + update_t elementwise along `dim`, h before the first is 0 -> all h_t.

    decay broadcasts to update except along `dim`; real or complex. Odd positions are folded into the even
    ones, level by level: work O(l), log2(l) levels, sums and products of the decays alone, never a quotient.
    """
    return _Scan.apply(decay, update, dim % update.dim(), False)


def matrix_scan(transition: Tensor, update: Tensor) -> Tensor:
    """H_n = transition_n H_{n-1} + update_n, matrices: transition [... n d d], update [... n d e] -> [... n d
    e].
    """
    with full_precision(update):
        return _Scan.apply(transition, update, update.dim() - 3, True)


def before(states: Tensor, *, dim: int) -> Tensor:
    """The state before each position: states moved on by one along `dim`, zeros first."""
    zeros = torch.zeros_like(states.narrow(dim, 0, 1))
    return torch.cat([zeros, states.narrow(dim, 0, states.shape[dim] - 1)], dim=dim)


class _Scan(torch.autograd.Function):
    """The recurrence, elementwise or of matrices; its gradient is the same recurrence from the other end."""

    @staticmethod
    def forward(ctx, decay: Tensor, update: Tensor, dim: int, matrices: bool) -> Tensor:
        states = _prefix(decay, update, dim, matrices)
        ctx.save_for_backward(decay, states)
        ctx.dim, ctx.matrices = dim, matrices
        return states

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        decay, states = ctx.saved_tensors
        dim, matrices = ctx.dim, ctx.matrices
        adjoint = decay.mH if matrices else decay.conj()
        follows = adjoint.narrow(dim, 1, adjoint.shape[dim] - 1).flip(dim)
        follows = torch.cat([torch.zeros_like(adjoint.narrow(dim, 0, 1)), follows], dim=dim)
        grad_update = _prefix(follows, grad.flip(dim), dim, matrices).flip(dim)
        if not ctx.needs_input_grad[0]:
            return None, grad_update, None, None
        last = before(states, dim=dim)
        if matrices:
            return grad_update @ last.mH, grad_update, None, None
        grad_decay = grad_update * last.conj()
        if not decay.is_complex() and grad_decay.is_complex():
            grad_decay = grad_decay.real
        return grad_decay.sum_to_size(decay.shape), grad_update, None, None


def _prefix(decay: Tensor, update: Tensor, dim: int, matrices: bool) -> Tensor:
    length = update.shape[dim]
    if length == 1:
        return update.clone()

    def every_second(x: Tensor, first: int, count: int) -> Tensor:
        return x[(slice(None),) * dim + (slice(first, first + 2 * count - 1 if count else first, 2),)]

    def times(a: Tensor, b: Tensor) -> Tensor:
        return a @ b if matrices else a * b

    pairs, later = length // 2, (length - 1) // 2
    second = every_second(decay, 1, pairs)
    odd = _prefix(
        times(second, every_second(decay, 0, pairs)),
        times(second, every_second(update, 0, pairs)) + every_second(update, 1, pairs),
        dim,
        matrices,
    )  # states at 1, 3, 5, ...
    states = torch.empty_like(update, memory_format=torch.contiguous_format)
    every_second(states, 1, pairs).copy_(odd)
    states.narrow(dim, 0, 1).copy_(update.narrow(dim, 0, 1))
    even = times(every_second(decay, 2, later), odd.narrow(dim, 0, later))
    every_second(states, 2, later).copy_(even + every_second(update, 2, later))
    return states


def decayed_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """One direction of gated linear attention, in chunks: o_i = S_i^T q_i, S_i = diag(exp(g_i)) S_{i-1} +
    k_i v_i^T, that is o_i = sum over j <= i of (sum over d of q_id k_jd exp(g_(j+1)d + ... + g_id)) v_j.

    q, k: [b l h d], v: [b l h e], log_decay g <= 0: [b l h d], or [b l h 1] one for all d -> [b l h e] in the
    dtype of v. No product of decays is divided by another: what underflows is zero, nothing overflows.
    """
    dtype, length = v.dtype, v.shape[1]
    q, k, v, log_decay = (in_chunks(x, chunk) for x in at_least_fp32(q, k, v, log_decay))  # [b h n c d]
    with full_precision(v):
        total = running_sum(log_decay)
        intra = _within_scalar(q, k, v, total) if total.shape[-1] == 1 else _within_vector(q, k, v, log_decay)
        end = total[..., -1:, :]
        update = torch.einsum("bhncd,bhnce->bhnde", k * (end - total).exp(), v)
        states = before(scan(end.mT.exp(), update, dim=2), dim=2)
        inter = torch.einsum("bhncd,bhnde->bhnce", q * total.exp(), states)
    return out_of_chunks(intra + inter, length).to(dtype)


def _within_scalar(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
    """The sums over j <= i of i's own chunk, one decay a head."""
    return (q @ k.mT * decay_matrix(total)) @ v


def decay_matrix(total: Tensor) -> Tensor:
    """exp(total_i - total_j) for j <= i, else 0: running sums [... c 1] -> [... c c]."""
    c = total.shape[-2]
    past = torch.ones(c, c, dtype=torch.bool, device=total.device).tril()
    return (total - total.mT).masked_fill(~past, -torch.inf).exp()


def _within_vector(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The same with one decay for each key dimension, which no matrix of positions can hold.

    The chunk is halved again and again: each second half looks at its first half across their border, and the
    decays up to the border and from it are both at most 1. At the end i looks at itself.
    """
    out = (q * k).sum(-1, keepdim=True) * v
    half = q.shape[-2] // 2
    while half:
        halves = [x.unflatten(-2, (-1, 2, half)) for x in (q, k, v, log_decay)]  # [b h n m 2 half d]
        queries, decay_since = halves[0][..., 1, :, :], running_sum(halves[3][..., 1, :, :])
        keys, decay = halves[1][..., 0, :, :], running_sum(halves[3][..., 0, :, :])
        decay_until = decay[..., -1:, :] - decay
        scores = (queries * decay_since.exp()) @ (keys * decay_until.exp()).mT
        crossed = scores @ halves[2][..., 0, :, :]
        out = out + torch.stack([torch.zeros_like(crossed), crossed], dim=-3).flatten(-4, -2)
        half //= 2
    return out


def running_sum(x: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... rows of x [... c d]; by doubling: cumsum is not deterministic on GPUs."""
    step = 1
    while step < x.shape[-2]:
        x = x + F.pad(x[..., :-step, :], (0, 0, step, 0))
        step *= 2
    return x


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[b l h d] -> [b h n c d], zeros after the end."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def out_of_chunks(x: Tensor, length: int) -> Tensor:
    """[b h n c d] -> [b l h d]."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
