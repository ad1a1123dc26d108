"""Softmax attention: every token attends to every real token.

Paper    Vaswani et al. 2017, arXiv 1706.03762, eq. 1; fused kernel: Dao 2023, arXiv 2307.08691
Computes out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j
Cost     time O(L^2 D); memory O(L^2) per head for kernel=math, O(L D) for kernel=fused
Exact    yes; it is what the other mechanisms are compared with
Padding  padded keys get weight zero; a row without real keys gives zeros
Differs  no
"""
# b batch, h heads, l length, t packed tokens, d head dim

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, masked_softmax, register
from models.packed import pad_packed, unpad_packed

KERNELS = ("fused", "math")
LOOP_PAYS_FROM = (
    512  # padded length from which one call per sequence is cheaper on a CPU than scores of padding
)


def softmax_math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Explicit score matrix. q, k, v: [b h l d], mask: [b l] bool, True = real -> [b h l d]."""
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :]).to(v.dtype)
    return torch.einsum("bhij,bhjd->bhid", F.dropout(weights, dropout), v)


def softmax_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """PyTorch's fused kernel. q, k, v: [b h l d], mask: [b l] bool, True = real -> [b h l d]."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    some = mask.any(dim=-1, keepdim=True)  # kernels differ on rows without a key: give them all, then zero
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=(mask | ~some)[:, None, None, :], dropout_p=dropout
    )
    return out * some[:, None, :, None]


def softmax_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, dropout: float = 0.0
) -> Tensor:
    """FlashAttention over packed rows, no padding computed. q, k, v: [t h d] in half precision on a GPU ->
    [t h d].

    The operator behind `torch.nn.attention.varlen`, called directly because that wrapper has no dropout.
    """
    real = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    q, k, v = (torch.where(real, x, 0) for x in (q, k, v))  # the kernel leaves filler rows unwritten, also in
    cu_seqlens = cu_seqlens.to(torch.int32)  # its gradients: neither may reach a product with a weight
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, dropout, False, False
    )
    return torch.where(real, out, 0)


def softmax_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, dropout: float = 0.0
) -> Tensor:
    """One fused call per sequence, no padding computed: the packed path of the CPU. q, k, v: [t h d] -> [t h
    d].
    """
    bounds = cu_seqlens.tolist()
    parts = [
        softmax_fused(*(x[start:stop].transpose(0, 1)[None] for x in (q, k, v)), dropout=dropout)[
            0
        ].transpose(0, 1)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        if stop > start
    ]
    return torch.cat([*parts, torch.zeros_like(v[bounds[-1] :])])


@register("softmax")
class Softmax(Mixer):
    """Projections and dropout around softmax attention, explicit (`kernel=math`) or fused."""

    traits = Traits(packed=True)

    def __init__(self, place: Place, *, kernel: str = "fused", attn_dropout: float = 0.0) -> None:
        super().__init__(place)
        if kernel not in KERNELS:
            raise ValueError(f"unknown kernel '{kernel}' for softmax; choose from: {', '.join(KERNELS)}")
        self.kernel = kernel
        self.attn_dropout = nn.Dropout(attn_dropout)
        if kernel == "math":
            because = {"quadratic_memory": "kernel=math keeps the whole score matrix"}
            self.traits = replace(self.traits, quadratic_memory=True, because=because)

    @property
    def dropout(self) -> float:
        return self.attn_dropout.p if self.training else 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        attend = softmax_math if self.kernel == "math" else softmax_fused
        return attend(q, k, v, mask, dropout=self.dropout)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        half = q.dtype in (torch.float16, torch.bfloat16)
        if self.kernel == "fused" and q.is_cuda and half:
            return softmax_varlen(q, k, v, cu_seqlens, max_len, dropout=self.dropout)
        loop = q.device.type == "cpu" and max_len >= LOOP_PAYS_FROM and not torch.compiler.is_compiling()
        if self.kernel == "fused" and loop:
            return softmax_by_sequence(q, k, v, cu_seqlens, dropout=self.dropout)
        padded = [pad_packed(x, cu_seqlens, max_len) for x in (q, k, v)]
        mixed = self.attend(*(x.transpose(1, 2) for x, _ in padded), padded[0][1])
        return unpad_packed(mixed.transpose(1, 2), cu_seqlens, q.shape[0])

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
