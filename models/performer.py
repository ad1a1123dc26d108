"""Performer: softmax attention through positive orthogonal random features (FAVOR+).

Paper    Choromanski et al. 2021, arXiv 2009.14794, lemma 1 (positive features) and orthogonal random features
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),
         softmax   f(x)_r = exp(w_r . x' - |x'|^2 / 2 - c) + eps,   x' = x / d^(1/4)
         relu      f(x)_r = max(w_r . x, 0) + eps (generalised attention); num_features=0: x_r for w_r . x
Cost     time O(L R D), memory O(L R + R D) per head, O(L D + R D) where the kernels of random_features.py run
Exact    no; its error against dense softmax attention falls as R^(-1/2), down to the bias that eps adds
Padding  padded keys take no part in c and leave S and z unchanged
Differs  c for keys is over the real keys of one row and head (released code: all keys; performer-pytorch of
         early 2021: those of all rows and heads, `coupled_stabiliser`); the factor R^(-1/2) is left out as it
         cancels; a redraw is a function of seed, layer and step, not of the data; where the kernels of
         random_features.py run, of several features that attain c one gets its whole gradient. Released code
         by options: LRA's is use_mask=False with kernel=relu num_features=0 eps=1e-3, or with num_features=2
         eps=1e-6 for ListOps; Nystromformer's is double_scaling=True zero_padding=True
         coupled_stabiliser=True
"""
# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values), r features

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.exponentials import stable_exponentials
from models.random_features import feature_attention, fits_kernels
from models.row_products import matrix_rows, row_apply, sum_chunks
from models.sums import batch_of, kernel_attention, offsets_of, rows_of, segment_attention

KERNELS = ("softmax", "relu")


