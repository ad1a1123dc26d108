"""Triton kernels of models/random_features.py; gradients: random_features_gradients.py.

Features are made from rows where they are used and never written. Sums over keys are those of softmax
attention with the vectors as queries, and outputs those with the vectors as keys: maxima run along and what
is summed is scaled as they rise. Exponents are of base 2, so `vectors` and `energy` hold its logarithm. In
products, which are of the dtype of the rows, powers are at most 2^UP and states at most LARGEST.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.linear import zero_rows
from models.kernels.rows import block_size, part_size, tf32_parts
from models.random_features import MOST_FEATURES, TILE
from models.row_products import WIDEST

# b sequences, t packed rows, h heads, d, e widths, r vectors, n tiles of vectors. Values are taken less their
# mean, which the output gets back, so that what they have in common costs no accuracy: states [r*(e+1)] are
# sums of powers times v - mean [r e] and 1 [r], center [e+1] the mean and the number of rows; a summary
# [n e+3] has of each tile the sum of its states with eps over r, their largest number and one more, for keys
# the stabiliser

UP = tl.constexpr(14)  # half precision holds 2^15 and, with eleven bits, 2^-14
LARGEST = tl.constexpr(4096.0)  # of a scaled state, so that its products with rows stay in half precision
NOTHING = tl.constexpr(-1e30)  # below every product
TILES_LOADED = tl.constexpr(MOST_FEATURES // TILE)


@triton.jit
def split_kernel(features, out, size, scale, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out[1 or 2 r d]: features[r d] times scale, rounded, and what rounding has left."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(features + place, mask=place < size, other=0.0) * scale
    high = w.to(out.dtype.element_ty)
    tl.store(out + place, high, mask=place < size)
    if SPLIT:
        tl.store(out + size + place, w - high.to(tl.float32), mask=place < size)


@triton.jit
def vectors_at(vectors, r, d, R: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr):
    """[r d]: as they are and, if they are in two parts, what rounding has left."""
    place, keep = vectors + r[:, None] * D + d[None, :], (r < R)[:, None] & (d < D)[None, :]
    high = tl.load(place, mask=keep, other=0.0)
    low = high
    if SPLIT:
        low = tl.load(place + R * D, mask=keep, other=0.0)
    return high, low


@triton.jit
def products(x, high, low, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Those of rows x [t d] with vectors [r d]: [t r] float32."""
    p = tl.dot(x, tl.trans(high), input_precision=PRECISION)
    if SPLIT:
        p = tl.dot(x, tl.trans(low), p)
    return p


@triton.jit
def energies(x, energy):
    x = x.to(tl.float32)
    return energy * tl.sum(x * x, axis=1)


@triton.jit
def totals(summary, e, E: tl.constexpr, TILES: tl.constexpr):
    """Of all tiles the sum of states, [e] and the last column's, and what scales states to LARGEST."""
    tile = tl.arange(0, TILES_LOADED)
    there, place = tile < TILES, summary + tile * (E + 3)
    keep = there[:, None] & (e < E)[None, :]
    sums = tl.sum(tl.load(place[:, None] + e[None, :], mask=keep, other=0.0), axis=0)
    last = tl.sum(tl.load(place + E, mask=there, other=0.0), axis=0)
    largest = tl.max(tl.load(place + E + 1, mask=there, other=0.0), axis=0)
    return sums, last, LARGEST / tl.maximum(largest, 1e-30)


@triton.jit
def store_states(states, s, z, r, e, E: tl.constexpr, R: tl.constexpr):
    """s [r e] and, behind all of these, z [r]."""
    tl.store(states + r[:, None] * E + e[None, :], s, mask=(r < R)[:, None] & (e < E)[None, :])
    tl.store(states + R * E + r, z, mask=r < R)


@triton.jit
def states_at(states, r, e, E: tl.constexpr, R: tl.constexpr):
    keep = (r < R)[:, None] & (e < E)[None, :]
    s = tl.load(states + r[:, None] * E + e[None, :], mask=keep, other=0.0)
    return s, tl.load(states + R * E + r, mask=r < R, other=0.0)


@triton.jit
def summarise(summary, s, z, more, tile, r, e, E: tl.constexpr, R: tl.constexpr):
    """The line of one tile of states with eps, s [r e] and z [r]."""
    s, z = tl.where((r < R)[:, None], s, 0.0), tl.where(r < R, z, 0.0)
    largest = tl.maximum(tl.max(tl.max(tl.abs(s), axis=1), axis=0), tl.max(tl.abs(z), axis=0))
    summary += tile * (E + 3)
    tl.store(summary + e, tl.sum(s, axis=0), mask=e < E)
    tl.store(summary + E, tl.sum(z, axis=0))
    tl.store(summary + E + 1, largest)
    tl.store(summary + E + 2, more)


