"""Ring attention as an operator: block products in the rounds of a schedule, forward and backward.

An operator of its own, so that what it skips may depend on the mask although compiled steps may not. It takes
from models/schedules.py the products of each round; between rounds all visitors move on at once, n / m from
every unit, where a schedule sends one a step.
"""
# b batch, h heads, l length, d head dim, e head dim (values)
# n blocks, m units, c blocks at home at each, s tokens of a block; a tile is one block of one row:
# tiles [t h s .] are in the order (c m b), u tiles of one product

from math import ceil, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.common import at_least_fp32
from models.schedules import tied_product_is_made

TILE_ROOTS = 8  # tokens of a block over the root of the length, if the number of blocks is ours to choose

At = slice | Tensor  # which tiles: a slice of them, or their numbers [u]


def blocks_for(length: int, num_units: int) -> int:
    """The least multiple of `num_units` for which no block has more than 8 sqrt(length) tokens: the scores of
    one step, num_units tiles a row, then grow as the length does.
    """
    return num_units * max(1, ceil(sqrt(length) / (TILE_ROOTS * num_units)))


class Run(NamedTuple):
    """Products made at once: of the tiles `home` with the visitors `guest`; `own` if these are the same."""

    home: At
    guest: At
    own: bool


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, into which nothing the host reads or writes may go."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def plan(distance: int, live: Tensor, tie_qk: bool, device: torch.device) -> list[Run]:
    """The runs of one round: for each pair (a, b) of blocks at home and visiting, all units and all rows that
    make this product. live: [c m b] bool on the CPU, False where a row has no token in a block.
    """
    each, m, rows = live.shape
    a, b = torch.arange(each).repeat(each), torch.arange(each).repeat_interleave(each)
    todo = live[a] & live.roll(distance, 1)[b]  # [pair m b]
    if tie_qk:
        todo &= tied_product_is_made(torch.arange(m), distance, a[:, None], b[:, None], m)[..., None]
    pair, place = todo.flatten(1).nonzero().unbind(1)
    tiles = torch.stack([a, b])[:, pair] * (m * rows) + place  # [2 products]
    run = pair
    if capturing(device):  # slices only
        run = F.pad(((place.diff() != 1) | (pair.diff() != 0)).cumsum(0), (1, 0))[: len(pair)]
    counts = run.unique_consecutive(return_counts=True)[1]
    ends = counts.cumsum(0)
    first, last = tiles[:, ends - counts], tiles[:, ends - 1]
    sliced = last[0] - first[0] + 1 == counts
    if device.type == "cuda" and not sliced.all():  # from pinned memory the copy waits for nothing
        tiles = tiles.pin_memory().to(device, non_blocking=True)
    own = first[0] == first[1] if distance == 0 else torch.zeros_like(sliced)
    columns = (*first, *last, ends - counts, ends, sliced, own)
    return [
        Run(slice(i, i_last + 1), slice(j, j_last + 1), is_own)
        if is_slice
        else Run(*tiles[:, start:end].unbind(0), is_own)
        for i, j, i_last, j_last, start, end, is_slice, is_own in zip(
            *(x.tolist() for x in columns), strict=True
        )
    ]


def known_mask(mask: Tensor | None) -> Tensor:
    """What the host knows of the mask: a copy [b l], all True while a CUDA graph is captured and nothing can
    be read, and nothing if there is none. The backward pass plans by it, and so waits for no device.
    """
    if mask is None:
        return torch.empty(0, dtype=torch.bool)
    if capturing(mask.device):
        return torch.ones(mask.shape, dtype=torch.bool)
    return mask.to("cpu", copy=True)


