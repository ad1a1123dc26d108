"""Softmax attention: every token attends to every real token.

Paper    Vaswani et al. 2017, arXiv 1706.03762, eq. 1; fused kernel: Dao 2023, arXiv 2307.08691
Computes out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j
Cost     time O(L^2 D); memory O(L^2) per head for kernel=math, O(L D) for kernel=fused
Exact    yes; it is what the other mechanisms are compared with
Padding  padded keys get weight zero; a row without real keys gives zeros
Differs  no
"""
# b batch, h heads, l length, m queries, t packed tokens, u packed keys, d head dim

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, masked_softmax, register
from models.packed import pad_packed, unpad_packed

KERNELS = ("fused", "math")
FLASH_WIDEST_HEAD = 256
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
    """PyTorch's fused kernels. q: [b h m d], k, v: [b h l d], mask: [b l] bool, True = real -> [b h m d].

    Given a mask, its kernels compute the padded keys too: where FlashAttention runs, it gets the real ones
    only.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    some = mask.any(dim=-1, keepdim=True)  # kernels differ on rows without a key: give them all, then zero
    keys = mask | ~some
    if flash_runs(q, k, v):
        out = softmax_compacted(q, k, v, keys, partial(flash, dropout=dropout))
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None, :], dropout_p=dropout)
    return out * some[:, None, :, None]


def softmax_compacted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kernel: Callable[..., Tensor]) -> Tensor:
    """`kernel` on every query and the real keys alone. q: [b h m d], k, v: [b h l d], mask: [b l] bool
    -> [b h m d].

    kernel(q, k, v, cu_queries, cu_keys, m, l) gets rows, of which those of the keys are as `compacted` leaves
    them.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v, cu_keys = compacted(k, v, mask)
    out = kernel(q.flatten(0, 1), k, v, even_bounds(q), cu_keys, q.shape[1], mask.shape[1])
    return out.unflatten(0, q.shape[:2]).transpose(1, 2)


def even_bounds(x: Tensor) -> Tensor:
    """Where the sequences of x [b l ...] begin among the rows [b*l ...], and their end: [b+1] int32."""
    batch_size, length = x.shape[:2]
    return length * torch.arange(batch_size + 1, dtype=torch.int32, device=x.device)


def compacted(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The real keys alone: k, v [b l h d], mask [b l] bool -> k, v [b*l h d], cu_keys [b+1] int32.

    Sequence i has the rows from cu_keys[i] to cu_keys[i + 1]; later rows are filler, whose gradients may hold
    anything.
    """
    cu_keys = F.pad(mask.sum(dim=1).cumsum(0), (1, 0))
    ends = (cu_keys[:-1, None] + mask.cumsum(dim=1)).flatten()  # [b*l] real keys up to and with this one
    rows = torch.arange(mask.numel(), device=mask.device)
    order = torch.searchsorted(ends, rows, right=True).clamp(max=mask.numel() - 1)
    slot = (ends - 1).clamp(min=0)
    k, v = (_Compact.apply(x.flatten(0, 1), order, slot, mask.flatten()) for x in (k, v))
    return k, v, cu_keys.to(torch.int32)


class _Compact(torch.autograd.Function):
    """Rows [t ...] by index; real row i went to row slot[i], and from there alone comes its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, slot: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(slot, real)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        slot, real = ctx.saved_tensors
        return torch.where(real[:, None, None], grad.index_select(0, slot), 0), None, None, None


def softmax_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, dropout: float = 0.0
) -> Tensor:
    """FlashAttention over packed rows, no padding computed. q, k, v: [t h d] in half precision on a GPU ->
    [t h d].
    """
    real = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    q, k, v = (torch.where(real, x, 0) for x in (q, k, v))  # the kernel leaves filler rows unwritten, also in
    cu_seqlens = cu_seqlens.to(torch.int32)  # its gradients: neither may reach a product with a weight
    return torch.where(real, flash(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, dropout=dropout), 0)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    dropout: float,
) -> Tensor:
    """The operator behind `torch.nn.attention.varlen`, called directly because that wrapper has no dropout.

    q: [t h d], k, v: [u h d]; sequence i has the queries from cu_queries[i] to cu_queries[i + 1] (int32), at
    most max_queries, keys likewise -> [t h d], unwritten at rows of no sequence, as are gradients.
    """
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_queries, cu_keys, max_queries, max_keys, dropout, False, False
    )
    return out


def flash_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash` takes such tensors: half precision, heads as wide as it has kernels for, on a GPU that
    runs them.
    """
    half = q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    width = q.shape[-1]
    return half and width % 8 == 0 and width <= FLASH_WIDEST_HEAD and q.is_cuda and _flash_device(q.device)


@torch.compiler.assume_constant_result
def _flash_device(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
        if self.kernel == "fused" and flash_runs(q, k, v):
            return softmax_varlen(q, k, v, cu_seqlens, max_len, dropout=self.dropout)
        loop = q.device.type == "cpu" and max_len >= LOOP_PAYS_FROM and not torch.compiler.is_compiling()
        if self.kernel == "fused" and loop:
            return softmax_by_sequence(q, k, v, cu_seqlens, dropout=self.dropout)
        padded = [pad_packed(x, cu_seqlens, max_len) for x in (q, k, v)]
        mixed = self.attend(*(x.transpose(1, 2) for x, _ in padded), padded[0][1])
        return unpad_packed(mixed.transpose(1, 2), cu_seqlens, q.shape[0])

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
