"""Systems with many inputs, many outputs and states that decay each by one complex number, the same at all
positions: what S5 and the linear recurrent unit are.

Within a chunk the states are a triangular matrix of powers times the updates; from chunk to chunk they are
the same recurrence again, over the ends of the chunks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import full_precision
from models.long_row import LongRow
from models.scan import Starts, before, entering

# b batch, l length, t packed rows, n chunks, c positions of a chunk, d inputs, e outputs, r states, k
# directions

CHUNK = 32  # positions; 16 and 64 take about as long on a CPU


def packed_system(
    x: Tensor, log_decay: Tensor, inputs: Tensor, outputs: Tensor, cu_seqlens: Tensor, max_len: int
) -> Tensor:
    """`diagonal_system` within each packed sequence: x [t d] -> [t e]."""
    row = LongRow.of(cu_seqlens, x.shape[0], max_len, chunk=CHUNK)
    starts = Starts(row.first[None], row.reach)
    return row.take_back(diagonal_system(row.lay_out(x), log_decay, inputs, outputs, starts))


def diagonal_system(
    x: Tensor, log_decay: Tensor, inputs: Tensor, outputs: Tensor, starts: Starts | None = None
) -> Tensor:
    """y = Re(C h) with the states h of updates B x; of two directions, the sum, each with its own C.

    x [b l d], float32 or float64, zeros at padding; log_decay [r], complex128; B: inputs [r d], C: outputs
    [k r e], both complex; k = 1 is from the start alone, k = 2 from the start and from the end -> [b l e].
    `starts`: the chunks, of a whole number of them and with b = 1, at whose border no state passes.
    """
    batch_size, length = x.shape[:2]
    if length > CHUNK and length % CHUNK:
        x = F.pad(x, (0, 0, 0, -length % CHUNK))
    dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    inputs, outputs = inputs.to(dtype), outputs.to(dtype)
    with full_precision(x):
        updates = torch.cat([inputs.real, inputs.imag]) @ x.flatten(0, 1).mT  # [2r bl]
        updates = _joined(updates).unflatten(-1, (batch_size, -1))
        states = diagonal_scan(log_decay, updates, len(outputs), starts)
        y = _Readout.apply(outputs, *states)
    return y.unflatten(0, (batch_size, -1))[:, :length]


class _Readout(torch.autograd.Function):
    """Re(sum_k C_k h_k) as products of real matrices: half the work of complex ones. Keeps C and h alone.

    outputs [k r e], states: k tensors [r b l], complex -> [bl e], real.
    """

    @staticmethod
    def forward(ctx, outputs: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, *states)
        weights = torch.cat([outputs.real, -outputs.imag], dim=1)  # [k 2r e]
        y = _parts(states[0]).mT @ weights[0]
        for h, weight in zip(states[1:], weights[1:], strict=True):
            y.addmm_(_parts(h).mT, weight)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        outputs, *states = ctx.saved_tensors
        weights = torch.cat([outputs.real, -outputs.imag], dim=1)
        with full_precision(grad):
            grad_outputs = _joined(torch.stack([_parts(h) @ grad for h in states], dim=1)).conj()
            grad_states = [_joined(weight @ grad.mT).view_as(states[0]) for weight in weights]
        return grad_outputs.movedim(1, 0), *grad_states


def _parts(states: Tensor) -> Tensor:
    """Complex [r b l] -> [2r bl], the real parts and then the imaginary ones."""
    return torch.view_as_real(states).movedim(-1, 0).flatten(2).flatten(0, 1)


def _joined(parts: Tensor) -> Tensor:
    """Real [2r ...], real parts and then imaginary ones -> complex [r ...]."""
    return torch.view_as_complex(parts.unflatten(0, (2, -1)).movedim(0, -1).contiguous())


def diagonal_scan(
    log_decay: Tensor, updates: Tensor, directions: int, starts: Starts | None = None
) -> tuple[Tensor, ...]:
    """All states of h_t = exp(log_decay) h_{t-1} + update_t and, with two directions, those from the end, of
    h_t = exp(log_decay) h_{t+1} + update_t.

    log_decay [r], complex128; updates [r b l], complex -> one tensor [r b l] for each direction. Powers are
    taken in double precision, since a position times a frequency is a large number. `starts`: the chunks that
    begin a sequence, which nothing enters from the chunk before, nor leaves for it; b = 1.
    """
    packed = (None, None) if starts is None else (starts.fresh, starts.reach)
    return _DiagonalScan.apply(log_decay, updates, directions, *packed)


class _DiagonalScan(torch.autograd.Function):
    """Keeps the states alone; the gradient of the updates is the same recurrence from the other end."""

    @staticmethod
    def forward(
        ctx, log_decay: Tensor, updates: Tensor, directions: int, fresh: Tensor | None, reach: int | None
    ) -> tuple[Tensor, ...]:
        states = _states(log_decay, [updates] * directions, (False, True)[:directions], fresh, reach)
        ctx.save_for_backward(log_decay, fresh, *states)
        ctx.reach = reach
        return tuple(states)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_decay, fresh, *states = ctx.saved_tensors
        adjoint = _states(log_decay.conj(), grads, (True, False)[: len(grads)], fresh, ctx.reach)
        products = [_product(states[0][..., :-1], adjoint[0][..., 1:], fresh)]
        if len(states) == 2:
            products.append(_product(states[1][..., 1:], adjoint[1][..., :-1], fresh))
        grad_log = sum(products).to(log_decay.dtype) * log_decay.exp().conj()
        return grad_log, adjoint[0] if len(adjoint) == 1 else adjoint[0] + adjoint[1], None, None, None


def _product(states: Tensor, adjoint: Tensor, fresh: Tensor | None) -> Tensor:
    """conj(states) times adjoint, of the l - 1 pairs of neighbours, summed over all but the first axis,
    without a tensor of their size: [r]; those across a border that nothing passes are not counted.
    """
    total = (states[..., None].mH @ adjoint[..., None]).sum(dim=(1, 2, 3))
    if fresh is None:
        return total
    across = states[..., CHUNK - 1 :: CHUNK].conj() * adjoint[..., CHUNK - 1 :: CHUNK]
    return total - across.masked_fill_(~fresh[:, 1:], 0).sum(dim=(1, 2))


def _states(
    log_decay: Tensor,
    updates: Sequence[Tensor],
    from_end: Sequence[bool],
    fresh: Tensor | None = None,
    reach: int | None = None,
) -> list[Tensor]:
    """The recurrence of each tensor [r b l], from the start or from the end."""
    states, batch_size, length = updates[0].shape
    c = min(length, CHUNK) if fresh is None else CHUNK
    powers = powers_of(log_decay, c + 1).to(updates[0].dtype)  # [r c+1]
    triangle = toeplitz(powers[:, :-1])  # [r c c], row i: what update i gives to positions i, i + 1, ...
    if length % c:
        updates = [F.pad(u, (0, -length % c)) for u in updates]
    chunks = [u.reshape(states, -1, c) for u in updates]  # [r bn c]
    found = [u @ (triangle.mT if end else triangle) for u, end in zip(chunks, from_end, strict=True)]
    if fresh is None and length <= c:
        return [h.view(states, batch_size, length) for h in found]
    ends = [
        h[..., 0 if end else -1].view(states, batch_size, -1) for h, end in zip(found, from_end, strict=True)
    ]
    ends = torch.cat([e.flip(-1) if end else e for e, end in zip(ends, from_end, strict=True)], dim=1)
    if fresh is None:
        carried = before(_states(c * log_decay, [ends], (False,))[0], dim=2)
    else:
        carried = _entering(powers[:, -1], ends, from_end, fresh, reach)
    carried = carried.split(batch_size, dim=1)
    for h, carry, end in zip(found, carried, from_end, strict=True):
        carry = carry.flip(-1) if end else carry  # [r b n]: the state that enters each chunk
        left = powers[:, 1:].flip(-1) if end else powers[:, 1:]  # of the carry at each position
        h.baddbmm_(carry.reshape(states, -1, 1), left[:, None])
    return [h.view(states, batch_size, -1)[..., :length] for h in found]


def _entering(decay: Tensor, ends: Tensor, from_end: Sequence[bool], fresh: Tensor, reach: int) -> Tensor:
    """The states that enter chunks: decay [r] of a chunk, its ends [r k n], one row for each direction."""
    reverse = F.pad(fresh[:, 1:].flip(1), (1, 0), value=True)
    starts = Starts(torch.cat([reverse if end else fresh for end in from_end]), reach)
    wide = ends.transpose(0, 1).to(torch.complex128)
    return entering(decay.to(wide.dtype)[:, None], wide, starts, dim=2).transpose(0, 1).to(ends.dtype)


def powers_of(log_decay: Tensor, count: int) -> Tensor:
    """exp(0), exp(log_decay), exp(2 log_decay), ... [r count]."""
    return (log_decay[:, None] * torch.arange(count, device=log_decay.device)).exp()


def toeplitz(powers: Tensor) -> Tensor:
    """[r c] -> [r c c]: power j - i in row i and column j, 0 where j < i."""
    place = torch.arange(powers.shape[-1], device=powers.device)
    lag = place - place[:, None]
    return powers[:, lag.clamp_min(0)] * (lag >= 0)
