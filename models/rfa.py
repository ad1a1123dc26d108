"""Random feature attention: sines and cosines of random projections of normalised queries and keys.

Paper    Peng et al. 2021, arXiv 2103.02143, section 3.1 and eq. 4-5
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),
         f(x) = R^(-1/2) [sin(W u), cos(W u)],   u = x / |x|,   W = w o s, w of N(0, 1), s learned per width
Cost     time O(L R D), memory O(L R + R D) per head
Exact    no; with equal widths s its error against softmax of u_i . u_j s^2 falls as R^(-1/2)
Padding  padded keys leave S and z unchanged
Differs  no gate (it is for causal attention); f(q) . z, which can be negative, is at least eps (released
         code: at least 1 with features of 0.1 in the place of R^(-1/2), which is 100 / R here: 1.5625 at R =
         64, 156 times our default; and u = x / (|x| + 1e-3)); a head picks its matrix from num_draws at every
         step by seed, layer and step, in evaluation head h has matrix h
"""
# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values), r random projections

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, head_products, register
from models.sums import kernel_sums, segment_attention

NUM_DRAWS = 200
TINY = 1e-6  # shorter queries and keys are not made longer than |x| / TINY


def fourier_features(x: Tensor, projections: Tensor) -> Tensor:
    """f(x) of the module docstring. x: [... h l d], projections: [h r d] -> [... h l 2r]."""
    with full_precision(x):
        angle = head_products(F.normalize(x, dim=-1, eps=TINY), projections.mT)
        return torch.cat([angle.sin(), angle.cos()], dim=-1) * projections.shape[-2] ** -0.5


def fourier_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, projections: Tensor, eps: float = 1e-2
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real, projections: [h r d] -> [b h l e]."""
    dtype = v.dtype
    q, k, v, projections = at_least_fp32(q, k, v, projections)
    q, k = fourier_features(q, projections), fourier_features(k, projections)
    mixed, norm = kernel_sums(q, k, v, mask)
    return (mixed / norm.clamp_min(eps)).to(dtype)


def fourier_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    projections: Tensor,
    eps: float = 1e-2,
) -> Tensor:
    """`fourier_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    dtype = v.dtype
    q, k, v, projections = at_least_fp32(q, k, v, projections)
    q, k = (fourier_features(x.transpose(0, 1), projections).transpose(0, 1) for x in (q, k))
    return segment_attention(q, k, v, cu_seqlens, max_len, eps=eps).to(dtype)


@register("rfa")
class RandomFeatureAttention(Mixer):
    """Projections around `fourier_attention`, a pool of random matrices and the learned widths."""

    traits = Traits(packed=True)

    def __init__(
        self,
        place: Place,
        *,
        num_features: int = 64,
        num_draws: int = NUM_DRAWS,
        redraw_every: int = 1,
        temperature: float = 1.0,
        eps: float = 1e-2,
        feature_seed: int = 0,
    ) -> None:
        super().__init__(place)
        whole = all(isinstance(n, int) for n in (num_features, num_draws, redraw_every, feature_seed))
        positive = 0 < temperature < math.inf and 0 < eps < math.inf
        if not whole or num_features < 1 or redraw_every < 0 or not positive:
            raise ValueError(
                "rfa needs num_features >= 1, redraw_every >= 0 (0: never), temperature > 0 and eps > 0, "
                f"all but the last two whole; got num_features={num_features}, num_draws={num_draws}, "
                f"redraw_every={redraw_every}, feature_seed={feature_seed}, temperature={temperature}, "
                f"eps={eps}"
            )
        if num_draws < place.num_heads:
            raise ValueError(f"rfa needs num_draws >= num_heads, got {num_draws} and {place.num_heads}")
        if not redraw_every and num_draws != NUM_DRAWS:
            raise ValueError(
                f"rfa needs redraw_every >= 1 for num_draws, got redraw_every=0 and num_draws={num_draws}"
            )
        self.num_features, self.redraw_every, self.eps = num_features, redraw_every, eps
        self.seed = feature_seed * 1_000_003 + place.layer_index
        pool = torch.randn(num_draws, num_features, place.head_dim, generator=self._generator(0))
        self.register_buffer("pool", pool, persistent=False)  # a function of the seed and the layer
        self.register_buffer("drawn", pool[: place.num_heads].clone())  # [h r d], for training
        self.widths = nn.Parameter(torch.full((place.num_heads, place.head_dim), 1 / temperature))

    def _generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)

    def training_update(self, step: int) -> None:
        if self.redraw_every and step % self.redraw_every == 0:
            generator = self._generator(1 + step // self.redraw_every)
            picked = torch.randperm(len(self.pool), generator=generator)[: self.place.num_heads]
            self.drawn.copy_(self.pool[picked.to(self.pool.device)])

    @property
    def projections(self) -> Tensor:
        """[h r d]: the step's matrices in training, the pool's first in evaluation, times widths."""
        redrawn = self.training and self.redraw_every
        return (self.drawn if redrawn else self.pool[: self.place.num_heads]) * self.widths.unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return fourier_attention(q, k, v, mask, projections=self.projections, eps=self.eps)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        options = {"projections": self.projections, "eps": self.eps}
        return fourier_attention_packed(q, k, v, cu_seqlens, max_len, **options)

    def state_size(self, length: int) -> int:
        return self.place.num_heads * 2 * self.num_features * (self.place.head_dim + 1)
