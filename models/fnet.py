"""FNet: a Fourier transform over width and length in place of attention; nothing is learned.

Paper    Lee-Thorp et al. 2022, arXiv 2105.03824, section 3 (the mixing sublayer)
Computes out = Re(FFT_length(FFT_width(x)))
Cost     time O(L D log(L D)), memory O(L D); no parameters, no heads
Exact    yes
Padding  padded rows are zeroed before the transform, which still runs over the padded length
Differs  zeroes the padding (released code: ignores it)
"""
# b batch, l length, d width

import torch
from torch import Tensor

from models.common import Mixer, Place, Traits, at_least_fp32, register


def fourier_mix(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x: [b l d], mask: [b l] bool, True = real token -> [b l d]; the transform is not scaled."""
    dtype = x.dtype
    (x,) = at_least_fp32(x)
    if mask is not None:
        x = x * mask.unsqueeze(-1)
    return torch.fft.fft2(x, dim=(-2, -1)).real.to(dtype)


@register("fnet")
class FNet(Mixer):
    """`fourier_mix` without projections: it has no parameters."""

    traits = Traits(
        length_invariant=False,
        uses_order=True,
        because={"length_invariant": "the frequencies are those of the padded length"},
    )

    def __init__(self, place: Place) -> None:
        super().__init__(place, projections=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return fourier_mix(x, mask)
