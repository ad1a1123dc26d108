"""Linear attention: a positive feature map in place of the softmax kernel.

Paper    Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4-6
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),   f(x) = elu(x)
+ 1
Cost     time O(L D^2), memory O(L D + D^2) per head
Exact    no; it is dense attention with the kernel f(q) . f(k) in place of exp(q . k)
Padding  padded keys leave S and z unchanged
Differs  eps floor on the normaliser (released code: eps added)
"""
# b batch, h heads, l length, t packed tokens, c chunk, n chunks, d head dim (keys), e head dim (values)

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register, segment_attention


def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, elementwise and positive (eq. 7)."""
    return F.elu(x) + 1


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real token -> [b h l e]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    q, k = feature_map(q), feature_map(k)
    if mask is not None:
        k = k * mask[:, None, :, None]
    with full_precision(v):
        state = torch.einsum("bhld,bhle->bhde", k, v)
        norm = torch.einsum("bhld,bhd->bhl", q, k.sum(dim=-2)).clamp_min(eps)
        return (torch.einsum("bhld,bhde->bhle", q, state) / norm.unsqueeze(-1)).to(dtype)


@register("linear")
class Linear(Mixer):
    """Projections around `linear_attention`."""

    traits = Traits(packed=True)

    def __init__(self, place: Place, *, eps: float = 1e-6) -> None:
        super().__init__(place)
        self.eps = eps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return linear_attention(q, k, v, mask, eps=self.eps)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        dtype = v.dtype
        q, k, v = at_least_fp32(q, k, v)
        return segment_attention(feature_map(q), feature_map(k), v, cu_seqlens, max_len, eps=self.eps).to(
            dtype
        )

    def state_size(self, length: int) -> int:
        return self.place.num_heads * self.place.head_dim * (self.place.head_dim + 1)
