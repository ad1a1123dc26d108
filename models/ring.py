"""Ring attention: softmax attention computed by the schedule of a ring of units, block by block.

Paper    Yu and Fujita 2020, arXiv 2012.01114 (schedules); Milakov and Gimelshein 2018, arXiv 1805.02867 (the
         running softmax that joins blocks)
Computes out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j, as dense softmax attention does, by block products
         that models/schedules.py orders: keys and values go round num_units units, each of which joins to its
         queries what visits it; with tie_qk, k = q, and each product of two blocks serves both
Cost     time O(L^2 D), with tie_qk nearly 3/4 of it; memory O(L D) per head, and for the scores of one step
         num_units (L / num_blocks)^2, which is O(L) for num_blocks=0
Exact    yes
Padding  padded keys get weight zero; a row without real keys gives zeros. Blocks past the length are not in
         the schedule. Nor are blocks that no row of a batch fills, except while a CUDA graph is captured and
         the mask cannot be read: there they weigh nothing
Differs  the units are a batch dimension of one device; rows of a batch are scheduled together, so that a
         padded block is skipped where all rows pad it
"""
# b batch, h heads, l length, t packed tokens, d head dim, e head dim (values)
# m units, c blocks at home at each, s tokens of a block, u units of one run; [c m b h s .] is cut into blocks

from dataclasses import replace
from functools import lru_cache
from math import ceil, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.packed import pad_packed, unpad_packed
from models.schedules import check_sizes, pairs_of

TILE_ROOTS = 8  # tokens of a block over the root of the length, if the number of blocks is ours to choose


def blocks_for(length: int, num_units: int) -> int:
    """The least multiple of `num_units` for which no block has more than 8 sqrt(length) tokens: the scores of
    one step, num_units tiles, then grow as the length does.
    """
    return num_units * max(1, ceil(sqrt(length) / (TILE_ROOTS * num_units)))


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    num_units: int = 4,
    num_blocks: int = 0,
    tie_qk: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real token -> [b h l e].

    `num_blocks` 0 is the number of `blocks_for`. With `tie_qk` the queries are the keys: `k` is not read.
    """
    check_sizes(num_blocks or num_units, num_units)
    seed = torch.randint(2**31, (1,), device=q.device) if dropout else None
    with full_precision(v):
        out, _ = ring_forward(q, None if tie_qk else k, v, mask, seed, num_units, num_blocks, dropout)
    return out


class Run(NamedTuple):
    """Products of units `first` to `last` - 1 at once, of their block `a` with their visitor `b`."""

    a: int
    b: int
    first: int
    last: int

    @property
    def home(self) -> tuple[int, slice]:
        return self.a, slice(self.first, self.last)

    @property
    def guest(self) -> tuple[int, slice]:
        return self.b, slice(self.first, self.last)


@lru_cache(maxsize=256)
def plan(
    num_units: int, num_blocks: int, tie_qk: bool, live: tuple[bool, ...]
) -> tuple[tuple[Run, ...], ...]:
    """The runs of each round, of blocks that are `live`: units that do the same in a step do it as one."""
    m, each, kind = num_units, num_blocks // num_units, "tied" if tie_qk else "full"
    rounds = []
    for distance in range(m):
        todo = [pairs_of(u, distance, num_blocks, m, kind) for u in range(m)]
        runs: list[Run] = []
        for step in range(max(map(len, todo))):
            joinable = None
            for u in (u for u in range(m) if step < len(todo[u])):
                a, b = todo[u][step]
                if not (live[u * each + a] and live[(u - distance) % m * each + b]):
                    continue
                if joinable == (a, b, u):
                    runs[-1] = runs[-1]._replace(last=u + 1)
                else:
                    runs.append(Run(a, b, u, u + 1))
                joinable = (a, b, u + 1)
        rounds.append(tuple(runs))
    return tuple(rounds)


class Blocks(NamedTuple):
    """A batch cut into blocks: queries and keys times their share of the scale, values, and real keys."""

    q: Tensor  # [c m b h s d]
    k: Tensor  # [c m b h s d], of tied ones the queries
    v: Tensor  # [c m b h s e]
    real: Tensor | None  # [c m b 1 1 s]
    scale: tuple[float, float]  # of queries and of keys
    rounds: tuple[tuple[Run, ...], ...]

    @staticmethod
    def of(q: Tensor, k: Tensor | None, v: Tensor, mask: Tensor | None, m: int, n: int) -> "Blocks":
        length = q.shape[-2]
        n = n or blocks_for(length, m)
        real, live = None, [block * ceil(length / n) < length for block in range(n)]
        if mask is not None or length % n:
            real = q.new_ones(1, length, dtype=torch.bool) if mask is None else mask
            real = cut(real[:, None, :, None], m, n).mT
        if mask is not None and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            live = real.any(dim=(2, 3, 4, 5)).T.flatten().tolist()
        scale = (q.shape[-1] ** -0.5, 1.0) if k is not None else (q.shape[-1] ** -0.25,) * 2
        queries = cut(q * scale[0], m, n)
        keys = queries if k is None else cut(k, m, n)
        return Blocks(queries, keys, cut(v, m, n), real, scale, plan(m, n, k is None, tuple(live)))


def cut(x: Tensor, m: int, n: int) -> Tensor:
    """[b h l d] -> [c m b h s d], zeros past the length."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % n)).unflatten(-2, (m, n // m, -1))  # [b h m c s d]
    return x.permute(3, 2, 0, 1, 4, 5).contiguous()


