"""A one-way recurrence, run over a sequence in both directions; and the short convolution before it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.long_row import LongRow
from models.scan import Starts

# b batch, l length, t packed rows, d channels, w taps

DIRECTIONS = ("tied", "untied", "forward")  # one set of parameters for both, one each, or no way back


def known_directions(directions: str, name: str, choices: Sequence[str] = DIRECTIONS) -> str:
    """`directions`, or ValueError if the mechanism `name` knows none of that name."""
    if directions not in choices:
        raise ValueError(f"unknown directions '{directions}' for {name}; choose from: {', '.join(choices)}")
    return directions


def both_directions(
    recurrence: Callable[..., Tensor],
    streams: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    back: Callable[..., Tensor] | None = None,
    back_streams: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `recurrence` gives over the sequence and, position by position, what it gives from the end.

    streams: tensors [b l ...]; mask: [b l] bool, True = real, or None -> two tensors [b l ...]; add them up,
    or not. Every stream is set to zero at padding, and zero must be neutral there (decays as logarithms,
    input factors, keys): then to reverse the padded row is to reverse its real tokens alone, since the
    padding that comes first leaves the first state as it was.
    `back` is the recurrence of the other direction if it has parameters of its own, `back_streams` what it
    gets (not reversed); without `back` both run as one batch.
    """
    streams = [_zeroed(x, mask) for x in streams]
    reverse = streams if back_streams is None else [_zeroed(x, mask) for x in back_streams]
    reverse = [x.flip(1) for x in reverse]
    if back is not None:
        return recurrence(*streams), back(*reverse).flip(1)
    both = recurrence(*(torch.cat(pair) for pair in zip(streams, reverse, strict=True)))
    there, returned = both.chunk(2)
    return there, returned.flip(1)


def forward_alone(
    recurrence: Callable[..., Tensor], streams: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """The forward direction of `both_directions`: a causal model."""
    return recurrence(*(_zeroed(x, mask) for x in streams))


def packed_directions(
    recurrence: Callable[..., Tensor],
    streams: Sequence[Tensor],
    row: LongRow,
    *,
    directions: str = "tied",
    back_streams: Sequence[Tensor] | None = None,
) -> Tensor:
    """The sum of both directions, or `forward_alone`, within each packed sequence: streams [t ...] -> [t
    ...].

    `recurrence` gets streams [b l ...] and, last, the chunks that start anew: b = 1 or, for both directions
    as one batch, b = 2. Zero is neutral in every stream, as in `both_directions`.
    """
    there = [row.lay_out(x) for x in streams]
    if directions == "forward":
        return row.take_back(recurrence(*there, Starts(row.first[None], row.reach)))
    back_streams = streams if back_streams is None else back_streams
    reverse = [
        laid if other is x else row.lay_out(other)
        for x, laid, other in zip(streams, there, back_streams, strict=True)
    ]
    both = (torch.cat([x, other.flip(1)]) for x, other in zip(there, reverse, strict=True))
    starts = Starts(torch.stack([row.first, row.last.flip(0)]), row.reach)
    there, returned = recurrence(*both, starts).chunk(2)
    return row.take_back(there + returned.flip(1))


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal, each channel: y_t = sum_j weight[:, j] x_{t-j} + bias; x [... l d], weight [... d w], bias
    [... d], leading dimensions of both broadcast -> [... l d].
    """
    out = _ShortConv.apply(x, weight)
    return out if bias is None else out + bias.unsqueeze(-2)


class _ShortConv(torch.autograd.Function):
    """Sums of shifted products, in place: autograd would make a zero-filled copy of x for every shift."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        dtype, length = torch.promote_types(x.dtype, weight.dtype), x.shape[-2]
        x, taps = x.to(dtype), weight.to(dtype).unsqueeze(-3)  # [... 1 d w]
        out = x * taps[..., 0]
        for j in range(1, min(weight.shape[-1], length)):
            out[..., j:, :].addcmul_(x[..., : length - j, :], taps[..., j])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        taps, length = weight.to(grad.dtype).unsqueeze(-3), x.shape[-2]
        reach = min(weight.shape[-1], length)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * taps[..., 0]
            for j in range(1, reach):
                grad_x[..., : length - j, :].addcmul_(grad[..., j:, :], taps[..., j])
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for j in range(reach):
                sums = (grad[..., j:, :] * x[..., : length - j, :]).sum(-2)
                grad_weight[..., j] = sums.sum_to_size(weight.shape[:-1])
        return grad_x, grad_weight
