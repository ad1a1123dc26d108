"""Linformer: attention to a fixed number of learned mixtures of the keys and values.

Paper    Wang et al. 2020, arXiv 2006.04768, eq. 7; sharing: section 4 (additional efficiency techniques)
Computes out_i = softmax(q_i (E K)^T / sqrt(d)) F V   with E, F learned, [proj_len max_len] per head
Cost     time O(L P D) per head, memory O(L P), O((L + P) D) where FlashAttention or the kernels of
         few_keys.py run; P max_len parameters per projection
Exact    yes when proj_len = length and E = F = identity
Padding  padded rows of K and V are zeroed before E and F, which are sliced to the length: they add nothing;
         of packed rows the keys and values alone are padded
Differs  masks padding (paper, and the JAX code of LRA: no, here `use_mask=False`); E and F start as
         N(0, 1 / proj_len), as the proofs in the paper do (`init_std`: Nystromformer's code has N(0, 0.02^2)
         and E = F of a head in all layers, `share=layers_per_head`; the JAX code of LRA has E = F for a whole
         layer, `share=kv`, and flax's normal of variance 1 / max_len, cut off at two standard deviations)
"""
# b batch, h heads (1 if heads share), l length, t packed tokens, n longest length, p slots, d head dim

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, masked_softmax, register
from models.few_keys import few_keys_attention, fits
from models.packed import read_padded
from models.softmax import even_bounds, flash_runs, softmax_fused

SHARE = ("none", "heads", "kv", "layers", "layers_per_head")


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    proj_k: Tensor,
    proj_v: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real, proj_k, proj_v: [h p n] or [1 p n] -> [b h l d].

    ValueError if l > n: a position past the longest length has no column.
    """
    if mask is not None:
        k, v = (x * mask[:, None, :, None] for x in (k, v))
    k, v = mixtures(k, proj_k), mixtures(v, proj_v)
    rows, slots = q.transpose(1, 2), [x.transpose(1, 2) for x in (k, v)]  # [b l h d], [b p h d]
    if fits(rows, *slots):
        bounds = even_bounds(rows), q.shape[-2]
        mixed = few_keys_attention(rows.flatten(0, 1), *slots, *bounds, dropout=dropout)
        return mixed.unflatten(0, rows.shape[:2]).transpose(1, 2)
    if flash_runs(q, k, v):
        return softmax_fused(q, k, v, dropout=dropout)
    scores = torch.einsum("bhld,bhpd->bhlp", q * q.shape[-1] ** -0.5, k)
    weights = masked_softmax(scores, None).to(v.dtype)
    return torch.einsum("bhlp,bhpd->bhld", F.dropout(weights, dropout), v)


def linformer_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    proj_k: Tensor,
    proj_v: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """`linformer_attention` within packed sequences: q, k, v: [t h d] -> [t h d], zeros at filler rows."""
    k, v = (x.transpose(1, 2) for x in read_padded(cu_seqlens, max_len, k, v))  # [b h l d]
    k, v = (mixtures(x, proj).transpose(1, 2) for x, proj in ((k, proj_k), (v, proj_v)))  # [b p h d]
    return few_keys_attention(q, k, v, cu_seqlens, max_len, dropout=dropout)


def mixtures(x: Tensor, proj: Tensor) -> Tensor:
    """E x of each head: x [b h l d], proj [h p n] or [1 p n] -> [b h p d]; ValueError if l > n."""
    length = x.shape[-2]
    if length > proj.shape[-1]:
        raise ValueError(
            f"linformer was built for at most {proj.shape[-1]} positions and got {length}; "
            "raise max_len or shorten the input"
        )
    return torch.einsum("hpl,bhld->bhpd", proj[..., :length].to(x.dtype), x)


@register("linformer")
class Linformer(Mixer):
    """Projections and dropout around `linformer_attention`.

    `share` says what one matrix serves: "none" one head's keys or values; "heads" the keys or the values of
    a layer; "kv" the keys and values of a layer; "layers" the whole model; "layers_per_head" one head's keys
    and values in all layers. `init_std` None starts it with standard deviation proj_len ** -0.5.
    """

    traits = Traits(
        fixed_length=True,
        packed=True,
        uses_order=True,
        because={"fixed_length": "E and F have one column for each position up to max_len"},
    )

    def __init__(
        self,
        place: Place,
        *,
        proj_len: int = 256,
        share: str = "none",
        init_std: float | None = None,
        use_mask: bool = True,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if share not in SHARE:
            raise ValueError(f"unknown share '{share}' for linformer; choose from: {', '.join(SHARE)}")
        some_std = init_std is None or 0 < init_std < math.inf
        if not isinstance(proj_len, int) or proj_len < 1 or not some_std:
            raise ValueError(
                "linformer needs proj_len >= 1, whole, and init_std > 0 or null (proj_len ** -0.5); "
                f"got proj_len={proj_len}, init_std={init_std}"
            )
        self.proj_len, self.use_mask = proj_len, use_mask
        self.attn_dropout = nn.Dropout(attn_dropout)
        std = proj_len**-0.5 if init_std is None else init_std

        def draw() -> nn.Parameter:
            num_matrices = place.num_heads if share in ("none", "layers_per_head") else 1
            return nn.Parameter(torch.randn(num_matrices, proj_len, place.max_len) * std)

        if share in ("layers", "layers_per_head"):
            if "linformer" not in place.shared:
                place.shared["linformer"] = draw()
            self.proj_k = place.shared["linformer"]
        else:
            self.proj_k = draw()
        self.proj_v = draw() if share in ("none", "heads") else self.proj_k
        if not use_mask:
            self.traits = self.traits.but(
                "use_mask=False: E and F mix padding, which packed rows have none of",
                content_invariant=False,
                length_invariant=False,
                packed=False,
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.attn_dropout.p if self.training else 0.0
        mask = mask if self.use_mask else None
        return linformer_attention(q, k, v, mask, proj_k=self.proj_k, proj_v=self.proj_v, dropout=dropout)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        dropout = self.attn_dropout.p if self.training else 0.0
        options = {"proj_k": self.proj_k, "proj_v": self.proj_v, "dropout": dropout}
        return linformer_attention_packed(q, k, v, cu_seqlens, max_len, **options)

    def state_size(self, length: int) -> int:
        return 2 * self.proj_len * self.place.num_heads * self.place.head_dim
