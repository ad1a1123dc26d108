"""Hedgehog: linear attention on learned features made to be as spiky as softmax.

Paper    Zhang et al. 2024, arXiv 2402.04347, section 4
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j g(k_j) v_j^T,   z = sum_j g(k_j),
         f(x) = [a(y), a(-y)],   y = W x + b;   f and g have their own W and b for each head, W = 1 at first
         exp      a(y) = exp(y)
         softmax  a is the softmax over the features of each half (the authors' later code)
         joint    f(x) is one softmax over [2 y, -2 y] (flash-linear-attention)
Cost     time O(L D^2), memory O(L D + D^2) per head
Exact    no; it is dense attention with the kernel f(q) . g(k)
Padding  padded keys leave S and z unchanged
Differs  no eps: the largest value of each feature over the real keys moves from keys to queries, and the
         largest feature of a query cancels, so that f(q) . z is at least 1 (authors' code of exp: `based`
         raises y and -y to 1e-12 before it; `lolcats` takes the largest y and -y off every token, keys too,
         and raises features to 1e-12); no distillation, as when it is trained from scratch
"""
# b batch, h heads, l length, t packed tokens, n chunks, c places of a chunk, d head dim (keys), e head dim
# (values), f = d features y

import torch
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, head_products, register
from models.external import largest_of_sequence
from models.row_products import sum_chunks
from models.sums import chunk_sums, kernel_sums

FEATURE_MAPS = ("exp", "softmax", "joint")
LEAST = 0.5  # below the normaliser of every row with a real key


def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y of the module docstring. x: [... h l d], weight: [h d f], bias: [h f] -> [... h l f]."""
    with full_precision(x):
        return head_products(x, weight) + bias.unsqueeze(-2)


def log_features(y: Tensor, feature_map: str) -> Tensor:
    """The logarithm of [a(y), a(-y)]: [... f] -> [... 2f]."""
    if feature_map == "exp":
        return torch.cat([y, -y], dim=-1)
    if feature_map == "softmax":
        return torch.cat([y.log_softmax(dim=-1), (-y).log_softmax(dim=-1)], dim=-1)
    return torch.cat([2 * y, -2 * y], dim=-1).log_softmax(dim=-1)


def balanced(q: Tensor, k: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """f(q) and g(k) from their logarithms [... 2f], up to one factor for each query, which cancels.

    largest: the maximum of k over the keys of a sequence, broadcastable; keys of padding give at most 1.
    """
    q = q + largest
    return (q - q.detach().amax(dim=-1, keepdim=True)).exp(), (k - largest).exp()


def hedgehog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str = "exp",
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real -> [b h l e]; maps: W, b of f and g."""
    dtype = v.dtype
    q, k, v, *maps = at_least_fp32(q, k, v, *maps)
    q, k = (log_features(mapped(x, *m), feature_map) for x, m in ((q, maps[:2]), (k, maps[2:])))
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], torch.finfo(k.dtype).min)
    q, k = balanced(q, k, k.detach().amax(dim=-2, keepdim=True))
    mixed, norm = kernel_sums(q, k, v, mask)
    return (mixed / norm.clamp_min(LEAST)).to(dtype)


def hedgehog_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str = "exp",
) -> Tensor:
    """`hedgehog_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    dtype = v.dtype
    q, k, v, *maps = at_least_fp32(q, k, v, *maps)
    q, k = (
        log_features(mapped(x.transpose(0, 1), *m), feature_map).transpose(0, 1)
        for x, m in ((q, maps[:2]), (k, maps[2:]))
    )
    chunks, batch_size = sum_chunks(cu_seqlens, q.shape[0], max_len), cu_seqlens.shape[0] - 1
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the column of ones collects the normaliser
    q, k, v = (chunks.lay_out(x) for x in (q, k, v))  # [n c h ...], values of zero at unused places
    k = k.masked_fill(~chunks.inside[..., None, None], torch.finfo(k.dtype).min)
    largest = largest_of_sequence(k.detach().amax(dim=1), chunks.owner, batch_size)  # [n h 2f]
    q, k = balanced(q, k, largest[:, None])
    mixed = chunks.take_back(chunk_sums(q, k, v, chunks, batch_size))
    return (mixed[..., :-1] / mixed[..., -1:].clamp_min(LEAST)).to(dtype)


@register("hedgehog")
class Hedgehog(Mixer):
    """Projections and learned maps around `hedgehog_attention`."""

    traits = Traits(packed=True)

    def __init__(self, place: Place, *, feature_map: str = "exp") -> None:
        super().__init__(place)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"unknown feature_map '{feature_map}' for hedgehog; choose from: {', '.join(FEATURE_MAPS)}"
            )
        self.feature_map = feature_map
        identity = torch.eye(place.head_dim).expand(place.num_heads, -1, -1)
        self.query_map, self.key_map = (nn.Parameter(identity.clone()) for _ in range(2))
        zeros = torch.zeros(place.num_heads, place.head_dim)
        self.query_bias, self.key_bias = (nn.Parameter(zeros.clone()) for _ in range(2))

    @property
    def options(self) -> dict:
        maps = (self.query_map, self.query_bias, self.key_map, self.key_bias)
        return {"maps": maps, "feature_map": self.feature_map}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return hedgehog_attention(q, k, v, mask, **self.options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return hedgehog_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)

    def state_size(self, length: int) -> int:
        return self.place.num_heads * 2 * self.place.head_dim * (self.place.head_dim + 1)
