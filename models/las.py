"""LaS attention: softmax attention made local, by a decay of its scores, and smooth, by an average of its
weights.

Paper    Zimerman and Wolf 2024, arXiv 2311.16620 (Local and Smooth attention)
Computes out = mean_P(softmax(exp(-a |i - j|) s Q K^T)) V   with s = 1 / sqrt(d); mean_P is the mean of P
         neighbours along the keys; a is fixed, 0 in the first head and a geometric series over the others;
         one head alone has the middle of the series
Cost     time O(L^2 D), memory O(L^2) per head; no parameters of its own
Exact    if smoothing is 1, for a head whose a is 0: then it is dense softmax attention
Padding  padded keys get weight zero before and after the mean, which therefore reads no padding; weight that
         the mean carries past the last real key is lost, as it is at the ends of a sequence without padding
Differs  the order of operations is the one remembered of the paper, which has no public code: the decay
         multiplies scores, not weights; the mean runs along keys and counts zeros past the ends; the series
         of a is ours, and so is that of one head. The mean is taken of values, not weights, which is the
         same sum; dropout acts before it
"""
# b batch, h heads, l length, d head dim

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, masked_softmax, register


def las_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    decay: Tensor,
    smoothing: int = 3,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token, decay: a of each head [h] -> [b h l d]."""
    (scores,) = at_least_fp32(torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k))
    position = torch.arange(q.shape[-2], device=q.device, dtype=scores.dtype)
    distance = (position[:, None] - position).abs()
    scores = scores * (-decay.to(scores.dtype)[:, None, None] * distance).exp()
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :]).to(v.dtype)
    if mask is not None:
        v = v * mask[:, None, :, None]
    return torch.einsum("bhij,bhjd->bhid", F.dropout(weights, dropout), smooth(v, smoothing))


def smooth(v: Tensor, smoothing: int) -> Tensor:
    """The mean of `smoothing` (odd) neighbours along the length, zeros past the ends. v: [b h l d]."""
    return F.avg_pool2d(v, (smoothing, 1), stride=1, padding=(smoothing // 2, 0))


def decays(num_heads: int, smallest: float, largest: float) -> Tensor:
    """[h] float64: 0, then a geometric series in the middles of equal parts of [smallest, largest] in log
    scale; of one head alone the middle, so that it is local too.
    """
    count = max(1, num_heads - 1)
    part = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return F.pad(smallest * (largest / smallest) ** part, (num_heads - count, 0))


@register("las")
class LaS(Mixer):
    """Projections and dropout around `las_attention`; the decays are a buffer, not learned."""

    traits = Traits(
        uses_order=True,
        quadratic_memory=True,
        because={"quadratic_memory": "all scores of a sequence are kept"},
    )

    def __init__(
        self,
        place: Place,
        *,
        smoothing: int = 3,
        smallest_decay: float = 1e-3,
        largest_decay: float = 1.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if smoothing < 1 or smoothing % 2 == 0 or not 0 < smallest_decay <= largest_decay:
            raise ValueError(
                "las needs smoothing odd and 0 < smallest_decay <= largest_decay; got "
                f"smoothing={smoothing}, smallest_decay={smallest_decay}, largest_decay={largest_decay}"
            )
        self.smoothing = smoothing
        self.register_buffer(
            "decay", decays(place.num_heads, smallest_decay, largest_decay).float(), persistent=False
        )
        self.attn_dropout = nn.Dropout(attn_dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.attn_dropout.p if self.training else 0.0
        return las_attention(q, k, v, mask, decay=self.decay, smoothing=self.smoothing, dropout=dropout)

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
