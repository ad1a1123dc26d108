"""Linear attention: a positive feature map in place of the softmax kernel.

Paper    Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4-6
Computes out_i = f(q_i) S / (f(q_i) . z)   with   S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),   f(x) = elu(x)
         + 1
Cost     time O(L D^2), memory O(L D + D^2) per head
Exact    no; it is dense attention with the kernel f(q) . f(k) in place of exp(q . k)
Padding  padded keys leave S and z unchanged
Differs  eps floor on the normaliser; released code adds it instead (add_eps=True). normalise=False is the
         Nystromformer repository's: f(q_i) S / sqrt(L), L the padded length. use_mask=False is LRA's JAX code
"""
# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values)

import math

from torch import Tensor

from models.common import Mixer, Place, Traits, register
from models.linear_rows import mapped
from models.sums import kernel_attention, kernel_sums, segment_attention

EPS = 1e-6


def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, elementwise and positive (eq. 7), in at least float32."""
    return mapped(x, "elu")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = EPS,
    add_eps: bool = False,
    normalise: bool = True,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real token -> [b h l e]."""
    if normalise:
        return kernel_attention(q, k, v, mask, eps=eps, add_eps=add_eps, feature="elu")
    mixed, _ = kernel_sums(feature_map(q), feature_map(k), v, mask)
    return (mixed * q.shape[-2] ** -0.5).to(v.dtype)


def linear_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    eps: float = EPS,
    add_eps: bool = False,
) -> Tensor:
    """`linear_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    return segment_attention(q, k, v, cu_seqlens, max_len, eps=eps, add_eps=add_eps, feature="elu")


@register("linear")
class Linear(Mixer):
    """Projections around `linear_attention`."""

    traits = Traits(packed=True)

    def __init__(
        self,
        place: Place,
        *,
        eps: float = EPS,
        add_eps: bool = False,
        normalise: bool = True,
        use_mask: bool = True,
    ) -> None:
        super().__init__(place)
        if not 0 < eps < math.inf:
            raise ValueError(f"linear needs eps > 0, got {eps}")
        if not normalise and (add_eps or eps != EPS):
            raise ValueError(
                f"linear has no eps with normalise=False, got eps={eps}, add_eps={add_eps}; leave both out"
            )
        self.eps, self.add_eps, self.normalise, self.use_mask = eps, add_eps, normalise, use_mask
        if not normalise:
            reason = "the output is divided by the square root of the padded length"
            self.traits = self.traits.but(reason, length_invariant=False, packed=False)
        if not use_mask:
            reason = "padding is attended to, as in the released code of LRA"
            claims = {"content_invariant": False, "length_invariant": False, "packed": False}
            self.traits = self.traits.but(reason, **claims)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options = {"eps": self.eps, "add_eps": self.add_eps, "normalise": self.normalise}
        return linear_attention(q, k, v, mask if self.use_mask else None, **options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        options = {"eps": self.eps, "add_eps": self.add_eps}
        return linear_attention_packed(q, k, v, cu_seqlens, max_len, **options)

    def state_size(self, length: int) -> int:
        return self.place.num_heads * self.place.head_dim * (self.place.head_dim + self.normalise)
