"""FNet: a Fourier transform over width and length in place of attention; nothing is learned.

Paper    Lee-Thorp et al. 2022, arXiv 2105.03824, section 3 (the mixing sublayer)
Computes out = Re(FFT_length(FFT_width(x)))
Cost     time O(L D log(L D)), memory O(L D); no parameters, no heads
Exact    yes
Padding  padded rows are zeroed before the transform, which still runs over the padded length
Differs  zeroes the padding (released code reads it, here `use_mask=False`)
"""
# b batch, l length, d width

from dataclasses import replace

import torch
from torch import Tensor

from models.common import Mixer, Place, Traits, at_least_fp32, register

PARTS = 4  # of the width, transformed one by one over the length: past 4,096 the workspace is as large again


def fourier_mix(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x: [b l d], mask: [b l] bool, True = real token -> [b l d]; the transform is not scaled."""
    dtype = x.dtype
    (x,) = at_least_fp32(x)
    if mask is not None:
        x = x * mask.unsqueeze(-1)
    spectrum = torch.fft.rfft(x, dim=-1)  # half the frequencies of the width; the others mirror them
    parts = spectrum.chunk(PARTS, dim=-1)
    real = torch.cat([torch.fft.fft(part, dim=-2).real for part in parts], dim=-1)
    mirrored = real[..., 1 : (x.shape[-1] + 1) // 2].flip((-2, -1)).roll(1, dims=-2)
    return torch.cat([real, mirrored], dim=-1).to(dtype)


@register("fnet")
class FNet(Mixer):
    """`fourier_mix` without projections: it has no parameters. `use_mask=False` reads padding as tokens."""

    traits = Traits(
        length_invariant=False,
        uses_order=True,
        because={"length_invariant": "the frequencies are those of the padded length"},
    )

    def __init__(self, place: Place, *, use_mask: bool = True) -> None:
        super().__init__(place, projections=False)
        self.use_mask = use_mask
        if not use_mask:
            because = {
                **self.traits.because,
                "content_invariant": "padding is read as the released code does",
            }
            self.traits = replace(self.traits, content_invariant=False, because=because)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return fourier_mix(x, mask if self.use_mask else None)
