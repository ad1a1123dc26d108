"""Long convolution: a free kernel as long as the sequence, squashed so that it learns.

Paper    Fu et al. 2023, arXiv 2302.06646, sections 3.1 and 3.2
Computes y_i = sum_{j <= i} K_{i-j} x_j + sum_{j > i} B_{j-i-1} x_j + D x_i   for each feature, and
         out = a * sigmoid(b),   [a, b] = W GELU(y) + c
         K, B are free weights, averaged over `smoothing` neighbours, then squashed: sign(w) max(|w| - t, 0)
         untied K and B are learned apart; tied B_j = K_{j+1}; forward no B. The token itself counts once
Cost     time O(C L log(L) D), memory O(C L D), parameters O(C L D), C channels of y for each one of x
Exact    yes
Padding  padded rows are zeroed before the convolution; a hole keeps the distances around it
Differs  both directions by default (released: for Pathfinder and Path-X alone), smoothing=1 as released; no
         dropout between GELU and W; W keeps its bias with bias=false
"""
# b batch, l length, d width, k taps, s directions, c channels

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import known_directions
from models.fft_conv import fft_conv, sides
from models.ssm import Output, tagged

KERNEL_INITS = ("random", "geometric")


def squash(weight: Tensor, *, threshold: float, smoothing: int = 1) -> Tensor:
    """[... k] -> [... k]: the mean of `smoothing` neighbours (zeros beyond both ends), then the squash."""
    (weight,) = at_least_fp32(weight)
    if smoothing > 1:
        rows = weight.flatten(0, -2)[:, None]
        weight = F.avg_pool1d(rows, smoothing, stride=1, padding=smoothing // 2).view(weight.shape)
    return F.softshrink(weight, threshold)


def long_conv(
    x: Tensor, kernel: Tensor, back: Tensor | None, skip: Tensor, mask: Tensor | None = None
) -> Tensor:
    """x: [b l d], kernel: [c d k], back: [c d k'] or None, skip: [c d], mask: [b l] bool -> [b l c*d]."""
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    backs = [None] * len(kernel) if back is None else back.unbind(0)
    channels = zip(kernel.unbind(0), backs, skip.unbind(0), strict=True)
    return torch.cat([fft_conv(x, *taps) + x * direct for *taps, direct in channels], dim=-1)


@register("long_conv")
class LongConv(Mixer):
    """`long_conv` with weights of its own for each of `max_len` distances, and the layer's output stage."""

    traits = Traits(
        fixed_length=True,
        uses_order=True,
        because={"fixed_length": "the kernel has a weight for each distance up to max_len"},
    )

    def __init__(
        self,
        place: Place,
        *,
        channels: int = 2,
        threshold: float = 0.003,
        smoothing: int = 1,
        kernel_dropout: float = 0.2,
        kernel_init: str = "random",
        directions: str = "untied",
        output: str = "glu",
        kernel_lr_scale: float = 0.1,
    ) -> None:
        super().__init__(place, projections=False)
        if channels < 1:
            raise ValueError(f"long_conv needs channels >= 1, got {channels}")
        if not 0 <= threshold < math.inf:
            raise ValueError(f"long_conv needs a threshold >= 0, got {threshold}")
        if smoothing < 1 or smoothing % 2 == 0:
            raise ValueError(f"long_conv averages an odd number of neighbours, got smoothing={smoothing}")
        if not 0 <= kernel_dropout < 1:
            raise ValueError(f"long_conv needs 0 <= kernel_dropout < 1, got {kernel_dropout}")
        if kernel_init not in KERNEL_INITS:
            raise ValueError(
                f"unknown kernel_init '{kernel_init}' for long_conv; choose from: {', '.join(KERNEL_INITS)}"
            )
        self.directions = known_directions(directions, "long_conv")
        self.threshold, self.smoothing, self.kernel_dropout = threshold, smoothing, kernel_dropout
        shape = (2 if directions == "untied" else 1, channels, place.d_model, place.max_len)
        self.kernel = tagged(nn.Parameter(initial(shape, kernel_init)), lr_scale=kernel_lr_scale)
        self.skip = nn.Parameter(torch.randn(channels, place.d_model))
        self.output = Output(channels * place.d_model, place.d_model, kind=output, name="long_conv")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        if length > self.place.max_len:
            raise ValueError(
                f"long_conv was built for at most {self.place.max_len} positions and got {length}; "
                "raise max_len or shorten the input"
            )
        weight = self.kernel[..., : length + self.smoothing // 2]
        kernels = squash(weight, threshold=self.threshold, smoothing=self.smoothing)[..., :length]
        kernels = F.dropout(kernels, self.kernel_dropout, self.training)
        return self.output(long_conv(x, *sides(kernels, self.directions), self.skip, mask))

    def state_size(self, length: int) -> int:
        return length * self.place.d_model  # a free kernel has no shorter summary of what it has seen


def initial(shape: tuple[int, int, int, int], kernel_init: str) -> Tensor:
    """Weights [s c d k]: small and even, or decaying at a rate of its own for each feature (geometric)."""
    weight = torch.randn(shape)
    if kernel_init == "random":
        return 0.002 * weight
    d, taps = shape[-2:]
    rates = torch.tensor([float(d // 2) ** (i / d) for i in range(d)])
    return 0.02 * weight * torch.exp(-rates[:, None] * torch.arange(taps) / taps)
