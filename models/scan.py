"""Recurrences over a sequence without a loop over it: scans, and decayed attention in chunks.

Decays are given as logarithms (at most 0), so that zero is the neutral value of every input: a position where
log decay, key, value or update is zero leaves the state as it was. States are float32 or better.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common import at_least_fp32, full_precision

# b batch, l length, h heads, n chunks, c positions of a chunk, d, e head dims (keys, values)

CHUNK = 64  # positions
LEVELS = 6  # of halving, at most, where a reach bounds the steps: a row is padded to two times 2^LEVELS


@dataclass(frozen=True)
class Starts:
    """Where sequences start among the positions (or chunks) of a recurrence over several, one after another.

    fresh: [b l] bool, True where the state before is zero; no sequence has more than `reach` positions.
    """

    fresh: Tensor
    reach: int

    def mask(self, x: Tensor, dim: int) -> Tensor:
        """`fresh` as a mask of x [b ...], whose positions lie along `dim`."""
        b, length = self.fresh.shape
        return self.fresh.view(b, *[1] * (dim - 1), length, *[1] * (x.dim() - dim - 1))


def scan(decay: Tensor, update: Tensor, *, dim: int = 1, reach: int | None = None) -> Tensor:
    """h_t = decay_t h_{t-1} + update_t elementwise along `dim`, h before the first is 0 -> all h_t.

    decay broadcasts to update except along `dim`; real or complex. Odd positions are folded into the even
    ones, level by level: work O(l), log2(l) levels, sums and products of the decays alone, never a quotient.
    `reach`: every run of that many positions has a decay of 0 in it, or updates that are 0. What is done
    then depends on it alone, not on the length, which may be symbolic to a compiler.
    """
    return _Scan.apply(decay, update, dim % update.dim(), False, reach)


def matrix_scan(transition: Tensor, update: Tensor, *, reach: int | None = None) -> Tensor:
    """H_n = transition_n H_{n-1} + update_n, matrices: transition [... n d d], update [... n d e] -> [... n d
    e]; `reach` as in `scan`.
    """
    with full_precision(update):
        return _Scan.apply(transition, update, update.dim() - 3, True, reach)


def entering(decay: Tensor, update: Tensor, starts: Starts | None = None, *, dim: int) -> Tensor:
    """The state before each h_t of `scan`, which is zero where sequences start."""
    if starts is None:
        return before(scan(decay, update, dim=dim), dim=dim)
    fresh = starts.mask(update, dim)
    states = scan(decay.masked_fill(fresh, 0), update, dim=dim, reach=starts.reach)
    return before(states, dim=dim).masked_fill(fresh, 0)


def before(states: Tensor, *, dim: int) -> Tensor:
    """The state before each position: states moved on by one along `dim`, zeros first."""
    zeros = torch.zeros_like(states.narrow(dim, 0, 1))
    return torch.cat([zeros, states.narrow(dim, 0, states.shape[dim] - 1)], dim=dim)


class _Scan(torch.autograd.Function):
    """The recurrence, elementwise or of matrices; its gradient is the same recurrence from the other end."""

    @staticmethod
    def forward(ctx, decay: Tensor, update: Tensor, dim: int, matrices: bool, reach: int | None) -> Tensor:
        states = _states(decay, update, dim, matrices, reach)
        ctx.save_for_backward(decay, states)
        ctx.dim, ctx.matrices, ctx.reach = dim, matrices, reach
        return states

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        decay, states = ctx.saved_tensors
        dim, matrices = ctx.dim, ctx.matrices
        adjoint = decay.mH if matrices else decay.conj()
        follows = adjoint.narrow(dim, 1, adjoint.shape[dim] - 1).flip(dim)
        follows = torch.cat([torch.zeros_like(adjoint.narrow(dim, 0, 1)), follows], dim=dim)
        grad_update = _states(follows, grad.flip(dim), dim, matrices, ctx.reach).flip(dim)
        if not ctx.needs_input_grad[0]:
            return None, grad_update, None, None, None
        last = before(states, dim=dim)
        if matrices:
            return grad_update @ last.mH, grad_update, None, None, None
        grad_decay = grad_update * last.conj()
        if not decay.is_complex() and grad_decay.is_complex():
            grad_decay = grad_decay.real
        return grad_decay.sum_to_size(decay.shape), grad_update, None, None, None


def _states(decay: Tensor, update: Tensor, dim: int, matrices: bool, reach: int | None) -> Tensor:
    if reach is None:
        return _prefix(decay, update, dim, matrices)
    length, levels = update.shape[dim], min(LEVELS, max(0, reach.bit_length() - 3))
    if levels:
        block = 2**levels
        whole = (length + 2 * block - 1) // block * block  # two blocks or more: one is a case of its own
        after = (0, 0) * (update.dim() - 1 - dim) + (0, whole - length)
        decay, update = F.pad(decay, after), F.pad(update, after)
    return _bounded(decay, update, dim, matrices, levels, reach).narrow(dim, 0, length)


def _bounded(decay: Tensor, update: Tensor, dim: int, matrices: bool, levels: int, reach: int) -> Tensor:
    """`_prefix` of `reach`: as many levels of halving, then each position takes in the 2^i before it."""
    if levels:
        (first, second), (early, late) = (
            x.unflatten(dim, (x.shape[dim] // 2, 2)).unbind(dim + 1) for x in (decay, update)
        )
        late = _times(second, early, matrices) + late
        decay = _times(second, first, matrices)
        odd = _bounded(decay, late, dim, matrices, levels - 1, reach // 2 + 1)
        even = _times(first, _moved(odd, 1, dim), matrices) + early
        return torch.stack([even, odd], dim=dim + 1).flatten(dim, dim + 1)
    step = 1
    while step < reach:
        update = update + _times(decay, _moved(update, step, dim), matrices)
        if 2 * step < reach:
            decay = _times(decay, _moved(decay, step, dim), matrices)
        step *= 2
    return update if reach > 1 else update.clone()


def _moved(x: Tensor, step: int, dim: int) -> Tensor:
    """x moved on along `dim`, zeros first."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (step, 0)).narrow(dim, 0, x.shape[dim])