class Blocks(NamedTuple):
    """A batch cut into tiles: queries, keys, values, real keys, and which tiles have any."""

    q: Tensor  # [t h s d]
    k: Tensor  # [t h s d], of tied ones the queries
    v: Tensor  # [t h s e]
    real: Tensor | None  # [t 1 1 s]
    live: Tensor  # [c m b] bool, on the CPU
    scale: float

    @staticmethod
    def of(
        q: Tensor, k: Tensor | None, v: Tensor, mask: Tensor | None, known: Tensor, m: int, n: int
    ) -> "Blocks":
        batch, _, length, width = q.shape
        n = n or blocks_for(length, m)
        real = None
        if mask is not None or length % n:
            real = q.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
            real = cut(real[:, None, :, None], m, n).mT
        known = known if known.numel() else torch.ones(batch, length, dtype=torch.bool)
        live = cut(known[:, None, :, None], m, n).flatten(1).any(dim=1).view(n // m, m, batch)
        queries = cut(q, m, n)
        keys = queries if k is None else cut(k, m, n)
        return Blocks(queries, keys, cut(v, m, n), real, live, width**-0.5)

    def rounds(self, tie_qk: bool):
        """(distance, runs) of each round, one after the other."""
        for distance in range(self.live.shape[1]):
            yield distance, plan(distance, self.live, tie_qk, self.q.device)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [u h s s] in at least float32: products of halves are not rounded to halves."""
        query, key = at_least_fp32(query, key)
        return (query @ key.mT).mul_(self.scale)

    def next_unit(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """What stood at each unit, n / m blocks of every row, stands at the next around the ring."""
        shape = self.live.shape
        return [None if x is None else x.unflatten(0, shape).roll(1, dims=1).flatten(0, 2) for x in tensors]


def cut(x: Tensor, m: int, n: int) -> Tensor:
    """[b h l d] -> tiles [t h s d], zeros past the length."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % n)).unflatten(-2, (m, n // m, -1))  # [b h m c s d]
    return x.permute(3, 2, 0, 1, 4, 5).flatten(0, 2).contiguous()


def whole(tiles: Tensor, m: int, like: Tensor) -> Tensor:
    """Tiles [t h s d] -> [b h l d], of the length and dtype of `like`."""
    x = tiles.unflatten(0, (-1, m, like.shape[0])).permute(2, 3, 1, 0, 4, 5).flatten(2, 4)
    x = x[:, :, : like.shape[-2]]
    return x.to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def add_to(x: Tensor, at: At, gain: Tensor) -> None:
    """Adds to some tiles of x. No tile is twice in one run: a copy that is written back will do."""
    if isinstance(at, slice):
        x[at].add_(gain)
    else:
        x.index_copy_(0, at, x[at] + gain)


def hidden(scores: Tensor, real: Tensor | None, keys: At) -> Tensor:
    """Scores [u h s s], the least number there is at padded keys."""
    return scores if real is None else scores.masked_fill(~real[keys], torch.finfo(scores.dtype).min)


class Partial(NamedTuple):
    """A running softmax: sums of exp(score - top), alone and times values, over the keys seen so far."""

    top: Tensor  # [t h s 1]
    total: Tensor  # [t h s 1]
    mixed: Tensor  # [t h s e]

    @staticmethod
    def empty(v: Tensor) -> "Partial":
        mixed = torch.zeros_like(at_least_fp32(v)[0])
        lowest = torch.finfo(mixed.dtype).min / 2  # above the scores of padding, which then weigh nothing
        return Partial(mixed.new_full((*v.shape[:-1], 1), lowest), mixed.new_zeros(*v.shape[:-1], 1), mixed)

    def add(self, at: At, scores: Tensor, v: Tensor, kept: Tensor | None) -> None:
        """Sees scores [u h s s] and values [u h s e]; `kept` is what dropout multiplies weights by."""
        top, total, mixed = (x[at] for x in self)
        highest = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - highest).exp_(), (top - highest).exp_()
        total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        weights = weights if kept is None else weights * kept
        mixed.mul_(shrink).add_(weights.to(v.dtype) @ v)
        if isinstance(at, slice):
            top.copy_(highest)
        else:  # what was changed so far are copies
            for x, new in zip(self, (highest, total, mixed), strict=True):
                x.index_copy_(0, at, new)

    def joined(self, other: "Partial") -> "Partial":
        """What both have seen."""
        top = torch.maximum(self.top, other.top)
        a, b = (self.top - top).exp_(), (other.top - top).exp_()
        return Partial(top, self.total * a + other.total * b, self.mixed * a + other.mixed * b)


