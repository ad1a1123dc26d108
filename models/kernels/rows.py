"""Triton kernels of models/row_products.py: products over the rows of each packed sequence.

Block sizes follow from the shapes, nothing is timed: they can be launched while a CUDA graph is captured.
Sums over rows are made in parts of fixed size that are added in a fixed order, so results are deterministic.
Half-precision operands meet as they are if both have one dtype; all others in float32, on tensor cores in
three parts of TensorFloat-32 (close to float32) or in one where torch's own products take one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# b sequences, t packed rows, h heads, d, e widths

PROGRAMS = 1024  # several for each multiprocessor of a GPU
MIN_PART, MAX_PART = 256, 4096  # rows of a sequence that one program adds up
NONE, ONES, WEIGHTS = 0, 1, 2  # what a column beside the second operand holds


@triton.jit
def sums_kernel(
    a,
    b,
    weight,
    out,
    cu_seqlens,
    parts,
    part_rows,
    a_t,
    a_h,
    a_d,
    b_t,
    b_h,
    b_e,
    w_t,
    w_h,
    out_part,
    num_states,
    D: tl.constexpr,
    E: tl.constexpr,
    COLUMN: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[part, b h d e] = sum over rows of a[t h d] b[t h e], contiguous; with COLUMN [b h d] behind it, the
    sum of a[t h d] times 1 or weight[t h].
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    block_d = tl.program_id(2) // tl.cdiv(E, BLOCK_E)
    block_e = tl.program_id(2) % tl.cdiv(E, BLOCK_E)
    cols_d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    cols_e = block_e * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.load(cu_seqlens + sequence) + part * part_rows
    last = tl.minimum(tl.load(cu_seqlens + sequence + 1), first + part_rows)
    a_cols = a + head * a_h + cols_d[None, :] * a_d
    b_cols = b + head * b_h + cols_e[None, :] * b_e
    total = tl.zeros([BLOCK_D, BLOCK_E], dtype=tl.float32)
    column = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for row in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = rows < last
        x = tl.load(a_cols + rows[:, None] * a_t, mask=inside[:, None] & (cols_d < D)[None, :], other=0.0)
        y = tl.load(b_cols + rows[:, None] * b_t, mask=inside[:, None] & (cols_e < E)[None, :], other=0.0)
        if COLUMN == 1:
            column += x.to(tl.float32)
        if COLUMN == 2:
            w = tl.load(weight + rows * w_t + head * w_h, mask=inside, other=0.0)
            column += x.to(tl.float32) * w.to(tl.float32)[:, None]
        if HALF:
            total = tl.dot(tl.trans(x), y, total)
        else:
            x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
    state = sequence.to(tl.int64) * tl.num_programs(1) + head
    place = out + part.to(tl.int64) * out_part + state * D * E + cols_d[:, None] * E + cols_e[None, :]
    tl.store(place, total, mask=(cols_d < D)[:, None] & (cols_e < E)[None, :])
    if COLUMN:
        place = out + part.to(tl.int64) * out_part + (num_states * E + state) * D + cols_d
        tl.store(place, tl.sum(column, axis=0), mask=(cols_d < D) & (block_e == 0))


@triton.jit
def apply_kernel(
    a,
    state,
    vector,
    weight,
    out,
    norm,
    cu_seqlens,
    num_sequences,
    num_rows,
    num_blocks,
    a_t,
    a_h,
    a_d,
    s_b,
    s_h,
    s_d,
    s_e,
    v_b,
    v_h,
    v_n,
    w_t,
    w_h,
    out_t,
    out_h,
    norm_t,
    D: tl.constexpr,
    E: tl.constexpr,
    NORM: tl.constexpr,
    COLUMN: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t h e] = a[t h d] state[b h d e]; with NORM norm[t h] = a[t h d] vector[b h d], with COLUMN 1 times
    vector[b h e], or weight[t h] times that, is added to out.

    Programs of sequence number `num_sequences` write zeros at filler rows.
    """
    sequence = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(1).to(tl.int64)
    cols_e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    keep_e = (cols_e < E)[None, :]
    out_cols = out + head * out_h + cols_e[None, :]
    first = tl.load(cu_seqlens + sequence) + block * BLOCK_T
    if sequence == num_sequences:
        nothing = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        for row in tl.range(first, num_rows, num_blocks * BLOCK_T):
            rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < num_rows
            tl.store(out_cols + rows[:, None] * out_t, nothing, mask=inside[:, None] & keep_e)
            if NORM:
                tl.store(
                    norm + rows * norm_t + head,
                    tl.zeros([BLOCK_T], dtype=tl.float32),
                    mask=inside & (tl.program_id(2) == 0),
                )
    else:
        last = tl.load(cu_seqlens + sequence + 1)
        if first < last:
            rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = rows < last
            own = sequence.to(tl.int64)
            total = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
            along = tl.zeros([BLOCK_T], dtype=tl.float32)
            a_rows = a + head * a_h + rows[:, None] * a_t
            s_cols = state + own * s_b + head * s_h + cols_e[None, :] * s_e
            for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                cols_d = at + tl.arange(0, BLOCK_D)
                keep_d = cols_d < D
                x = tl.load(a_rows + cols_d[None, :] * a_d, mask=inside[:, None] & keep_d[None, :], other=0.0)
                s = tl.load(s_cols + cols_d[:, None] * s_d, mask=keep_d[:, None] & keep_e, other=0.0)
                if NORM:
                    z = tl.load(vector + own * v_b + head * v_h + cols_d * v_n, mask=keep_d, other=0.0)
                    along += tl.sum(x.to(tl.float32) * z.to(tl.float32)[None, :], axis=1)
                if HALF:
                    total = tl.dot(x, s, total)
                else:
                    x, s = x.to(tl.float32), s.to(tl.float32)
                    total = tl.dot(x, s, total, input_precision=PRECISION)
            if COLUMN:
                z = tl.load(vector + own * v_b + head * v_h + cols_e * v_n, mask=cols_e < E, other=0.0)
                if COLUMN == 1:
                    total += z.to(tl.float32)[None, :]
                else:
                    w = tl.load(weight + rows * w_t + head * w_h, mask=inside, other=0.0)
                    total += w.to(tl.float32)[:, None] * z.to(tl.float32)[None, :]
            tl.store(out_cols + rows[:, None] * out_t, total, mask=inside[:, None] & keep_e)
            if NORM:
                tl.store(norm + rows * norm_t + head, along, mask=inside & (tl.program_id(2) == 0))