def _times(a: Tensor, b: Tensor, matrices: bool) -> Tensor:
    return a @ b if matrices else a * b


def _prefix(decay: Tensor, update: Tensor, dim: int, matrices: bool) -> Tensor:
    length = update.shape[dim]
    if length == 1:
        return update.clone()

    def every_second(x: Tensor, first: int, count: int) -> Tensor:
        return x[(slice(None),) * dim + (slice(first, first + 2 * count - 1 if count else first, 2),)]

    pairs, later = length // 2, (length - 1) // 2
    second = every_second(decay, 1, pairs)
    odd = _prefix(
        _times(second, every_second(decay, 0, pairs), matrices),
        _times(second, every_second(update, 0, pairs), matrices) + every_second(update, 1, pairs),
        dim,
        matrices,
    )  # states at 1, 3, 5, ...
    states = torch.empty_like(update, memory_format=torch.contiguous_format)
    every_second(states, 1, pairs).copy_(odd)
    states.narrow(dim, 0, 1).copy_(update.narrow(dim, 0, 1))
    even = _times(every_second(decay, 2, later), odd.narrow(dim, 0, later), matrices)
    every_second(states, 2, later).copy_(even + every_second(update, 2, later))
    return states


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    chunk: int = CHUNK,
    starts: Starts | None = None,
) -> Tensor:
    """One direction of gated linear attention, in chunks: o_i = S_i^T q_i, S_i = diag(exp(g_i)) S_{i-1} +
    k_i v_i^T, that is o_i = sum over j <= i of (sum over d of q_id k_jd exp(g_(j+1)d + ... + g_id)) v_j.

    q, k: [b l h d], v: [b l h e], log_decay g <= 0: [b l h d], or [b l h 1] one for all d -> [b l h e] in the
    dtype of v. No product of decays is divided by another: what underflows is zero, nothing overflows.
    `starts`: the chunks that start from S = 0.
    """
    dtype, length = v.dtype, v.shape[1]
    q, k, v, log_decay = at_least_fp32(*(in_chunks(x, chunk) for x in (q, k, v, log_decay)))  # [b h n c d]
    with full_precision(v):
        if log_decay.shape[-1] == 1:
            total = running_sum(log_decay)
            intra = within_chunks(q, k, v, total)
        else:
            intra, total = _WithinVector.apply(q, k, v, log_decay)
        end = total[..., -1:, :]
        update = (k * (end - total).exp()).mT @ v  # [b h n d e]
        states = entering(end.mT.exp(), update, starts, dim=2)
        out = intra + (q * total.exp()) @ states
    return out_of_chunks(out.to(dtype), length)


def decay_matrix(total: Tensor) -> Tensor:
    """exp(total_i - total_j) for j <= i, else 0: running sums [... c 1] -> [... c c]."""
    c = total.shape[-2]
    past = torch.ones(c, c, dtype=torch.bool, device=total.device).tril()
    return (total - total.mT).masked_fill_(~past, -torch.inf).exp_()


