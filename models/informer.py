"""Informer: full attention for the queries that stand out, the mean of values for all others (ProbSparse).

Paper    Zhou et al. 2021, arXiv 2012.07436, algorithm 1; in its bidirectional form
Computes M_i = max_j s_ij - mean_j s_ij over U sampled keys, s_ij = q_i . k_j / sqrt(d);
         out_i = sum_j softmax_j(s_ij) v_j for the u queries with the largest M, mean_j v_j for the others;
         U = u = min(n, factor ceil(ln n)) for n real tokens
Cost     time O(L ln L D), memory O(L D); the samples take O(L D) at a time, without gradients
Exact    yes if u = n: then it is softmax attention
Padding  n, samples, means and softmax are of real tokens, and only real queries compete
Differs  samples are decided by sample_seed, layer and training step, and fixed in evaluation (released code:
         fresh in every forward); `mean_over_length` divides the sum of the samples by n (released code);
         `target` sets factor = ceil(target / ln max_len) (Skyformer's port: 128), `use_mask=False` ignores
         padding (the port); in half precision queries are chosen by projections in float32; the pooling
         between layers (distilling) belongs to no mechanism
"""
# b batch, h heads, l length, s samples, u chosen queries, d head dim

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register, rotate
from models.landmarks import Draw, real_positions

AT_ONCE = 8  # samples
FACTOR = 5


def budget(length: int, factor: int) -> int:
    """min(n, factor ceil(ln n)): how many keys are sampled, and how many queries chosen; at least one."""
    return max(1, min(length, factor * math.ceil(math.log(length))))


def budgets(mask: Tensor, factor: int) -> Tensor:
    """`budget` of the real tokens of each row: mask [b l] -> [b] int64."""
    count = mask.sum(dim=-1)
    powers = torch.arange(32, dtype=torch.float64, device=mask.device).exp()
    logarithm = (count[:, None] > powers).sum(dim=-1)  # as many powers of e are below n as ceil(ln n) says
    return torch.minimum(count, factor * logarithm).clamp_min(1)


@torch.no_grad()
def sparsity(
    q: Tensor, k: Tensor, sampled: Tensor, taken: Tensor | None = None, divisor: Tensor | int | None = None
) -> Tensor:
    """M of the module docstring, but for the factor 1 / sqrt(d). q, k: [b h l d] -> [b h l].

    sampled: [b l s] or [1 l s] positions of keys; taken: [b] how many of them a row uses, all if None;
    divisor: [b] or a number, of the sum, `taken` if None.
    """
    batch_size, num_heads, length, _ = q.shape
    row = torch.arange(batch_size * num_heads, device=q.device).view(batch_size, num_heads, 1, 1) * length
    rows, q = k.flatten(0, 2), q.unsqueeze(-1)
    largest, total = q.new_full(q.shape[:3], -math.inf), q.new_zeros(q.shape[:3])
    for start in range(0, sampled.shape[-1], AT_ONCE):
        some = sampled[:, None, :, start : start + AT_ONCE] + row  # [b h l s]
        scores = (rows.index_select(0, some.flatten()).view(*some.shape, -1) @ q).squeeze(-1)
        if taken is None:
            largest, total = torch.maximum(largest, scores.amax(dim=-1)), total + scores.sum(dim=-1)
            continue
        index = torch.arange(start, start + scores.shape[-1], device=q.device)
        unused = (index >= taken[:, None])[:, None, None]  # [b 1 1 s]
        largest = torch.maximum(largest, scores.masked_fill(unused, -math.inf).amax(dim=-1))
        total = total + scores.masked_fill(unused, 0).sum(dim=-1)
    if divisor is None:
        divisor = sampled.shape[-1] if taken is None else taken
    if isinstance(divisor, Tensor):
        divisor = divisor.clamp_min(1)[:, None, None]
    return largest - total / divisor


