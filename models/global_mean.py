"""Global mean: every token gets the same mean of values, the least a mechanism that mixes can do.

Paper    none; with `identity`, a floor that every other row should stand above
Computes out_i = (1 / L) sum_j v_j
Cost     time O(L D), memory O(L D)
Exact    yes; it is softmax attention whose scores are all equal
Padding  the mean is over real tokens; a row without any gives zeros
Differs  no
"""
# b batch, l length, t packed tokens, d width

from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.packed import Chunks, Segments


def global_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x: [b l d], mask: [b l] bool, True = real token -> [b l d], all rows of a sequence alike."""
    dtype = x.dtype
    (wide,) = at_least_fp32(x)
    if mask is None:
        mean = wide.mean(dim=-2, keepdim=True)
    else:
        count = mask.sum(dim=-1).clamp_min(1)
        mean = (wide * mask.unsqueeze(-1)).sum(dim=-2, keepdim=True) / count[:, None, None]
    return mean.to(dtype).expand_as(x)


def global_mean_packed(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`global_mean` within each packed sequence. x: [t d] -> [t d]; filler rows get the last one's mean."""
    dtype = x.dtype
    (x,) = at_least_fp32(x)
    batch_size = cu_seqlens.shape[0] - 1
    chunks = Chunks.of(cu_seqlens, x.shape[0])
    with full_precision(x):
        total = chunks.sum_by_sequence(chunks.lay_out(x).sum(dim=1), batch_size)  # [b d]
    mean = total / cu_seqlens.diff().clamp_min(1)[:, None]
    return mean.to(dtype)[Segments.of(cu_seqlens, x.shape[0]).segment.clamp(max=batch_size - 1)]


@register("global_mean")
class GlobalMean(Mixer):
    """A value and an output projection around `global_mean`."""

    traits = Traits(packed=True)

    def __init__(self, place: Place) -> None:
        super().__init__(place, projections=False)
        inner = place.num_heads * place.head_dim
        self.value = nn.Linear(place.d_model, inner, bias=place.bias)
        self.out = nn.Linear(inner, place.d_model, bias=place.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(global_mean(self.value(x), mask))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self.out(global_mean_packed(self.value(x), cu_seqlens))

    def state_size(self, length: int) -> int:
        return self.place.num_heads * self.place.head_dim