def whole(blocks: Tensor, like: Tensor) -> Tensor:
    """[c m b h s d] -> [b h l d], of the length and dtype of `like`."""
    x = blocks.permute(2, 3, 1, 0, 4, 5).flatten(2, 4)[:, :, : like.shape[-2]]
    return x.to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def next_unit(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """One transfer by every unit: what stood at it stands at the next around the ring."""
    return [None if x is None else x.roll(1, dims=1) for x in tensors]


def hidden(scores: Tensor, real: Tensor | None, keys: tuple[int, slice]) -> Tensor:
    """Scores [u b h s s] in at least float32, the least number there is at padded keys."""
    (scores,) = at_least_fp32(scores)
    return scores if real is None else scores.masked_fill(~real[keys], torch.finfo(scores.dtype).min)


class Partial(NamedTuple):
    """A running softmax: sums of exp(score - top), alone and times values, over the keys seen so far."""

    top: Tensor  # [c m b h s 1]
    total: Tensor  # [c m b h s 1]
    mixed: Tensor  # [c m b h s e]

    @staticmethod
    def empty(v: Tensor) -> "Partial":
        mixed = torch.zeros_like(at_least_fp32(v)[0])
        lowest = torch.finfo(mixed.dtype).min / 2  # above the scores of padding, which then weigh nothing
        return Partial(mixed.new_full((*v.shape[:-1], 1), lowest), mixed.new_zeros(*v.shape[:-1], 1), mixed)

    def add(self, at: tuple[int, slice], scores: Tensor, v: Tensor, kept: Tensor | None) -> None:
        """Sees scores [u b h s s] and values [u b h s e]; `kept` is what dropout multiplies weights by."""
        top, total, mixed = (x[at] for x in self)
        highest = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - highest).exp_(), (top - highest).exp_()
        total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        weights = weights if kept is None else weights * kept
        mixed.mul_(shrink).add_(weights.to(v.dtype) @ v)
        top.copy_(highest)

    def joined(self, other: "Partial") -> "Partial":
        """What both have seen."""
        top = torch.maximum(self.top, other.top)
        a, b = (self.top - top).exp_(), (other.top - top).exp_()
        return Partial(top, self.total * a + other.total * b, self.mixed * a + other.mixed * b)