def attend_where_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    measure: Tensor,
    most: int,
    chosen: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attention for the queries of the largest measure, the mean of values for others -> [b h l d].

    q, k, v: [b h l d], measure: [b h l]; most: how many queries at the most; chosen: [b] how many in each
    row, `most` if None. Of equal measures the earlier comes first.
    """
    if mask is not None:
        measure = measure.masked_fill(~mask[:, None], -math.inf)
        v = v.masked_fill(~mask[:, None, :, None], 0)
    where = measure.sort(dim=-1, descending=True, stable=True).indices[..., :most, None]  # [b h u 1]
    where = where.expand(-1, -1, -1, v.shape[-1])
    some = None if mask is None else mask.any(dim=-1, keepdim=True)  # rows without a key: give them all
    keys = None if mask is None else (mask | ~some)[:, None, None, :]
    attended = F.scaled_dot_product_attention(q.gather(2, where), k, v, attn_mask=keys, dropout_p=dropout)
    count = v.shape[-2] if mask is None else mask.sum(dim=-1).clamp_min(1)[:, None, None, None]
    (wide,) = at_least_fp32(v)
    mean = (wide.sum(dim=-2, keepdim=True) / count).to(v.dtype)  # [b h 1 d]
    if chosen is not None:
        rank = torch.arange(most, device=q.device)
        attended = attended.where((rank < chosen[:, None])[:, None, :, None], mean)
    return mean.expand(v.shape).scatter(2, where, attended.to(v.dtype))


def informer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    numbers: Tensor,
    factor: int = FACTOR,
    mean_over_length: bool = False,
    dropout: float = 0.0,
    choose_by: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token -> [b h l d].

    numbers: [l s] random integers below 2^32 that draw the keys of each query, s = budget(l, factor);
    choose_by: queries and keys in another precision, to choose by.
    """
    length = q.shape[-2]
    most, chosen = budget(length, factor), None if mask is None else budgets(mask, factor)
    divisor = None
    if mean_over_length:
        divisor = length if mask is None else mask.sum(dim=-1)
    by = at_least_fp32(*((q, k) if choose_by is None else choose_by))
    with full_precision(q):
        measure = sparsity(*by, real_positions(numbers, mask, length), chosen, divisor)
    return attend_where_sparse(q, k, v, mask, measure, most, chosen, dropout=dropout)


@register("informer")
class Informer(Mixer):
    """Projections and dropout around `informer_attention`, and the draw of its samples."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        factor: int = FACTOR,
        target: int | None = None,
        mean_over_length: bool = False,
        use_mask: bool = True,
        sample_seed: int = 0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        whole = all(isinstance(n, int) for n in (factor, 1 if target is None else target, sample_seed))
        if not whole or factor < 1 or (target is not None and target < 1):
            raise ValueError(
                "informer needs factor >= 1 and target >= 1 or null (factor as given), whole numbers; "
                f"got factor={factor}, target={target}, sample_seed={sample_seed}"
            )
        if target is not None and factor != FACTOR:
            raise ValueError(
                f"informer computes the factor from target; got factor={factor} and target={target}"
            )
        self.factor = factor if target is None else math.ceil(target / math.log(max(2, place.max_len)))
        self.mean_over_length, self.use_mask = mean_over_length, use_mask
        self.attn_dropout = nn.Dropout(attn_dropout)
        self.draw = Draw(sample_seed, place.layer_index)
        if not use_mask:
            reason = "use_mask=False: padding is sampled, chosen and averaged like tokens"
            self.traits = self.traits.but(reason, content_invariant=False, length_invariant=False)
        if all(budget(n, self.factor) == n for n in range(1, place.max_len + 1)):
            self.traits = self.traits.but("every query is chosen at every length", uses_order=False)

    def training_update(self, step: int) -> None:
        self.draw.advance(step)

    def numbers(self, length: int) -> Tensor:
        """[l s]: number j of position i is the same whatever the length."""
        position, sample = (
            torch.arange(count, device=self.out.weight.device)
            for count in (length, budget(length, self.factor))
        )
        return self.draw(position[:, None] + (sample << 20))

    def project(self, x: Tensor, parts: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Queries and keys (parts 2), and values (3), of x [b l d_model], in `dtype` -> [b h l d] each."""
        size = parts * self.place.num_heads * self.place.head_dim
        weight, bias = self.qkv.weight[:size], None if self.qkv.bias is None else self.qkv.bias[:size]
        if dtype is not None:
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        heads = F.linear(x, weight, bias).unflatten(-1, (parts, self.place.num_heads, -1))  # [b l 3 h d]
        q, k, *v = (part.transpose(1, 2) for part in heads.unbind(2))
        if self.place.rotary_base is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = (rotate(part, positions, base=self.place.rotary_base) for part in (q, k))
        return q, k, *v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, 3)
        choose_by = None
        if q.dtype not in (torch.float32, torch.float64):  # rounding would choose other queries
            with torch.no_grad(), full_precision(x):
                choose_by = self.project(x, 2, torch.float32)
        options = {"factor": self.factor, "mean_over_length": self.mean_over_length, "choose_by": choose_by}
        options |= {"dropout": self.attn_dropout.p if self.training else 0.0}
        mask = mask if self.use_mask else None
        mixed = informer_attention(q, k, v, mask, numbers=self.numbers(x.shape[1]), **options)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
