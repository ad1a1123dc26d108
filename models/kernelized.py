"""Kernelized attention: a Gaussian kernel of queries and keys in place of softmax, without a normaliser.

Paper    Chen et al. 2021, arXiv 2111.00035, Kernelized Attention
Computes out_i = sum_j exp(-|q_i' - k_j'|^2 / 2) v_j   with   x' = x / d^(1/4)
Cost     time O(L^2 D), memory O(L^2) per head
Exact    no; divided by the sum of its weights it is softmax attention if all keys are equally long
Padding  padded keys get weight zero; queries and keys at padding are zeroed first
Differs  no; `scale_width` puts another width in the place of d (the released code has d here, and 32 whatever
         the head in Skyformer alone)
"""
# b batch, h heads, l length, d head dim

import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.landmarks import gaussian_kernel


def kernelized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale_width: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token -> [b h l d]; scale_width None means d."""
    scale = (scale_width or q.shape[-1]) ** -0.25
    q, k = (x * scale for x in at_least_fp32(q, k))
    if mask is not None:
        real = mask[:, None, :, None]
        q, k, v = (x.masked_fill(~real, 0) for x in (q, k, v))  # a weight of padding meets a value of zero
    with full_precision(q):
        weights = gaussian_kernel(q, k)
    return F.dropout(weights.to(v.dtype), dropout) @ v


@register("kernelized")
class Kernelized(Mixer):
    """Projections and dropout around `kernelized_attention`."""

    traits = Traits(
        quadratic_memory=True,
        because={"quadratic_memory": "it holds the weight of every query and key, as the paper defines it"},
    )

    def __init__(self, place: Place, *, scale_width: int | None = None, attn_dropout: float = 0.0) -> None:
        super().__init__(place)
        if scale_width is not None and not (isinstance(scale_width, int) and scale_width >= 1):
            raise ValueError(
                f"kernelized needs scale_width >= 1, whole, or null (the width of a head), got {scale_width}"
            )
        self.scale_width = scale_width
        self.attn_dropout = nn.Dropout(attn_dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.attn_dropout.p if self.training else 0.0
        return kernelized_attention(q, k, v, mask, scale_width=self.scale_width, dropout=dropout)

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
