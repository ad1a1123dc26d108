"""Performer: softmax attention through positive orthogonal random features (FAVOR+).

Paper    Choromanski et al. 2021, arXiv 2009.14794, lemma 1 (positive features) and orthogonal random features
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),
         f(x)_r = exp(w_r . x' - |x'|^2 / 2 - c) + eps,   x' = x / d^(1/4)
Cost     time O(L R D), memory O(L R + R D) per head
Exact    no; its error against dense softmax attention falls as R^(-1/2), down to the bias that eps adds
Padding  padded keys take no part in c and leave S and z unchanged
Differs  c for keys is over the real keys of one row and head (released code: all keys); the factor R^(-1/2)
         is left out because it cancels; a redraw is a function of seed, layer and step, not of the data
"""
# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values), r features

import torch
from torch import Tensor

from models.common import (
    Mixer,
    Place,
    Segments,
    Traits,
    at_least_fp32,
    full_precision,
    register,
    segment_attention,
)


def orthogonal_features(r: int, d: int, generator: torch.Generator) -> Tensor:
    """[r d] float32: rows distributed as N(0, I) each, orthogonal to each other within blocks of d rows."""
    num_blocks = -(-r // d)
    options = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    basis, triangle = torch.linalg.qr(torch.randn(num_blocks, d, d, **options))
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()  # without them the basis is not uniform
    norms = torch.randn(r, d, **options).norm(dim=-1, keepdim=True)  # chi, as those of independent rows
    return (basis * signs[:, None, :]).mT.flatten(0, 1)[:r] * norms


def project(x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """x [... d] -> (w . x' [... r], |x'|^2 / 2 [... 1]), the two terms of the exponent."""
    x = x * x.shape[-1] ** -0.25
    return torch.einsum("...d,rd->...r", x, features), x.square().sum(dim=-1, keepdim=True) / 2


def positive_features(projected: Tensor, energy: Tensor, stabiliser: Tensor, eps: float) -> Tensor:
    """f(x) of the module docstring (lemma 1); values lie in (0, 1 + eps] if the stabiliser is a maximum."""
    return (projected - (energy + stabiliser)).exp() + eps


def favor_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, features: Tensor, eps: float = 1e-4
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real, features: [r d], eps > 0 -> [b h l e]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    features = features.to(v.dtype)
    with full_precision(v):
        (q, q_energy), (k, k_energy) = project(q, features), project(k, features)
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], torch.finfo(k.dtype).min)  # out of the maximum below
        q = positive_features(q, q_energy, q.amax(dim=-1, keepdim=True), eps)
        k = positive_features(k, k_energy, k.amax(dim=(-2, -1), keepdim=True), eps)
        if mask is not None:
            k = k * mask[:, None, :, None]
        state = torch.einsum("bhlr,bhle->bhre", k, v)
        norm = torch.einsum("bhlr,bhr->bhl", q, k.sum(dim=-2)).clamp_min(norm_floor(features, eps))
        return (torch.einsum("bhlr,bhre->bhle", q, state) / norm.unsqueeze(-1)).to(dtype)


def favor_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, features: Tensor, eps: float = 1e-4
) -> Tensor:
    """`favor_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    features = features.to(v.dtype)
    with full_precision(v):
        (q, q_energy), (k, k_energy) = project(q, features), project(k, features)
        segment = Segments.of(cu_seqlens, k.shape[0]).segment[:, None].expand(k.shape[:2])  # [t h]
        lowest = k.new_full((cu_seqlens.shape[0], k.shape[1]), torch.finfo(k.dtype).min)  # filler is last
        largest = lowest.scatter_reduce(0, segment, k.amax(dim=-1), "amax").gather(0, segment)
        q = positive_features(q, q_energy, q.amax(dim=-1, keepdim=True), eps)
        k = positive_features(k, k_energy, largest.unsqueeze(-1), eps)
    return segment_attention(q, k, v, cu_seqlens, max_len, eps=norm_floor(features, eps)).to(dtype)


def norm_floor(features: Tensor, eps: float) -> float:
    """Half the least normaliser that one real key gives, so that it acts on rows without a real key alone."""
    return features.shape[0] * eps**2 / 2


@register("performer")
class Performer(Mixer):
    """Projections around `favor_attention`; the features are a buffer, fixed unless `redraw_every` is set."""

    traits = Traits(packed=True)

    def __init__(
        self,
        place: Place,
        *,
        num_features: int = 256,
        redraw_every: int = 0,
        eps: float = 1e-4,
        feature_seed: int = 0,
    ) -> None:
        super().__init__(place)
        if num_features < 1 or redraw_every < 0 or eps <= 0:
            raise ValueError(
                "performer needs num_features >= 1, redraw_every >= 0 (0: never) and eps > 0; "
                f"got num_features={num_features}, redraw_every={redraw_every}, eps={eps}"
            )
        self.num_features, self.feature_seed = num_features, feature_seed
        self.redraw_every, self.eps = redraw_every, eps
        self.register_buffer("features", self.draw(0))

    def draw(self, index: int) -> Tensor:
        """The features of one redraw: a function of `feature_seed`, the layer and `index` alone."""
        seed = (self.feature_seed * 1_000_003 + self.place.layer_index) * 1_000_003 + index
        generator = torch.Generator().manual_seed(seed % 2**63)
        return orthogonal_features(self.num_features, self.place.head_dim, generator)

    def training_update(self, step: int) -> None:
        if self.redraw_every and step % self.redraw_every == 0:
            self.features.copy_(self.draw(step // self.redraw_every))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return favor_attention(q, k, v, mask, features=self.features, eps=self.eps)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return favor_attention_packed(q, k, v, cu_seqlens, max_len, features=self.features, eps=self.eps)

    def state_size(self, length: int) -> int:
        return self.place.num_heads * self.num_features * (self.place.head_dim + 1)
