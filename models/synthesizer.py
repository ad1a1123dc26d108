"""Synthesizer: attention weights that are learned, or computed from each query alone, not from pairs.

Paper    Tay et al. 2021, arXiv 2005.00743, section 3 (dense, random, factorised random, mixtures)
Computes out = softmax(A) V   with A of each head by kind, and s Q K^T added to it if dot_product:
         dense       A_i = W_2 relu(W_1 x_i), one score for each of the max_len positions
         random      A_ij learned
         factorised  A = R_1 R_2^T, both max_len x rank and learned
Cost     time O(L^2 D), memory O(L^2) per head; parameters O(N D), O(N^2) or O(N rank) per head, N = max_len
Exact    if dot_product and the other scores are equal: then it is dense softmax attention
Padding  padded keys get weight zero; a row without real ones gives zeros
Differs  W_2 is of one head, as in the paper (released code: shared by the heads, and its scores then read as
         [h l] where they are [l h]); the code of the benchmark ignores padding where there is no dot product
         (here `use_mask=False`, which is refused with one), and its released row is kind=random with
         dot_product. A mixture is a plain sum of scores, as released (paper: a sum with learned weights that
         add up to 1), and of the dot product with one kind (released code: of several kinds too). The paper's
         factorised dense scores and random ones that are not learned are missing. Each weight is dropped by
         itself (released code: one mask for all rows and heads)
"""
# b batch, h heads, l length, n max_len, d head dim, r rank

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, masked_softmax, register, rotate

KINDS = ("dense", "random", "factorised")
RANK = 32


def synthesizer_attention(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    synthetic: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """v: [b h l d], synthetic: scores [b h l l] or [h l l], to which s Q K^T is added if q, k: [b h l d] are
    given, mask: [b l] bool, True = real -> [b h l d].
    """
    scores = synthetic
    if q is not None:
        scores = scores + torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :]).to(v.dtype)
    if dropout:
        weights = F.dropout(weights.expand(*v.shape[:2], -1, -1), dropout)  # drawn for each row
    return torch.einsum("hij,bhjd->bhid" if weights.dim() == 3 else "bhij,bhjd->bhid", weights, v)


@register("synthesizer")
class Synthesizer(Mixer):
    """Projections and learned scores around `synthesizer_attention`.

    `rank` is that of kind=factorised, and refused for others. `use_mask=False` gives padded positions weight,
    as released.
    """

    traits = Traits(
        fixed_length=True,
        uses_order=True,
        quadratic_memory=True,
        because={
            "fixed_length": "there is a score for each of max_len positions",
            "quadratic_memory": "all scores of a sequence are kept",
        },
    )

    def __init__(
        self,
        place: Place,
        *,
        kind: str = "factorised",
        dot_product: bool = False,
        rank: int = RANK,
        use_mask: bool = True,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place, projections=dot_product)
        if kind not in KINDS:
            raise ValueError(f"unknown kind '{kind}' for synthesizer; choose from: {', '.join(KINDS)}")
        if rank < 1:
            raise ValueError(f"synthesizer needs rank >= 1, got {rank}")
        if rank != RANK and kind != "factorised":
            raise ValueError(f"rank={rank} is of kind=factorised alone; leave it out for kind={kind}")
        if dot_product and not use_mask:
            raise ValueError(
                "use_mask=False is what released code does without a dot product, and with one it masks; "
                "got dot_product=True: leave one of them out"
            )
        self.kind, self.dot_product, self.use_mask = kind, dot_product, use_mask
        self.attn_dropout = nn.Dropout(attn_dropout)
        heads, width, longest = place.num_heads, place.head_dim, place.max_len
        if not dot_product:
            self.value = nn.Linear(place.d_model, heads * width, bias=place.bias)
            self.out = nn.Linear(heads * width, place.d_model, bias=place.bias)
        if kind == "dense":
            self.hidden = nn.Linear(place.d_model, heads * width, bias=place.bias)
            self.score_weight = nn.Parameter(torch.empty(heads, width, longest))
            nn.init.uniform_(self.score_weight, -(width**-0.5), width**-0.5)  # as of a linear map
            self.score_bias = nn.Parameter(torch.zeros(heads, 1, longest)) if place.bias else None
        elif kind == "random":
            self.scores = nn.Parameter(torch.randn(heads, longest, longest) * longest**-0.5)
        else:
            std = (longest * rank) ** -0.25  # products then have the variance of kind=random
            self.left = nn.Parameter(torch.randn(heads, longest, rank) * std)
            self.right = nn.Parameter(torch.randn(heads, longest, rank) * std)
        if not use_mask:
            reason = "padding takes part in the softmax, as in the released code"
            self.traits = self.traits.but(reason, content_invariant=False, length_invariant=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        projection = self.qkv if self.dot_product else self.value
        parts = projection(x).unflatten(-1, (-1, self.place.num_heads, self.place.head_dim))
        *pair, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # [b h l d] each
        q, k = pair or (None, None)
        if self.dot_product and self.place.rotary_base is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = (rotate(part, positions, base=self.place.rotary_base) for part in pair)
        mixed = synthesizer_attention(
            q,
            k,
            v,
            mask if self.use_mask else None,
            synthetic=self.synthetic(x),
            dropout=self.attn_dropout.p if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def synthetic(self, x: Tensor) -> Tensor:
        """The scores that no key takes part in: [b h l l] for kind=dense, else [h l l]."""
        length = x.shape[1]
        if self.kind == "random":
            return self.scores[:, :length, :length]
        if self.kind == "factorised":
            return self.left[:, :length] @ self.right[:, :length].mT
        hidden = F.relu(self.hidden(x)).unflatten(-1, (self.place.num_heads, -1))  # [b l h d]
        scores = hidden.transpose(1, 2) @ self.score_weight[..., :length]
        return scores if self.score_bias is None else scores + self.score_bias[..., :length]

    def state_size(self, length: int) -> int:
        return (2 if self.dot_product else 1) * length * self.place.num_heads * self.place.head_dim
