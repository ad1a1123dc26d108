"""Hedgehog: linear attention on learned features made to be as spiky as softmax.

Paper    Zhang et al. 2024, arXiv 2402.04347, section 4
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j g(k_j) v_j^T,   z = sum_j g(k_j),
         f(x) = [a(y), a(-y)],   y = W x + b;   f and g have their own W and b for each head, W = 1 at first
         exp      a(y) = exp(y - c), c the largest |y| of the query, or of all real keys of the row and head
         softmax  a is the softmax over the features of each half (the authors' later code)
         joint    f(x) is one softmax over [2 y, -2 y] (flash-linear-attention)
Cost     time O(L D^2), memory O(L D + D^2) per head
Exact    no; it is dense attention with the kernel f(q) . g(k)
Padding  padded keys take no part in c and leave S and z unchanged
Differs  c, which cancels but for eps; f(q) . z is at least eps (authors' code: each feature is); no
         distillation from a softmax model, as when it is trained from scratch
"""
# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values), f = d features y

import torch
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, head_products, register
from models.packed import Segments
from models.sums import kernel_sums, segment_attention

FEATURE_MAPS = ("exp", "softmax", "joint")


def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y of the module docstring. x: [... h l d], weight: [h d f], bias: [h f] -> [... h l f]."""
    with full_precision(x):
        return head_products(x, weight) + bias.unsqueeze(-2)


def features(y: Tensor, largest: Tensor, feature_map: str) -> Tensor:
    """[a(y), a(-y)]: [... f] -> [... 2f]; `largest` is c, broadcastable, and used by exp alone."""
    if feature_map == "exp":
        return torch.cat([(y - largest).exp(), (-y - largest).exp()], dim=-1)
    if feature_map == "softmax":
        return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)
    return torch.cat([2 * y, -2 * y], dim=-1).softmax(dim=-1)


def hedgehog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str = "exp",
    eps: float = 1e-12,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real -> [b h l e]; maps: W, b of f and g."""
    dtype = v.dtype
    q, k, v, *maps = at_least_fp32(q, k, v, *maps)
    q, k = mapped(q, *maps[:2]), mapped(k, *maps[2:])
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0)
    q = features(q, q.abs().amax(dim=-1, keepdim=True), feature_map)
    k = features(k, k.abs().amax(dim=(-2, -1), keepdim=True), feature_map)
    mixed, norm = kernel_sums(q, k, v, mask)
    return (mixed / norm.clamp_min(eps)).to(dtype)


def hedgehog_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str = "exp",
    eps: float = 1e-12,
) -> Tensor:
    """`hedgehog_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    dtype = v.dtype
    q, k, v, *maps = at_least_fp32(q, k, v, *maps)
    q = mapped(q.transpose(0, 1), *maps[:2]).transpose(0, 1)
    k = mapped(k.transpose(0, 1), *maps[2:]).transpose(0, 1)
    segment = Segments.of(cu_seqlens, k.shape[0]).segment[:, None].expand(k.shape[:2])  # [t h]
    largest = k.new_zeros(cu_seqlens.shape[0], k.shape[1])  # filler is last
    largest = largest.scatter_reduce(0, segment, k.abs().amax(dim=-1), "amax").gather(0, segment)
    q = features(q, q.abs().amax(dim=-1, keepdim=True), feature_map)
    k = features(k, largest.unsqueeze(-1), feature_map)
    return segment_attention(q, k, v, cu_seqlens, max_len, eps=eps).to(dtype)


@register("hedgehog")
class Hedgehog(Mixer):
    """Projections and learned maps around `hedgehog_attention`."""

    traits = Traits(packed=True)

    def __init__(self, place: Place, *, feature_map: str = "exp", eps: float = 1e-12) -> None:
        super().__init__(place)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"unknown feature_map '{feature_map}' for hedgehog; choose from: {', '.join(FEATURE_MAPS)}"
            )
        if eps <= 0:
            raise ValueError(f"hedgehog needs eps > 0, got {eps}")
        self.feature_map, self.eps = feature_map, eps
        identity = torch.eye(place.head_dim).expand(place.num_heads, -1, -1)
        self.query_map, self.key_map = (nn.Parameter(identity.clone()) for _ in range(2))
        zeros = torch.zeros(place.num_heads, place.head_dim)
        self.query_bias, self.key_bias = (nn.Parameter(zeros.clone()) for _ in range(2))

    @property
    def options(self) -> dict:
        maps = (self.query_map, self.query_bias, self.key_map, self.key_bias)
        return {"maps": maps, "feature_map": self.feature_map, "eps": self.eps}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return hedgehog_attention(q, k, v, mask, **self.options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return hedgehog_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)

    def state_size(self, length: int) -> int:
        return self.place.num_heads * 2 * self.place.head_dim * (self.place.head_dim + 1)