def mixed_up(x: Tensor) -> Tensor:
    """A hash of int64 numbers: a neighbour's has nothing in common."""
    x = x + 0x632BE59BD9B4E019
    for odd in (-0x61C8864680B583EB, 0x2545F4914F6CDD1D):
        x = x * odd
        x = x ^ ((x >> 29) & 0x7FFFFFFFF)
    return x


class Dropout(NamedTuple):
    """Dropout that can be had twice: whether a weight is kept is a hash of a seed and of the row, the head
    and the positions of its query and key, however these are cut into blocks.
    """

    seed: Tensor
    rate: float

    def kept(self, scores: Tensor, query: At, key: At, hops: tuple[int, int], shape) -> Tensor:
        """1 / (1 - rate) or 0 for each of scores [u h s s], of tiles that are `hops` units away from home,
        among tiles of `shape` (c, m, b).
        """
        heads, s = scores.shape[1:3]
        inside, head = (torch.arange(size, device=scores.device) for size in (s, heads))
        (row, i), (_, j) = (
            self.place(at, hop, shape, s, scores.device) for at, hop in zip((query, key), hops, strict=True)
        )
        line = ((row[:, None] * heads + head) << 32)[..., None] + (i[:, None] + inside)[:, None]  # [u h s]
        line = mixed_up(mixed_up(self.seed) + line)
        x = mixed_up(line[..., None] + (j[:, None] + inside)[:, None, None])
        kept = (x & 0xFFFFFF) >= round(self.rate * 0x1000000)
        return kept.to(scores.dtype) * (1 / (1 - self.rate) if self.rate < 1 else 0.0)

    @staticmethod
    def place(at: At, hop: int, shape, s: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The row of each tile, and the position of its first token in the sequence: [u] both."""
        c, m, b = shape
        tile = torch.arange(at.start, at.stop, device=device) if isinstance(at, slice) else at
        home = (tile // b % m - hop) % m
        return tile % b, (home * c + tile // (b * m)) * s


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [b h l e], log of the sum of exp(score) [b h l 1], `known_mask`)."""
    known = known_mask(mask)
    blocks = Blocks.of(q, k, v, mask, known, num_units, num_blocks)
    home, away = Partial.empty(blocks.v), Partial.empty(blocks.v) if k is None else None
    drop, shape = None if seed is None else Dropout(seed, dropout), blocks.live.shape
    visiting = [blocks.k, blocks.v, blocks.real]
    for distance, runs in blocks.rounds(k is None):
        if distance:
            visiting = blocks.next_unit(visiting)
            away = None if away is None else Partial(*blocks.next_unit(list(away)))
        keys, values, real = visiting
        for run in runs:
            scores = blocks.scores(blocks.q[run.home], keys[run.guest])
            kept = drop and drop.kept(scores, run.home, run.guest, (0, distance), shape)
            home.add(run.home, hidden(scores, real, run.guest), values[run.guest], kept)
            if away is not None and not run.own:
                gains = away if distance else home
                kept = drop and drop.kept(scores, run.guest, run.home, (distance, 0), shape)
                gains.add(run.guest, hidden(scores.mT, blocks.real, run.home), blocks.v[run.home], kept)
    if away is not None:
        home = home.joined(Partial(*blocks.next_unit(list(away))))
    total = home.total.clamp_min(0.5)  # it is 0, or at least 1 where there is a real key
    wide = at_least_fp32(v)[0]
    return whole(home.mixed / total, num_units, v), whole(home.top + total.log(), num_units, wide), known


@torch.library.custom_op("lra_models::ring_backward", mutates_args=())
def ring_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    known: Tensor,
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
    blocks = Blocks.of(q, k, v, mask, known, num_units, num_blocks)
    shape = blocks.live.shape
    n = shape[0] * num_units
    wide_grad, wide_out = at_least_fp32(grad, out)
    delta = cut((wide_grad * wide_out).sum(dim=-1, keepdim=True), num_units, n)
    grad, lse = cut(grad.to(v.dtype), num_units, n), cut(lse, num_units, n)
    dq, dv = (torch.zeros_like(at_least_fp32(x)[0]) for x in (blocks.q, blocks.v))
    drop = None if seed is None else Dropout(seed, dropout)

    def by_scores(scores, query, key, hops, real, rows, values, dv):
        """The gradient by scores of queries at `query` and keys at `key`; adds that by values to dv."""
        grad, lse, delta = (x[query] for x in rows)
        weights = (hidden(scores, real, key) - lse).exp_()
        wide_grad, wide_values = at_least_fp32(grad, values[key])
        by_weights = wide_grad @ wide_values.mT  # rounded to halves, its difference to delta would be noise
        kept = drop and drop.kept(scores, query, key, hops, shape)
        used = weights if kept is None else weights * kept
        add_to(dv, key, used.to(grad.dtype).mT @ grad)
        return weights * ((by_weights if kept is None else by_weights * kept) - delta)

    at_home = [grad, lse, delta]
    visiting = [blocks.k, blocks.v, blocks.real, torch.zeros_like(dq), torch.zeros_like(dv)]
    visiting += at_home if k is None else []
    for distance, runs in blocks.rounds(k is None):
        visiting = blocks.next_unit(visiting) if distance else visiting
        keys, values, real, dk_away, dv_away, *rows_away = visiting
        for run in runs:
            scores = blocks.scores(blocks.q[run.home], keys[run.guest])
            ds = by_scores(scores, run.home, run.guest, (0, distance), real, at_home, values, dv_away)
            if k is None and not run.own:
                mirrored = (scores.mT, run.guest, run.home, (distance, 0), blocks.real)
                ds = ds + by_scores(*mirrored, rows_away, blocks.v, dv).mT
            ds = ds.to(q.dtype)
            add_to(dq, run.home, ds @ keys[run.guest])
            add_to(dk_away, run.guest, ds.mT @ blocks.q[run.home])
    dk_away, dv_away = blocks.next_unit(visiting[3:5])
    dv = whole(dv + dv_away, num_units, v)
    if k is None:
        return whole((dq + dk_away) * blocks.scale, num_units, q), q.new_empty(0), dv
    return whole(dq * blocks.scale, num_units, q), whole(dk_away * blocks.scale, num_units, k), dv


@ring_forward.register_fake
def _(q, k, v, mask, seed, num_units, num_blocks, dropout):
    known = torch.empty(0 if mask is None else mask.shape, dtype=torch.bool, device="cpu")
    lse = torch.empty_like(at_least_fp32(v[..., :1])[0], memory_format=torch.contiguous_format)
    return torch.empty_like(v, memory_format=torch.contiguous_format), lse, known


@ring_backward.register_fake
def _(grad, out, lse, known, q, k, v, mask, seed, num_units, num_blocks, dropout):
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, q if k is None else k, v)
    )
    return dq, q.new_empty(0) if k is None else dk, dv


