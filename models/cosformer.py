"""cosFormer: linear attention whose weights fall with distance as a cosine.

Paper    Qin et al. 2022, arXiv 2202.08791, eq. 9-12
Computes out_i = sum_j w_ij v_j / sum_j w_ij   with   w_ij = relu(q_i) . relu(k_j) cos(pi / 2 (i - j) / M),
         split as cos(a - b) = cos a cos b + sin a sin b; M = max_len, so that no weight is negative
Cost     time O(L D^2), memory O(L D + D^2) per head
Exact    no; it is dense attention with the weights w_ij
Padding  padded keys get weight zero; positions count them, M does not depend on how many there are
Differs  M is the longest length the model will see (released code: the padded length, padded_period=True, and
         padding attended to, use_mask=False); a sum of weights below eps counts as eps, as there
"""
# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values)

import math

import torch
from torch import Tensor

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.packed import Segments
from models.sums import kernel_sums, segment_attention


def reweighted(x: Tensor, positions: Tensor, period: int) -> Tensor:
    """relu(x) times cosine and sine of its position: x [... l d], positions [l] -> [... l 2d]."""
    angle = (positions.double() * (math.pi / 2 / period)).unsqueeze(-1)
    x = x.relu()
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)


def check_length(length: int, period: int) -> None:
    """ValueError if tokens may be further apart than the period: weights would be negative."""
    if length > period:
        raise ValueError(
            f"cosformer was built for at most {period} positions and got {length}; "
            "raise max_len or shorten the input"
        )


def cosine_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, period: int, eps: float = 1e-6
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real; period (M) >= l -> [b h l e]."""
    check_length(q.shape[-2], period)
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    positions = torch.arange(q.shape[-2], device=q.device)
    q, k = (reweighted(x, positions, period) for x in (q, k))
    mixed, norm = kernel_sums(q, k, v, mask)
    return (mixed / norm.clamp_min(eps)).to(dtype)


def cosine_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, period: int, eps: float = 1e-6
) -> Tensor:
    """`cosine_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    check_length(max_len, period)
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    positions = Segments.of(cu_seqlens, q.shape[0]).position
    q, k = (reweighted(x.transpose(0, 1), positions, period).transpose(0, 1) for x in (q, k))
    return segment_attention(q, k, v, cu_seqlens, max_len, eps=eps).to(dtype)


@register("cosformer")
class CosFormer(Mixer):
    """Projections around `cosine_attention`."""

    traits = Traits(packed=True, uses_order=True)

    def __init__(
        self, place: Place, *, eps: float = 1e-6, padded_period: bool = False, use_mask: bool = True
    ) -> None:
        super().__init__(place)
        if not 0 < eps < math.inf:
            raise ValueError(f"cosformer needs eps > 0, got {eps}")
        self.eps, self.padded_period, self.use_mask = eps, padded_period, use_mask
        if padded_period:
            reason = "the period of the cosine is the padded length, as in the released code"
            self.traits = self.traits.but(reason, length_invariant=False, packed=False)
        if not use_mask:
            reason = "padding is attended to, as in the released code"
            claims = {"content_invariant": False, "length_invariant": False, "packed": False}
            self.traits = self.traits.but(reason, **claims)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        period = q.shape[-2] if self.padded_period else self.place.max_len
        return cosine_attention(q, k, v, mask if self.use_mask else None, period=period, eps=self.eps)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        options = {"period": self.place.max_len, "eps": self.eps}
        return cosine_attention_packed(q, k, v, cu_seqlens, max_len, **options)

    def state_size(self, length: int) -> int:
        return self.place.num_heads * 2 * self.place.head_dim * (self.place.head_dim + 1)