def sums(
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    column: int = NONE,
    weight: Tensor | None = None,
) -> Tensor:
    """a [t h d], b [t h e] -> the numbers of [b h d e] float32, in front of those of [b h d] with a column
    ONES or WEIGHTS (weight: [t h]): `split` tells them apart.
    """
    (_, heads, d), e = a.shape, b.shape[-1]
    batch_size = cu_seqlens.shape[0] - 1
    block_d, block_e = block_size(d, 64), block_size(e, 64)
    blocks = triton.cdiv(d, block_d) * triton.cdiv(e, block_e)
    part_rows = part_size(max_len, batch_size * heads * blocks)
    parts = max(triton.cdiv(max_len, part_rows), 1)
    size = batch_size * heads * d * (e + (column != NONE))
    out = a.new_empty(parts, size, dtype=torch.float32)
    weight = a if weight is None else weight
    if size:
        with torch.cuda.device_of(a):
            sums_kernel[(batch_size * parts, heads, blocks)](
                a,
                b,
                weight,
                out,
                cu_seqlens.contiguous(),
                parts,
                part_rows,
                *a.stride(),
                *b.stride(),
                *weight.stride()[:2],
                size,
                batch_size * heads,
                D=d,
                E=e,
                COLUMN=column,
                **_precision(a, b),
                BLOCK_T=32,
                BLOCK_D=block_d,
                BLOCK_E=block_e,
                STAGES=3,
                num_warps=4,
            )
    return out.sum(0) if parts > 1 else out.squeeze(0)


def split(numbers: Tensor, batch_size: int, heads: int, d: int, e: int) -> tuple[Tensor, Tensor]:
    """What `sums` returns with a column -> views [b h d e] and [b h d]."""
    size = batch_size * heads * d * e
    state, column = numbers[:size], numbers[size:]
    return state.view(batch_size, heads, d, e), column.view(batch_size, heads, d)


def apply(
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    dtype: torch.dtype,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """a [t h d], state [b h d e] -> [t h e] of `dtype`, zeros at filler rows.

    `inner` [b h d] gives a second result, each row times its own [t h 1] float32; of `outer` [b h e] each row
    gets its own added, times weight [t h] if that is given.
    """
    (num_rows, heads, d), e = a.shape, state.shape[-1]
    batch_size = cu_seqlens.shape[0] - 1
    block_d, block_e = block_size(d, 32 if a.element_size() > 2 else 64), block_size(e, 64)
    block_t = 128 if block_e <= 32 and d <= block_d else 64  # registers
    num_blocks = max(triton.cdiv(max_len, block_t), 1)
    out = a.new_empty(num_rows, heads, e, dtype=dtype)
    norm = None if inner is None else a.new_empty(num_rows, heads, 1, dtype=torch.float32)
    vector = next((x for x in (inner, outer) if x is not None), state[..., 0])
    factor = a if weight is None else weight
    if out.numel():
        with torch.cuda.device_of(a):
            apply_kernel[((batch_size + 1) * num_blocks, heads, triton.cdiv(e, block_e))](
                a,
                state,
                vector,
                factor,
                out,
                out if norm is None else norm,
                cu_seqlens.contiguous(),
                batch_size,
                num_rows,
                num_blocks,
                *a.stride(),
                *state.stride(),
                *vector.stride(),
                *factor.stride()[:2],
                *out.stride()[:2],
                heads,
                D=d,
                E=e,
                NORM=norm is not None,
                COLUMN=NONE if outer is None else ONES if weight is None else WEIGHTS,
                **_precision(a, state),
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                BLOCK_E=block_e,
                STAGES=2,
                num_warps=4,
            )
    return out, norm


def block_size(width: int, most: int) -> int:
    return min(max(triton.next_power_of_2(width), 16), most)  # a tensor core's product has sides of 16


def part_size(max_len: int, programs: int) -> int:
    """Rows that one program adds up, of a sequence of `max_len` with so many programs for each part."""
    rows = MIN_PART
    while rows < MAX_PART and programs * triton.cdiv(max_len, rows) > PROGRAMS:
        rows *= 2
    return rows


def _precision(a: Tensor, b: Tensor) -> dict[str, bool | str]:
    return {
        "HALF": a.dtype == b.dtype and a.element_size() == 2,
        "PRECISION": tf32_parts(),
    }


def tf32_parts() -> str:
    """In how many parts products in float32 go through tensor cores, as Triton calls it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