class Dropout(NamedTuple):
    """Dropout that can be had twice: whether a weight is kept is a hash of a seed and of its place."""

    seed: Tensor
    rate: float

    def kept(self, scores: Tensor, query: tuple[int, slice], key: tuple[int, slice], shape, hops) -> Tensor:
        """1 / (1 - rate) or 0 for each of scores [u b h s s], of blocks at `query` and `key` that are `hops`
        units away from home, among blocks of `shape` [c m b h s d].
        """
        c, m, b, h, s, _ = shape
        device, inside = scores.device, torch.arange(s, device=scores.device)
        i, j = (
            (((torch.arange(at[1].start, at[1].stop, device=device) - hop) % m) * c + at[0])[:, None] * s
            + inside
            for at, hop in zip((query, key), hops, strict=True)
        )  # [u s] positions in the sequence
        x = torch.arange(b * h, device=device).view(b, h, 1, 1) * (c * m * s) + i[:, None, None, :, None]
        x = x * (c * m * s) + j[:, None, None, None, :] + self.seed
        for odd in (-0x61C8864680B583EB, 0x2545F4914F6CDD1D):
            x = x * odd
            x = x ^ ((x >> 29) & 0x7FFFFFFFF)
        return ((x & 0xFFFFFF) >= round(self.rate * 0x1000000)).to(scores.dtype) / (1 - self.rate)


@torch.library.custom_op("lra_models::ring_forward", mutates_args=())
def ring_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    num_units: int,
    num_blocks: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(out [b h l e], log of the sum of exp(score) [b h l 1]). An operator of its own, so that what it skips
    may depend on the mask although compiled steps may not.
    """
    blocks = Blocks.of(q, k, v, mask, num_units, num_blocks)
    home, away = Partial.empty(blocks.v), Partial.empty(blocks.v) if k is None else None
    drop = None if seed is None else Dropout(seed, dropout)
    visiting = [blocks.k, blocks.v, blocks.real]
    for distance, runs in enumerate(blocks.rounds):
        if distance:
            visiting = next_unit(visiting)
            away = None if away is None else Partial(*next_unit(list(away)))
        keys, values, real = visiting
        for run in runs:
            scores = blocks.q[run.home] @ keys[run.guest].mT
            kept = drop and drop.kept(scores, run.home, run.guest, blocks.q.shape, (0, distance))
            home.add(run.home, hidden(scores, real, run.guest), values[run.guest], kept)
            if away is not None and (distance or run.a != run.b):
                gains = away if distance else home
                kept = drop and drop.kept(scores, run.guest, run.home, blocks.q.shape, (distance, 0))
                gains.add(run.guest, hidden(scores.mT, blocks.real, run.home), blocks.v[run.home], kept)
    if away is not None:
        home = home.joined(Partial(*next_unit(list(away))))
    total = home.total.clamp_min(0.5)  # it is 0, or at least 1 where there is a real key
    wide = at_least_fp32(v)[0]
    return whole(home.mixed / total, v), whole(home.top + total.log(), wide)


@torch.library.custom_op("lra_models::ring_backward", mutates_args=())
def ring_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    num_units: int,
    num_blocks: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k (empty if tied), v. Scores are computed anew; gradients travel with their blocks."""
    blocks = Blocks.of(q, k, v, mask, num_units, num_blocks)
    n = blocks.q.shape[0] * num_units
    (wide_grad, wide_out) = at_least_fp32(grad, out)
    delta = cut((wide_grad * wide_out).sum(dim=-1, keepdim=True), num_units, n)
    grad, lse = cut(grad.to(v.dtype), num_units, n), cut(lse, num_units, n)
    dq, dv = (torch.zeros_like(at_least_fp32(x)[0]) for x in (blocks.q, blocks.v))
    drop = None if seed is None else Dropout(seed, dropout)

    def by_scores(scores, query, key, hops, real, rows, values, dv):
        """The gradient by scores of queries at `query` and keys at `key`; adds that by values to dv."""
        grad, lse, delta = (x[query] for x in rows)
        weights = (hidden(scores, real, key) - lse).exp_()
        by_weights = at_least_fp32(grad @ values[key].mT)[0]
        kept = drop and drop.kept(scores, query, key, blocks.q.shape, hops)
        used = weights if kept is None else weights * kept
        dv[key].add_(used.to(grad.dtype).mT @ grad)
        return weights * ((by_weights if kept is None else by_weights * kept) - delta)

    at_home = [grad, lse, delta]
    visiting = [blocks.k, blocks.v, blocks.real, torch.zeros_like(dq), torch.zeros_like(dv)]
    visiting += at_home if k is None else []
    for distance, runs in enumerate(blocks.rounds):
        visiting = next_unit(visiting) if distance else visiting
        keys, values, real, dk_away, dv_away, *rows_away = visiting
        for run in runs:
            scores = blocks.q[run.home] @ keys[run.guest].mT
            ds = by_scores(scores, run.home, run.guest, (0, distance), real, at_home, values, dv_away)
            if k is None and (distance or run.a != run.b):
                mirrored = (scores.mT, run.guest, run.home, (distance, 0), blocks.real)
                ds = ds + by_scores(*mirrored, rows_away, blocks.v, dv).mT
            ds = ds.to(q.dtype)
            dq[run.home].add_(ds @ keys[run.guest])
            dk_away[run.guest].add_(ds.mT @ blocks.q[run.home])
    dk_away, dv_away = next_unit(visiting[3:5])
    dv = whole(dv + dv_away, v)
    if k is None:
        return whole((dq + dk_away) * blocks.scale[0], q), q.new_empty(0), dv
    return whole(dq * blocks.scale[0], q), whole(dk_away, k), dv


