"""Sinkhorn Transformer: attention in blocks, with another block beside each by a learned soft permutation.

Paper    Tay et al. 2020, arXiv 2002.11296, section 3 (sorting network, Gumbel-Sinkhorn, mixture with local)
Computes out_i = softmax(q_i [K_B; K'_B]^T / sqrt(d)) [V_B; V'_B]  for i in block B,  K'_B = sum_C R_BC K_C,
         V' alike, R = S((Z W + b + noise) / temperature), Z_B = sum_{j in B} k_j; S is exp, then rows and
         columns are divided by their sums num_iterations times; noise is Gumbel's, in training alone
Cost     time and memory O(L block_size D + (L / block_size)^2) per head
Exact    if length <= block_size
Padding  sums are over real tokens, R is over blocks that have any; place t of a sorted block is the mean of
         the real tokens at place t of the blocks, weighed by R, and counts by the share of R that they have
Differs  a last block may be partly padding; own and sorted keys stand side by side in one softmax, as in the
         package sinkhorn-transformer (section 3.2 can be read as scores added place by place); Z sums keys,
         as the benchmark's code does (paper: inputs), but not those of padding, as that code does; one linear
         layer sorts, with weights per head (benchmark's code: for all heads); what that code does is
         sort="sum", or "softmax" as it was meant, with strided and separate, and a padding mask cut into
         other blocks than the tokens, which is not here
"""
# b batch, h heads, l length, d head dim, n blocks, c tokens of a block

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, masked_softmax, register

SORTS = ("sinkhorn", "softmax", "sum")
TEMPERATURE, NUM_ITERATIONS = 0.75, 5
TINY = 1e-30  # a share of real tokens below it is none


def sinkhorn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    block_size: int,
    sort: str = "sinkhorn",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = TEMPERATURE,
    num_iterations: int = NUM_ITERATIONS,
    noise: bool = False,
    strided: bool = False,
    separate: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, sorting net: weight [h d m], bias [h m], m >= n -> [b h l d].

    `strided` takes every n-th token into a block, `separate` adds the results of two softmaxes. ValueError if
    n > m: the sorting net has no output for the last blocks.
    """
    num_blocks = -(-q.shape[-2] // block_size)
    if sort != "sum" and num_blocks > weight.shape[-1]:
        raise ValueError(
            f"the sorting net of sinkhorn was built for at most {weight.shape[-1]} blocks of {block_size} "
            f"tokens and got {num_blocks}; raise max_len or max_num_blocks, or shorten the input"
        )
    dtype, length = v.dtype, v.shape[-2]
    q, k, v = at_least_fp32(q * q.shape[-1] ** -0.5, k, v)
    real = v.new_ones(1, length) if mask is None else mask.to(v.dtype)
    q, k, v = (in_blocks(x, block_size, strided) for x in (q, k * real[:, None, :, None], v))  # [b h n c d]
    real = in_blocks(real[:, None, :, None], block_size, strided)[:, 0, :, :, 0]  # [b n c]
    used = real.sum(dim=-1) > 0
    with full_precision(v):
        order = None
        if sort != "sum":
            logits = torch.einsum("bhnd,hdm->bhnm", k.sum(dim=-2), weight[..., :num_blocks].to(k.dtype))
            logits = logits if bias is None else logits + bias[:, None, :num_blocks]
            if sort == "softmax":
                order = masked_softmax(logits, used[:, None, None, :]) * used[:, None, :, None]
            else:
                logits = (logits + gumbel(logits) if noise else logits) / temperature
                # Computed again in the backward pass: kept, the iterations would outgrow what grows with l.
                options = {"use_reentrant": False, "preserve_rng_state": False}
                order = checkpoint(balanced, logits, used, num_iterations, **options)
        mixed = attend_in_blocks(q, k, v, real, order, separate=separate, dropout=dropout)
    mixed = (mixed.transpose(2, 3) if strided else mixed).flatten(2, 3)[:, :, :length]
    return (mixed if mask is None else mixed * mask[:, None, :, None]).to(dtype)


def in_blocks(x: Tensor, size: int, strided: bool) -> Tensor:
    """[b h l d] -> [b h n c d], zeros past the end."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % size))
    return x.unflatten(-2, (size, -1)).transpose(2, 3) if strided else x.unflatten(-2, (-1, size))


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise from torch's own generator."""
    return -(-torch.rand_like(like).clamp_min(TINY).log()).log()


def balanced(logits: Tensor, used: Tensor, num_iterations: int) -> Tensor:
    """exp(logits) [b h n n], rows and columns divided by their sums in turn; zeros outside `used` [b n]."""
    row, column = used[:, None, :, None], used[:, None, None, :]
    logits = logits.masked_fill(~(row & column), torch.finfo(logits.dtype).min)
    by_row, by_column = 0.0, 0.0  # logarithms of what rows and columns are divided by
    for _ in range(num_iterations):
        by_row = torch.logsumexp(logits - by_column, dim=-1, keepdim=True).masked_fill(~row, 0.0)
        by_column = torch.logsumexp(logits - by_row, dim=-2, keepdim=True).masked_fill(~column, 0.0)
    return (logits - by_row - by_column).exp()


def attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    order: Tensor | None,
    *,
    separate: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax over the own and the sorted block, which for order None is the sum of all; q is scaled already.

    q, k, v: [b h n c d], k zero at padding, real: [b n c] of 0 and 1, order: [b h n n] -> [b h n c d].
    """
    lowest = torch.finfo(v.dtype).min
    v = v * real[:, None, ..., None]
    seen = real.log().clamp_min(lowest)[:, None].expand(-1, q.shape[1], -1, -1)  # [b h n c]
    if order is None:
        k_sorted, v_sorted = (x.sum(dim=2, keepdim=True).expand_as(x) for x in (k, v))
        share = (real.sum(dim=1) > 0).to(v.dtype)[:, None, None].expand_as(seen)
    else:
        k_sorted, v_sorted = ((order @ x.flatten(3)).unflatten(3, x.shape[3:]) for x in (k, v))
        share = order @ real[:, None] / order.sum(dim=-1, keepdim=True).clamp_min(TINY)  # [b h n c]
        k_sorted, v_sorted = (x / share.clamp_min(TINY).unsqueeze(-1) for x in (k_sorted, v_sorted))
    seen_sorted = share.clamp_min(TINY).log().masked_fill(share <= TINY, lowest)
    k, v = torch.cat([k, k_sorted], dim=-2), torch.cat([v, v_sorted], dim=-2)  # [b h n 2c d]
    scores = q @ k.mT + torch.cat([seen.expand_as(seen_sorted), seen_sorted], dim=-1).unsqueeze(-2)
    if separate:
        weights = scores.unflatten(-1, (2, -1)).softmax(dim=-1).flatten(-2)
    else:
        weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout) @ v


@register("sinkhorn")
class Sinkhorn(Mixer):
    """Projections and the sorting network around `sinkhorn_attention`.

    `max_num_blocks` None is as many as `max_len` needs; the benchmark's code has 25 and block_size 50.
    """

    traits = Traits(
        fixed_length=True,
        uses_order=True,
        because={"fixed_length": "the sorting network has an output for every block of max_len"},
    )

    def __init__(
        self,
        place: Place,
        *,
        block_size: int = 64,
        max_num_blocks: int | None = None,
        sort: str = "sinkhorn",
        temperature: float = TEMPERATURE,
        num_iterations: int = NUM_ITERATIONS,
        strided: bool = False,
        separate: bool = False,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if sort not in SORTS:
            raise ValueError(f"unknown sort '{sort}' for sinkhorn; choose from: {', '.join(SORTS)}")
        if block_size < 1 or not 0 < temperature < math.inf or num_iterations < 1:
            raise ValueError(
                "sinkhorn needs block_size >= 1, a finite temperature > 0 and num_iterations >= 1; got "
                f"block_size={block_size}, temperature={temperature}, num_iterations={num_iterations}"
            )
        if sort != "sinkhorn" and (temperature, num_iterations) != (TEMPERATURE, NUM_ITERATIONS):
            raise ValueError(
                "temperature and num_iterations of sinkhorn need sort='sinkhorn'; got "
                f"sort='{sort}', temperature={temperature}, num_iterations={num_iterations}"
            )
        if sort == "sum" and max_num_blocks is not None:
            raise ValueError(
                f"max_num_blocks={max_num_blocks} of sinkhorn needs a sorting net, which sort='sum' has not"
            )
        needed = -(-place.max_len // block_size)
        if max_num_blocks is not None and max_num_blocks < needed:
            raise ValueError(
                f"sinkhorn needs max_num_blocks >= {needed}, the blocks of {block_size} tokens in "
                f"max_len={place.max_len}; got {max_num_blocks}"
            )
        self.sort, self.options = sort, {"block_size": block_size, "strided": strided, "separate": separate}
        self.options |= {"sort": sort, "temperature": temperature, "num_iterations": num_iterations}
        self.sort_weight = self.sort_bias = None
        if sort != "sum":
            bound, outputs = place.head_dim**-0.5, max_num_blocks or needed  # torch's start of a linear map
            self.sort_weight = nn.Parameter(torch.empty(place.num_heads, place.head_dim, outputs))
            self.sort_bias = nn.Parameter(torch.empty(place.num_heads, outputs)) if place.bias else None
            for parameter in (self.sort_weight, *([self.sort_bias] if place.bias else [])):
                nn.init.uniform_(parameter, -bound, bound)
        self.attn_dropout = nn.Dropout(attn_dropout)
        if sort == "sum" or max_num_blocks is not None:
            self.traits = replace(self.traits, fixed_length=False)
        if strided:
            reason = "the tokens of a block are as far apart as the padded length has blocks"
            because = {**self.traits.because, "length_invariant": reason}
            self.traits = replace(self.traits, length_invariant=False, because=because)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options = {**self.options, "weight": self.sort_weight, "bias": self.sort_bias, "noise": self.training}
        options["dropout"] = self.attn_dropout.p if self.training else 0.0
        return sinkhorn_attention(q, k, v, mask, **options)

    def state_size(self, length: int) -> int:
        return 4 * min(self.options["block_size"], length) * self.place.num_heads * self.place.head_dim
