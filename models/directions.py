"""A one-way recurrence, run over a sequence in both directions; and the short convolution before it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# b batch, l length, d channels, w taps

DIRECTIONS = ("tied", "untied", "forward")  # one set of parameters for both, one each, or no way back


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


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal, each channel: y_t = sum_j weight[:, j] x_{t-j} + bias; x [b l d], weight [d w] -> [b l d]."""
    width, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = sum(padded[:, width - 1 - j :][:, :length] * weight[:, j] for j in range(width))
    return out if bias is None else out + bias
