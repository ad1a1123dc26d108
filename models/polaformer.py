"""PolaFormer: linear attention that keeps the sign of products, with learned powers that sharpen it.

Paper    Meng et al. 2025, arXiv 2501.15061, section 4
Computes x+ = relu(x / t)^p,   x- = relu(-x / t)^p,   t = softplus(s),   p = 1 + alpha sigmoid(w),
         same_ij = q_i+ . k_j+ + q_i- . k_j-,   other_ij = q_i+ . k_j- + q_i- . k_j+
         o_i = [sum_j same_ij v_j' / n / (sum_j same_ij / n + eps), likewise other_ij and v_j''],
         s and w per channel, v = [v', v''] halves of a head, n real tokens;   out_i = g_i (o_i + c_i)
         c = v convolved along the length, one filter per channel for all heads;   g = projection of the input
Cost     time O(L D^2 + L K D), memory O(L D + D^2) per head, K = kernel_size
Exact    no; without convolution and gate it is dense attention with the kernels `same` and `other`
Padding  padded keys leave all sums and n unchanged, padded values enter the convolution as zeros; o + c is
         zero in a row without real tokens, c at every padded position
Differs  the convolution is along the sequence, not over an image; no learned positions added to the keys (the
         released code has them for images of one size); t is at least 0.01, without which powers overflow
"""
# b batch, h heads, l length, t packed tokens, d head dim

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.packed import Segments
from models.sums import kernel_sums, segment_sums

SMALLEST = 0.01  # scale: queries and keys of size 10 keep finite products up to p = 5


def polar(x: Tensor, scale: Tensor, power: Tensor) -> Tensor:
    """[x+, x-] of the module docstring: x [... h l d], scale, power: [h d] -> [... h l 2d]."""
    x = x / scale.unsqueeze(-2)
    return torch.cat([x.relu() ** power.unsqueeze(-2), (-x).relu() ** power.unsqueeze(-2)], dim=-1)


def swapped(x: Tensor) -> Tensor:
    """[x+, x-] -> [x-, x+]."""
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


def polar_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: Tensor,
    power: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """o of the module docstring. q, k, v: [b h l d], mask: [b l] bool, True = real, scale, power: [h d]."""
    dtype = v.dtype
    q, k, v, scale, power = at_least_fp32(q, k, v, scale, power)
    count = q.shape[-2]
    if mask is not None:
        k = k * mask[:, None, :, None]  # a zero key has no features
        count = mask.sum(dim=-1).clamp_min(1)[:, None, None, None].to(k.dtype)
    q, k = polar(q, scale, power), polar(k, scale, power)
    same, other = v.chunk(2, dim=-1)
    sums = kernel_sums(q, k, same), kernel_sums(q, swapped(k), other)
    return torch.cat([mixed / (norm + count * eps) for mixed, norm in sums], dim=-1).to(dtype)


def polar_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    scale: Tensor,
    power: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """`polar_attention` within each packed sequence. q, k, v: [t h d] -> [t h d]."""
    dtype = v.dtype
    q, k, v, scale, power = at_least_fp32(q, k, v, scale, power)
    q, k = (polar(x.transpose(0, 1), scale, power).transpose(0, 1) for x in (q, k))
    count = F.pad(cu_seqlens.diff(), (0, 1), value=1)[Segments.of(cu_seqlens, q.shape[0]).segment]
    same, other = v.chunk(2, dim=-1)
    sums = [segment_sums(q, *pair, cu_seqlens, max_len) for pair in [(k, same), (swapped(k), other)]]
    floor = (count.to(q.dtype) * eps)[:, None, None]
    return torch.cat([mixed / (norm + floor) for mixed, norm in sums], dim=-1).to(dtype)


def short_convolution(v: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """c_i = bias + sum_t weight_t v_(i + t - centre) over real places, zero at padding.

    v: [b h l d], mask: [b l] bool, True = real, weight: [k d], bias: [d] -> [b h l d].
    """
    padding = None if mask is None else ~mask[:, None, :, None]
    if padding is not None:
        v = v.masked_fill(padding, 0)
    reach, length = len(weight) // 2, v.shape[-2]
    v = F.pad(v, (0, 0, reach, reach))
    out = sum((tap * v[..., t : t + length, :] for t, tap in enumerate(weight)), bias)
    return out if padding is None else out.masked_fill(padding, 0)


def short_convolution_packed(v: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`short_convolution` within each packed sequence. v: [t h d] -> [t h d]."""
    reach, num_rows = len(weight) // 2, v.shape[0]
    where = Segments.of(cu_seqlens, num_rows)
    v, near = F.pad(v, (0, 0, 0, 0, reach, reach)), F.pad(where.segment, (reach, reach), value=-1)
    out = bias
    for t, tap in enumerate(weight):
        own = (near[t : t + num_rows] == where.segment) & where.real
        out = out + tap * v[t : t + num_rows].masked_fill(~own[:, None, None], 0)
    return out.masked_fill(~where.real[:, None, None], 0)


@register("polaformer")
class PolaFormer(Mixer):
    """Projections, scales, powers, convolution and gate around `polar_attention`."""

    traits = Traits(packed=True, uses_order=True)

    def __init__(
        self, place: Place, *, alpha: float = 4.0, kernel_size: int = 5, gate: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__(place)
        positive = 0 < alpha < math.inf and 0 < eps < math.inf
        odd_or_none = isinstance(kernel_size, int) and (
            kernel_size == 0 or (kernel_size > 0 and kernel_size % 2 == 1)
        )
        if not positive or not odd_or_none:
            raise ValueError(
                "polaformer needs alpha > 0, eps > 0 and kernel_size odd or 0 (none); got "
                f"alpha={alpha}, eps={eps}, kernel_size={kernel_size}"
            )
        width = place.head_dim
        if width % 2:
            raise ValueError(
                f"polaformer halves the values of a head, got an odd head width {width}; "
                "change num_heads or d_head"
            )
        self.alpha, self.eps, self.kernel_size = alpha, eps, kernel_size
        self.scale, self.power = (nn.Parameter(torch.zeros(place.num_heads, width)) for _ in range(2))
        self.gate = nn.Linear(place.d_model, place.num_heads * width, bias=place.bias) if gate else None
        if kernel_size:
            bound = kernel_size**-0.5  # the start that torch gives a depthwise convolution
            self.conv_weight = nn.Parameter(torch.empty(kernel_size, width).uniform_(-bound, bound))
            self.conv_bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        if kernel_size < 3:
            self.traits = self.traits.but("no convolution over neighbours", uses_order=False)

    @property
    def options(self) -> dict:
        scale, power = at_least_fp32(self.scale, self.power)
        power = 1 + self.alpha * power.sigmoid()
        return {"scale": F.softplus(scale).clamp_min(SMALLEST), "power": power, "eps": self.eps}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mixed = polar_attention(q, k, v, mask, **self.options)
        if self.kernel_size:
            mixed = mixed + short_convolution(v, self.conv_weight, self.conv_bias, mask)
        return mixed

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        mixed = polar_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)
        if self.kernel_size:
            mixed = mixed + short_convolution_packed(v, self.conv_weight, self.conv_bias, cu_seqlens)
        return mixed

    def merge(self, mixed: Tensor, x: Tensor) -> Tensor:
        return super().merge(mixed if self.gate is None else mixed * self.gate(x), x)

    def state_size(self, length: int) -> int:
        width = self.place.head_dim
        return self.place.num_heads * (2 * width * (width + 2) + min(self.kernel_size, length) * width)