def _keep_for_backward(ctx, inputs, output):
    *tensors, ctx.num_units, ctx.num_blocks, ctx.dropout = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad, *_):
    saved = ctx.saved_tensors
    dq, dk, dv = ring_backward(grad, *saved, ctx.num_units, ctx.num_blocks, ctx.dropout)
    return dq, None if saved[4] is None else dk, dv, None, None, None, None, None


ring_forward.register_autograd(_backward, setup_context=_keep_for_backward)


@register_flop_formula(torch.ops.lra_models.ring_forward)
def _flops(q, k, v, *others, out_shape=None) -> int:
    return _scores_flops(q, k) + _values_flops(q, v)


@register_flop_formula(torch.ops.lra_models.ring_backward)
def _gradient_flops(grad, out, lse, known, q, k, v, *others, out_shape=None) -> int:
    return 3 * _scores_flops(q, k) + 2 * _values_flops(q, v)  # scores anew


def _scores_flops(q, k) -> int:
    """Operations of the products of all queries [b h l d] with all keys, of which tied ones need half; blocks
    of padding that are skipped count.
    """
    batch_size, heads, length, width = q
    return (1 if k is None else 2) * batch_size * heads * length**2 * width


def _values_flops(q, v) -> int:
    batch_size, heads, length, _ = q
    return 2 * batch_size * heads * length**2 * v[-1]