def within_chunks(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
    """The sums over j <= i of i's own chunk, one decay a head: q, k [... c d], v [... c e], running sums of
    log decays [... c 1] -> [... c e]; leading dimensions of q, k and total may be 1 where those of v are not.
    """
    return _WithinScalar.apply(q, k, v, total)


class _WithinScalar(torch.autograd.Function):
    """It keeps two matrices of positions where autograd keeps three; the decays' gradient needs none."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
        decay = decay_matrix(total)
        weights = (q @ k.mT) * decay
        out = weights @ v
        ctx.save_for_backward(q, k, v, decay, weights, out if ctx.needs_input_grad[3] else None)
        ctx.shape = total.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, decay, weights, out = ctx.saved_tensors
        with full_precision(grad):
            scores = (grad @ v.mT).mul_(decay).sum_to_size(*q.shape[:-1], q.shape[-2])
            grad_q, grad_k, grad_v = scores @ k, scores.mT @ q, weights.mT @ grad
        if out is None:
            return grad_q, grad_k, grad_v, None
        # total_i scales all that i sees, -total_j all that is seen of j
        grad_total = (grad * out).sum(-1, keepdim=True) - (grad_v * v).sum(-1, keepdim=True)
        return grad_q, grad_k, grad_v, grad_total.sum_to_size(ctx.shape)


class _WithinVector(torch.autograd.Function):
    """The same with one decay for each key dimension, which no matrix of positions can hold: log decays
    [... c d] -> [... c e] and the running sums [... c d]. It keeps its inputs alone.

    Halves of a chunk are put together again and again: each second half looks at its first half across their
    border, and the decays up to the border and from it are both at most 1. Before that i looks at itself.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, log_decay)
        out, total, half = (q * k).sum(-1, keepdim=True) * v, log_decay.clone(), 1
        while half < q.shape[-2]:
            queries, keys, _, _ = _across(q, k, total, half)
            _halves(out, half)[1].add_((queries @ keys.mT) @ _halves(v, half)[0])
            _join_(total, half)
            half *= 2
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, log_decay = ctx.saved_tensors
        itself = (grad * v).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = itself * k, itself * q, (q * k).sum(-1, keepdim=True) * grad
        total, half = log_decay.clone(), 1
        while half < q.shape[-2]:
            queries, keys, since, until = _across(q, k, total, half)
            over, values = _halves(grad, half)[1], _halves(v, half)[0]
            with full_precision(grad):
                scores = over @ values.mT
                _halves(grad_q, half)[1].addcmul_(scores @ keys, since)
                _halves(grad_k, half)[0].addcmul_(scores.mT @ queries, until)
                _halves(grad_v, half)[0].add_((keys @ queries.mT) @ over)
            _join_(total, half)
            half *= 2
        if not ctx.needs_input_grad[3]:
            return grad_q, grad_k, grad_v, None
        # total_i scales q_i and all that it sees, -total_j scales k_j
        grad_total, half = (q * grad_q).addcmul_(k, grad_k, value=-1).add_(grad_sums), 1
        while half < q.shape[-2]:  # sums from the end
            first, second = _halves(grad_total, half)
            first.add_(second[..., :1, :])
            half *= 2
        return grad_q, grad_k, grad_v, grad_total


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The first and the second half of each 2 * half rows, views: [... c d] -> [... m half d] each."""
    halves = x.unflatten(-2, (-1, 2, half))
    return halves.select(-3, 0), halves.select(-3, 1)  # written to, parts of unbind fix sizes when compiled


def _across(q: Tensor, k: Tensor, total: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of second halves times their decays since the border, keys of first halves times theirs until
    it, and both decays; total: running sums within halves.
    """
    first, second = _halves(total, half)
    since, until = second.exp(), (first[..., -1:, :] - first).exp_()
    return _halves(q, half)[1] * since, _halves(k, half)[0] * until, since, until


def _join_(total: Tensor, half: int) -> None:
    """Running sums within halves to those within both, in place."""
    first, second = _halves(total, half)
    second.add_(first[..., -1:, :])


def running_sum(x: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... rows of x [... c d]; by doubling: cumsum is not deterministic on GPUs."""
    return _RunningSum.apply(x) if x.shape[-2] > 1 else x


class _RunningSum(torch.autograd.Function):
    """Its gradient is the same from the end; autograd would fill zeros and add for every step."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        step = 1
        while step < x.shape[-2]:
            later = x[..., step:, :] + x[..., :-step, :]
            x = torch.cat([x[..., :step, :], later], dim=-2)
            step *= 2
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return running_sum(grad.flip(-2)).flip(-2)


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[b l h d] -> [b h n c d], contiguous, zeros after the end."""
    if short := -x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, short))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def out_of_chunks(x: Tensor, length: int) -> Tensor:
    """[b h n c d] -> [b l h d]."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
