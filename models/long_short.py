"""Transformer-LS: one softmax over nearby tokens and a projection of the sequence that depends on it.

Paper    Zhu et al. 2021, arXiv 2107.02192, section 3 (dynamic projection, segment-wise window, DualLN)
Computes out_i = softmax(q_i [N_L(K_i); N_G(P^T K)]^T / sqrt(d)) [N_L(V_i); N_G(P^T V)]   with
         P = softmax over positions of x W_p, [L num_landmarks] per head; K_i, V_i those of i's segment of
         window tokens and of max(1, window // 2) on each side of it; N_L and N_G layer norms over all heads
Cost     time and memory O(L (num_landmarks + window) D) per head
Exact    if num_landmarks = 0, window >= length and dual_norm = False: then it is dense softmax attention
Padding  padded tokens get weight zero in P and among nearby keys
Differs  [CLS] is a token like the others (released code: a global token that is read out on its own); no
         optional convolution of the values; P without the bias that its softmax cancels; a length that is no
         multiple of window is padded at its end (released code: refused); P projects K and V as they are
         (released code: after N_L, here `norm_before_projection`); rotary positions turn keys before norms
"""
# b batch, h heads, l length, d head dim, r landmarks, n segments, c tokens of a segment, m keys it sees

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import (
    Mixer,
    Place,
    Traits,
    at_least_fp32,
    full_precision,
    masked_softmax,
    register,
    rotate,
)

EPS = 1e-5  # torch's own


def long_short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    mask: Tensor | None = None,
    *,
    window: int,
    norm_near: nn.LayerNorm | None = None,
    norm_far: nn.LayerNorm | None = None,
    norm_before_projection: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], projection: the logits of P [b h l r] or None, mask: [b l] bool -> [b h l d].

    Without a projection no token is seen from afar, with window 0 none from near.
    """
    dtype, length = v.dtype, v.shape[-2]
    size = min(window, length) or length  # of a segment
    fill, reach = -length % size, max(1, window // 2) if length > window else 0
    q, k, v = at_least_fp32(q * q.shape[-1] ** -0.5, k, v)
    q = F.pad(q, (0, 0, 0, fill))
    with full_precision(v):
        k_near, v_near = across_heads(norm_near, k, v)
        scores, num_far = [], 0
        if projection is not None:
            real = None if mask is None else mask[:, None, None, :]
            weights = masked_softmax(projection.mT, real)  # [b h r l]
            far = (k_near, v_near) if norm_before_projection else (k, v)
            k_far, v_far = across_heads(norm_far, *(weights @ x for x in far))  # [b h r d]
            scores, num_far = [q @ k_far.mT], k_far.shape[-2]
        if window:
            k_near, v_near = (segments(x, size, reach, fill) for x in (k_near, v_near))  # [b h n d m]
            real = torch.ones_like(q[:1, 0, :length, 0]) if mask is None else mask.to(q.dtype)
            real = segments(real[:, None, :, None], size, reach, fill) > 0  # [b 1 n 1 m]
            near = torch.einsum("bhncd,bhndm->bhncm", q.unflatten(-2, (-1, size)), k_near)
            scores.append(near.masked_fill(~real, torch.finfo(near.dtype).min).flatten(2, 3))
        weights = F.dropout(torch.cat(scores, dim=-1).softmax(dim=-1), dropout)  # [b h l r+m]
        mixed = weights[..., :num_far] @ v_far if num_far else 0.0
        if window:
            near = weights[..., num_far:].unflatten(-2, (-1, size))
            mixed = mixed + torch.einsum("bhncm,bhndm->bhncd", near, v_near).flatten(2, 3)
    mixed = mixed[..., :length, :]
    return (mixed if mask is None else mixed * mask[:, None, :, None]).to(dtype)


def segments(x: Tensor, size: int, reach: int, fill: int) -> Tensor:
    """Segments with `reach` tokens of each side, zeros past the ends: [b h l d] -> [b h n d size+2*reach]."""
    x = x.contiguous()  # compiled pads by 0 must not alias
    return F.pad(x, (0, 0, reach, reach + fill)).unfold(-2, size + 2 * reach, size)


def across_heads(norm: nn.LayerNorm | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A layer norm of all heads of a token together, in the dtype of k, v: [b h l d]; none for None."""
    if norm is None:
        return k, v
    weight, bias = norm.weight.to(k.dtype), norm.bias.to(k.dtype)
    together = torch.stack([k, v]).transpose(2, 3)  # [2 b l h d]
    together = F.layer_norm(together.flatten(3), norm.normalized_shape, weight, bias, norm.eps)
    return together.unflatten(3, (k.shape[1], -1)).transpose(2, 3).unbind(0)


@register("long_short")
class LongShort(Mixer):
    """Projections, P and the two norms around `long_short_attention`."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        num_landmarks: int = 32,
        window: int = 8,
        dual_norm: bool = True,
        norm_before_projection: bool = False,
        eps: float = EPS,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if num_landmarks < 0 or window < 0 or num_landmarks + window == 0 or not 0 < eps < math.inf:
            raise ValueError(
                "long_short needs num_landmarks >= 0 and window >= 0, not both 0, and a finite eps > 0; got "
                f"num_landmarks={num_landmarks}, window={window}, eps={eps}"
            )
        if eps != EPS and not dual_norm:
            raise ValueError(f"eps={eps} of long_short needs dual_norm=True: without it there is no norm")
        if norm_before_projection and not (dual_norm and num_landmarks):
            raise ValueError(
                "norm_before_projection=True of long_short needs dual_norm=True and num_landmarks >= 1; got "
                f"dual_norm={dual_norm}, num_landmarks={num_landmarks}"
            )
        inner = place.num_heads * place.head_dim
        self.num_landmarks, self.window = num_landmarks, window
        self.norm_before_projection = norm_before_projection
        self.projection = self.norm_near = self.norm_far = None
        if num_landmarks:
            self.projection = nn.Linear(place.d_model, place.num_heads * num_landmarks, bias=False)
        if dual_norm and (window or norm_before_projection):
            self.norm_near = nn.LayerNorm(inner, eps=eps)
        if dual_norm and num_landmarks:
            self.norm_far = nn.LayerNorm(inner, eps=eps)
        self.attn_dropout = nn.Dropout(attn_dropout)
        self.traits = Traits(uses_order=window > 0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = self.place.num_heads
        q, k, v = (
            p.transpose(1, 2) for p in self.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
        )  # [b h l d]
        if self.place.rotary_base is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = (rotate(part, positions, base=self.place.rotary_base) for part in (q, k))
        projection = None
        if self.projection is not None:
            projection = self.projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)  # [b h l r]
        options = {"window": self.window, "norm_near": self.norm_near, "norm_far": self.norm_far}
        options["norm_before_projection"] = self.norm_before_projection
        options["dropout"] = self.attn_dropout.p if self.training else 0.0
        mixed = long_short_attention(q, k, v, projection, mask, **options)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        near = min(self.window + 2 * max(1, self.window // 2), length) if self.window else 0
        return 2 * (self.num_landmarks + near) * self.place.num_heads * self.place.head_dim