@ring_forward.register_fake
def _(q, k, v, mask, seed, num_units, num_blocks, dropout):
    return torch.empty_like(v, memory_format=torch.contiguous_format), at_least_fp32(v[..., :1])[
        0
    ].contiguous()


@ring_backward.register_fake
def _(grad, out, lse, q, k, v, mask, seed, num_units, num_blocks, dropout):
    empty = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, q if k is None else k, v)
    ]
    return empty[0], q.new_empty(0) if k is None else empty[1], empty[2]


def _keep_for_backward(ctx, inputs, output):
    *tensors, ctx.num_units, ctx.num_blocks, ctx.dropout = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad, _):
    saved = ctx.saved_tensors
    dq, dk, dv = ring_backward(grad, *saved, ctx.num_units, ctx.num_blocks, ctx.dropout)
    return dq, None if saved[3] is None else dk, dv, None, None, None, None, None


ring_forward.register_autograd(_backward, setup_context=_keep_for_backward)


class TiedProjection(nn.Linear):
    """Queries, keys and values of which queries and keys are one: [... d_model] -> [... 3 h*d]."""

    def forward(self, x: Tensor) -> Tensor:
        shared, values = super().forward(x).chunk(2, dim=-1)
        return torch.cat([shared, shared, values], dim=-1)


@register("ring")
class Ring(Mixer):
    """Projections around `ring_attention`; `num_blocks` 0 has it choose, so that memory is linear."""

    traits = Traits(packed=True)

    def __init__(
        self,
        place: Place,
        *,
        num_units: int = 4,
        num_blocks: int = 0,
        tie_qk: bool = False,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        check_sizes(num_blocks or num_units, num_units)
        self.num_units, self.num_blocks, self.tie_qk = num_units, num_blocks, tie_qk
        self.attn_dropout = nn.Dropout(attn_dropout)
        if tie_qk:
            self.qkv = TiedProjection(place.d_model, 2 * place.num_heads * place.head_dim, bias=place.bias)
        if num_blocks:
            because = {
                "quadratic_memory": "the scores of one step have (length / num_blocks)^2 entries a unit"
            }
            self.traits = replace(self.traits, quadratic_memory=True, because=because)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            mask,
            num_units=self.num_units,
            num_blocks=self.num_blocks,
            tie_qk=self.tie_qk,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        padded = [pad_packed(x, cu_seqlens, max_len) for x in (q, k, v)]
        mixed = self.attend(*(x.transpose(1, 2) for x, _ in padded), padded[0][1])
        return unpad_packed(mixed.transpose(1, 2), cu_seqlens, q.shape[0])

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