def orthogonal_features(r: int, d: int, generator: torch.Generator) -> Tensor:
    """[r d] float32: rows distributed as N(0, I) each, orthogonal to each other within blocks of d rows."""
    num_blocks = -(-r // d)
    options = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    basis, triangle = torch.linalg.qr(torch.randn(num_blocks, d, d, **options))
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()  # without them the basis is not uniform
    norms = torch.randn(r, d, **options).norm(dim=-1, keepdim=True)  # chi, as those of independent rows
    return (basis * signs[:, None, :]).mT.flatten(0, 1)[:r] * norms


def positive_features(
    x: Tensor,
    features: Tensor,
    stabiliser: Callable[[Tensor], Tensor],
    *,
    eps: float,
    power: float = 0.25,
) -> Tensor:
    """f(x) of the module docstring (lemma 1), x' = x / d^power: [... d] -> [... r].

    c is what `stabiliser` makes of each x's largest w_r . x' [...]; where it is no less, values lie in
    (0, 1 + eps].
    """
    x = x * x.shape[-1] ** -power
    return stable_exponentials(x, features, x.square().sum(dim=-1) / 2, stabiliser, eps)


def relu_features(x: Tensor, features: Tensor | None, eps: float) -> Tensor:
    """f(x) of kernel=relu: [... d] -> [... r], or [... d] without features."""
    return (x if features is None else matrix_rows(x, features)).relu() + eps


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    features: Tensor | None,
    eps: float = 1e-4,
    kernel: str = "softmax",
    double_scaling: bool = False,
    coupled_stabiliser: bool = False,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real, features: [r d], eps > 0 -> [b h l e].

    `features` None is for kernel=relu alone; `double_scaling` divides by d^(1/2) instead of d^(1/4);
    `coupled_stabiliser` takes one c for the keys of all rows and heads.
    """
    power = 0.5 if double_scaling else 0.25
    if kernel == "softmax" and not coupled_stabiliser and fits_kernels(q, k, v, features, eps):
        real = None if mask is None else mask.flatten()
        options = {"eps": eps, "power": power, "floor": norm_floor(len(features), eps), "real": real}
        return batch_of(feature_attention(*rows_of(q, k, v), features, *offsets_of(q), **options), q)
    q, k = at_least_fp32(q, k)
    features = None if features is None else features.to(q.dtype)
    with full_precision(q):
        if kernel == "relu":
            q, k = relu_features(q, features, eps), relu_features(k, features, eps)
        else:
            q = positive_features(q, features, lambda top: top, eps=eps, power=power)
            shared = lambda top: largest_of_keys(top, mask, coupled_stabiliser)  # noqa: E731
            k = positive_features(k, features, shared, eps=eps, power=power)
    return kernel_attention(q, k, v, mask, eps=norm_floor(q.shape[-1], eps))


def favor_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    features: Tensor | None,
    eps: float = 1e-4,
    kernel: str = "softmax",
    double_scaling: bool = False,
) -> Tensor:
    """`favor_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    power = 0.5 if double_scaling else 0.25
    if kernel == "softmax" and fits_kernels(q, k, v, features, eps):
        options = {"eps": eps, "power": power, "floor": norm_floor(len(features), eps)}
        return feature_attention(q, k, v, features, cu_seqlens, max_len, **options)
    q, k = at_least_fp32(q, k)
    features = None if features is None else features.to(q.dtype)
    with full_precision(q):
        if kernel == "relu":
            q, k = relu_features(q, features, eps), relu_features(k, features, eps)
        else:
            q = positive_features(q, features, lambda top: top, eps=eps, power=power)
            shared = lambda top: largest_of_sequence(top, cu_seqlens, max_len)  # noqa: E731
            k = positive_features(k, features, shared, eps=eps, power=power)
    return segment_attention(q, k, v, cu_seqlens, max_len, eps=norm_floor(q.shape[-1], eps))


def largest_of_keys(x: Tensor, mask: Tensor | None, coupled: bool) -> Tensor:
    """x [b h l] -> the same shape: the largest of each row and head, or of all; padding has its own."""
    dims = (0, 1, 2) if coupled else 2
    if mask is None:
        return x.amax(dim=dims, keepdim=True).expand_as(x)
    mask = mask[:, None]
    largest = x.masked_fill(~mask, torch.finfo(x.dtype).min).amax(dim=dims, keepdim=True)
    return torch.where(mask, largest, x.detach())


def largest_of_sequence(x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """x [t h] -> [t h]: the largest of each row's sequence; a filler row has its own.

    By reductions and products, so that neither way rows are scattered, which would not be deterministic.
    """
    chunks = sum_chunks(cu_seqlens, x.shape[0], max_len)
    places = chunks.lay_out(x).masked_fill(~chunks.inside.unsqueeze(-1), torch.finfo(x.dtype).min)
    largest = chunks.max_by_sequence(places.amax(dim=1), cu_seqlens.shape[0] - 1)  # [b h]
    ones = torch.ones_like(x).unsqueeze(-1)
    spread = row_apply(ones, largest[..., None, None], cu_seqlens, max_len).squeeze(-1)
    return torch.where(chunks.where.real[:, None], spread, x.detach())


def norm_floor(num_features: int, eps: float) -> float:
    """Half the least normaliser that one real key gives, so that it acts on rows without a real key alone."""
    return num_features * eps**2 / 2


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
        kernel: str = "softmax",
        double_scaling: bool = False,
        coupled_stabiliser: bool = False,
        zero_padding: bool = False,
        use_mask: bool = True,
    ) -> None:
        super().__init__(place)
        if kernel not in KERNELS:
            raise ValueError(f"unknown kernel '{kernel}' for performer; choose from: {', '.join(KERNELS)}")
        whole = all(isinstance(n, int) for n in (num_features, redraw_every, feature_seed))
        if not whole or num_features < (kernel == "softmax") or redraw_every < 0 or not 0 < eps < math.inf:
            raise ValueError(
                "performer needs num_features >= 1 (0, none, with kernel=relu), redraw_every >= 0 (0: never) "
                f"and eps > 0, all but eps whole; got num_features={num_features}, "
                f"redraw_every={redraw_every}, feature_seed={feature_seed}, eps={eps}"
            )
        if kernel == "relu" and (double_scaling or coupled_stabiliser):
            raise ValueError("performer needs kernel=softmax for double_scaling and coupled_stabiliser")
        if not num_features and (redraw_every or feature_seed):
            raise ValueError(
                "performer needs num_features >= 1 for redraw_every and feature_seed; got num_features=0, "
                f"redraw_every={redraw_every}, feature_seed={feature_seed}"
            )
        if zero_padding and not use_mask:
            raise ValueError("performer needs use_mask=True for zero_padding; got use_mask=False")
        self.num_features, self.feature_seed = num_features, feature_seed
        self.redraw_every, self.eps, self.kernel = redraw_every, eps, kernel
        self.double_scaling, self.coupled_stabiliser = double_scaling, coupled_stabiliser
        self.zero_padding, self.use_mask = zero_padding, use_mask
        self.register_buffer("features", self.draw(0) if num_features else None)
        if coupled_stabiliser:
            reason = "the stabiliser of keys is one maximum over the batch, as in performer-pytorch of 2021"
            self.traits = self.traits.but(reason, batch_invariant=False, packed=False)
        if zero_padding:
            reason = "padding counts as zero keys and values, whose features are not zero"
            self.traits = self.traits.but(reason, length_invariant=False, packed=False)
        if not use_mask:
            reason = "padding is attended to, as in the released code of LRA"
            claims = {"content_invariant": False, "length_invariant": False, "packed": False}
            self.traits = self.traits.but(reason, **claims)

    def draw(self, index: int) -> Tensor:
        """The features of one redraw: a function of `feature_seed`, the layer and `index` alone."""
        seed = (self.feature_seed * 1_000_003 + self.place.layer_index) * 1_000_003 + index
        generator = torch.Generator().manual_seed(seed % 2**63)
        return orthogonal_features(self.num_features, self.place.head_dim, generator)

    def training_update(self, step: int) -> None:
        if self.redraw_every and step % self.redraw_every == 0:
            self.features.copy_(self.draw(step // self.redraw_every))

    @property
    def options(self) -> dict:
        options = {"features": self.features, "eps": self.eps, "kernel": self.kernel}
        return {**options, "double_scaling": self.double_scaling}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not self.use_mask:
            mask = None
        elif self.zero_padding and mask is not None:
            k, v = (x * mask[:, None, :, None] for x in (k, v))
            mask = None
        coupled = self.coupled_stabiliser
        return favor_attention(q, k, v, mask, coupled_stabiliser=coupled, **self.options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return favor_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)

    def state_size(self, length: int) -> int:
        num_features = self.num_features or self.place.head_dim
        return self.place.num_heads * num_features * (self.place.head_dim + 1)