@triton.jit
def mixed_kernel(
    q,
    vectors,
    states,
    summary,
    center,
    out,
    part,
    stats,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_blocks,
    energy,
    eps,
    floor,
    q_t,
    q_h,
    q_d,
    out_t,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t h e] = f(q) times states with eps over the same with their last column; zeros at filler rows.
    part[t h e]: that less the mean; stats[3 t h]: the largest product, its vector's index, the normaliser.
    """
    sequence = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.load(cu_seqlens + sequence) + block * BLOCK_T
    if sequence == num_sequences:
        zero_rows(out + head * E, first, num_rows, num_blocks * BLOCK_T, out_t, E, BLOCK_E, BLOCK_T)
    else:
        last = tl.load(cu_seqlens + sequence + 1)
        if first < last:
            d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            keep_d, keep_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
            x = tl.load(q + rows[:, None] * q_t + head * q_h + d[None, :] * q_d, mask=keep_d, other=0.0)
            state = sequence.to(tl.int64) * num_heads + head
            sums, last_sum, scale = totals(summary + state * TILES * (E + 3), e, E, TILES)
            center += state * (E + 1)
            mean, count = tl.load(center + e, mask=e < E, other=0.0), tl.load(center + E)
            states += state * R * (E + 1)
            top = tl.full([BLOCK_T], NOTHING, dtype=tl.float32)
            index = tl.zeros([BLOCK_T], dtype=tl.int32)
            total = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
            norm = tl.zeros([BLOCK_T], dtype=tl.float32)
            for at in tl.range(0, R, BLOCK_R, num_stages=STAGES):
                r = at + tl.arange(0, BLOCK_R)
                high, low = vectors_at(vectors, r, d, R, D, SPLIT)
                s, z = states_at(states, r, e, E, R)
                p = products(x, high, low, SPLIT, PRECISION)
                if R % BLOCK_R:
                    p = tl.where((r < R)[None, :], p, float("-inf"))
                larger = tl.maximum(top, tl.max(p, axis=1))
                found = tl.max(tl.where(p == larger[:, None], r[None, :], -1), axis=1)
                index = tl.where(found >= 0, found, index)
                power = tl.exp2(p - (larger - UP)[:, None])
                rise = tl.exp2(top - larger)
                norm = norm * rise + tl.sum(power * (z + eps * count)[None, :], axis=1)
                s = (s * scale).to(x.dtype)
                total = tl.dot(power.to(x.dtype), s, total * rise[:, None], input_precision=PRECISION)
                top = larger
            down = tl.exp2(-energies(x, energy) - UP)
            norm = tl.maximum(norm * down + eps * last_sum, floor)
            y = (total * (down / scale)[:, None] + eps * sums[None, :]) / norm[:, None]
            place = rows[:, None] * out_t + head * E + e[None, :]
            tl.store(part + place, y, mask=keep_e)
            tl.store(out + place, y + mean[None, :], mask=keep_e)
            place, step = stats + rows * num_heads + head, num_rows * num_heads
            tl.store(place, top, mask=inside)
            tl.store(place + step, index.to(tl.float32), mask=inside)
            tl.store(place + 2 * step, norm, mask=inside)


def split(features: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """features [r d] float32 times scale: [1 r d], or [2 r d] half precision, whose sum they are."""
    size, num_parts = features.numel(), 1 if dtype == torch.float32 else 2
    out = features.new_empty(num_parts, *features.shape, dtype=dtype)
    with torch.cuda.device_of(features):
        split_kernel[(triton.cdiv(size, 512),)](
            features.contiguous(), out, size, scale, SPLIT=num_parts == 2, BLOCK=512
        )
    return out


def mixed(
    q: Tensor,
    vectors: Tensor,
    states: Tensor,
    summary: Tensor,
    center: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    energy: float,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [t h d], states [b h r*(e+1)] -> [t h e] in the dtype of q, that less the mean, and stats [3 t h]."""
    (num_rows, heads, _), e = q.shape, center.shape[-1] - 1
    out = q.new_empty(num_rows, heads, e)
    part = torch.empty_like(out)
    stats = q.new_empty(3, num_rows, heads, dtype=torch.float32)
    options = row_options(vectors, e)
    num_blocks = max(triton.cdiv(max_len, options["BLOCK_T"]), 1)
    with torch.cuda.device_of(q):
        mixed_kernel[(cu_seqlens.shape[0] * num_blocks, heads)](
            q,
            vectors,
            states,
            summary,
            center,
            out,
            part,
            stats,
            cu_seqlens.contiguous(),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_blocks,
            energy,
            eps,
            floor,
            *q.stride(),
            out.stride(0),
            TILES=summary.shape[2],
            **options,
            STAGES=2,
        )
    return out, part, stats


def parts_of(x: Tensor, batch_size: int, heads: int, r: int, e: int, max_len: int) -> tuple[Tensor, int, int]:
    """Memory for parts of sums [b h r+1 e+1], their number, and the rows of each."""
    part_rows = part_size(max_len, batch_size * heads * triton.cdiv(r, 2 * TILE))
    parts = max(triton.cdiv(max_len, part_rows), 1)
    return x.new_empty(parts, batch_size, heads, r + 1, e + 1, dtype=torch.float32), parts, part_rows


def options_of(vectors: Tensor, e: int) -> dict:
    num_parts, r, d = vectors.shape
    block_d, block_e = block_size(d, WIDEST), block_size(e, WIDEST)
    half, narrow = num_parts == 2, max(block_d, block_e) <= 32
    return {
        "SPLIT": half,
        "PRECISION": tf32_parts(),
        "D": d,
        "E": e,
        "R": r,
        "BLOCK_T": 64,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "BLOCK_R": TILE,
        "num_warps": 4 if half or narrow else 8,  # registers
    }


def row_options(vectors: Tensor, e: int) -> dict:
    """Options of kernels that go through all vectors for each block of rows."""
    options = options_of(vectors, e)
    if options["SPLIT"] and max(options["BLOCK_D"], options["BLOCK_E"]) <= 32:
        # longer blocks read vectors and states less often; with so many registers two fit a multiprocessor
        options |= {"BLOCK_T": 128, "num_warps": 8, "maxnreg": 128}
    return options
