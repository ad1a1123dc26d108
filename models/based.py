"""Based: Taylor linear attention for the far, softmax in a small sliding window for the near.

Paper    Arora et al. 2024, arXiv 2402.18668, section 4
Computes window   out_i = sum_{|i - j| <= w // 2} softmax_j(q_i . k_j / sqrt(d)) v_j
         taylor   out_i = sum_j p(s_ij) v_j / sum_j p(s_ij),   p(s) = 1 + s + s^2 / 2,
                  s_ij = (A q_i) . (B k_j) / sqrt(f),   A, B: d to f = 16 for each head
         mode=alternate   window in layers 0, 2, ..., taylor in layers 1, 3, ...
         mode=parallel    the sum of both in every layer
         A model of one layer alternates between nothing: it is a window
Cost     time O(L w D + L f^2 D), memory O(L w + L D) per head
Exact    if mode=alternate, in layers 0, 2, ... and window >= 2 * length
Padding  padded keys get weight zero in both; a row without real ones: 0
Differs  a window looks both ways; no layers of short convolutions between; A and B follow the projections of
         width d that both parts have (released code: Taylor layers project to f at once)
"""
# b batch, h heads, l length, t packed tokens, d head dim, f feature dim

from torch import Tensor, nn

from models.common import Mixer, Place, Traits, register
from models.local import local_attention, local_attention_packed
from models.taylor import narrowed, projection, taylor_attention, taylor_attention_packed

MODES = ("alternate", "parallel")
D_FEATURE = 16


@register("based")
class Based(Mixer):
    """Projections around `local_attention` and `taylor_attention`."""

    traits = Traits(packed=True, uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        mode: str = "alternate",
        d_feature: int = D_FEATURE,
        window: int = 128,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if mode not in MODES:
            raise ValueError(f"unknown mode '{mode}' for based; choose from: {', '.join(MODES)}")
        whole = isinstance(d_feature, int) and isinstance(window, int)
        if not whole or d_feature < 1 or window < 1:
            raise ValueError(
                "based needs d_feature >= 1 and window >= 1, whole numbers; "
                f"got d_feature={d_feature}, window={window}"
            )
        if mode == "alternate" and place.num_layers == 1 and d_feature != D_FEATURE:
            raise ValueError(
                "based has no Taylor layer with mode=alternate in a model of one layer; got "
                f"d_feature={d_feature}, leave it out or set mode=parallel"
            )
        self.mode, self.d_feature, self.window = mode, d_feature, window
        self.looks_near = mode == "parallel" or place.layer_index % 2 == 0
        self.looks_far = mode == "parallel" or place.layer_index % 2 == 1
        self.attn_dropout = nn.Dropout(attn_dropout)
        if self.looks_far:
            self.query_projection, self.key_projection = (projection(place, d_feature) for _ in range(2))
        if not self.looks_near or not 0 < window // 2 < place.max_len - 1:
            reason = "without a window that cuts something off there is no order"
            self.traits = self.traits.but(reason, uses_order=False)

    @property
    def near(self) -> dict:
        return {"window": self.window, "dropout": self.attn_dropout.p if self.training else 0.0}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        parts = []
        if self.looks_near:
            parts.append(local_attention(q, k, v, mask, **self.near))
        if self.looks_far:
            q, k = narrowed(q, self.query_projection), narrowed(k, self.key_projection)
            parts.append(taylor_attention(q, k, v, mask))
        return sum(parts[1:], parts[0])

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        parts = []
        if self.looks_near:
            parts.append(local_attention_packed(q, k, v, cu_seqlens, max_len, **self.near))
        if self.looks_far:
            q = narrowed(q.transpose(0, 1), self.query_projection).transpose(0, 1)
            k = narrowed(k.transpose(0, 1), self.key_projection).transpose(0, 1)
            parts.append(taylor_attention_packed(q, k, v, cu_seqlens, max_len))
        return sum(parts[1:], parts[0])

    def state_size(self, length: int) -> int:
        d, f = self.place.head_dim, self.d_feature
        near = 2 * min(2 * (self.window // 2) + 1, length) * d * self.looks_near
        far = (1 + f + f * (f + 1) // 2) * (d + 1) * self.looks_far
        return self.place.num_heads * (near + far)
