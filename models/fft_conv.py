"""Convolution of each channel with a kernel as long as the sequence, by FFT: for all long convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_fp32, full_precision

# b batch, l length, d channels, n transform length, k taps

PART = 2**24  # numbers transformed at a time: bounds the working memory, whatever the batch


def fft_conv(x: Tensor, kernel: Tensor, back: Tensor | None = None) -> Tensor:
    """y[t, c] = sum_j kernel[c, j] x[t - j, c] + sum_j back[c, j] x[t + 1 + j, c], zeros beyond both ends.

    x [b l d], kernel [d k], back [d k'] (k, k' of any length; taps past the sequence reach nothing) -> [b l
    d]. At least float32 inside, never wraps around. Zero padded positions of x before the call.
    """
    dtype, length = x.dtype, x.shape[1]
    x, kernel = at_least_fp32(x, kernel)
    kernel = kernel[:, :length]
    taps_back = 0
    if back is not None:
        (back,) = at_least_fp32(back)
        back = back[:, : length - 1]
        taps_back = back.shape[1]
    size = fast_size(length + max(kernel.shape[1] - 1, taps_back))
    circle = F.pad(kernel, (0, size - kernel.shape[1]))
    if taps_back:
        circle = circle + F.pad(back.flip(-1), (size - taps_back, 0))
    with full_precision(x):
        return _CircularConv.apply(x.transpose(1, 2), circle).transpose(1, 2).to(dtype)


def sides(kernels: Tensor, directions: str) -> tuple[Tensor, Tensor | None]:
    """What `fft_conv` takes for [s ... d k]: untied, one kernel each (s = 2), the token itself in the first;
    tied, one kernel of the distance, taps 0, 1, ... (s = 1); forward, no way back.
    """
    if directions == "untied":
        return kernels[0], kernels[1]
    return kernels[0], kernels[0][..., 1:] if directions == "tied" else None


def fast_size(least: int) -> int:
    """The smallest even number from `least` on of the form 2^a times 1, 3, 5, 9 or 15: what FFTs are fast
    at.
    """
    candidates = []
    for odd in (1, 3, 5, 9, 15):
        size = 2 * odd
        while size < least:
            size *= 2
        candidates.append(size)
    return min(candidates)


class _CircularConv(torch.autograd.Function):
    """x [b d l] by the circular kernel [d n], n >= l: the first l outputs.

    Keeps x and the kernel alone; their transforms are made again for the gradients, part by part.
    """

    @staticmethod
    def forward(ctx, x: Tensor, circle: Tensor) -> Tensor:
        ctx.save_for_backward(x, circle)
        size = circle.shape[-1]
        return torch.cat(
            [
                torch.fft.irfft(torch.fft.rfft(part, size) * torch.fft.rfft(taps), size)[..., : x.shape[-1]]
                for part, taps in zip(*_parts(x, circle), strict=True)
            ],
            dim=1,
        )

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, circle = ctx.saved_tensors
        size, length = circle.shape[-1], x.shape[-1]
        grads_x, grads_circle = [], []
        for part, taps, over in zip(*_parts(x, circle, grad), strict=True):
            spectrum = torch.fft.rfft(over, size)
            if ctx.needs_input_grad[0]:
                back = spectrum * torch.fft.rfft(taps).conj()
                grads_x.append(torch.fft.irfft(back, size)[..., :length])
            if ctx.needs_input_grad[1]:
                correlation = (spectrum * torch.fft.rfft(part, size).conj()).sum(0)
                grads_circle.append(torch.fft.irfft(correlation, size))
        return (
            torch.cat(grads_x, dim=1) if grads_x else None,
            torch.cat(grads_circle, dim=0) if grads_circle else None,
        )


def _parts(x: Tensor, circle: Tensor, *more: Tensor) -> list[tuple[Tensor, ...]]:
    """The channels of each tensor in groups small enough to transform at a time."""
    channels, size = circle.shape
    group = max(1, min(channels, PART // (x.shape[0] * size)))
    return [x.split(group, dim=1), circle.split(group, dim=0), *(m.split(group, dim=1) for m in more)]
