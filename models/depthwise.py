"""Depthwise convolution along the length with one filter a head, as products of matrices: of a padded batch,
and within packed sequences.

For packed rows in half precision, filters of at most 65 taps and heads of at most 64 channels, on a CUDA GPU
the Triton kernels of models/kernels/depthwise.py compute it, gradients included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.common import at_least_fp32, full_precision
from models.packed import pad_packed, unpad_packed
from models.row_products import HALF, WIDEST, runs_kernels

# b batch, h heads, l length, d channels of a head, t taps, n blocks, i rows of a block, w rows that it reads;
# r packed rows

BLOCK = 64


def conv_along(v: Tensor, taps: Tensor) -> Tensor:
    """out_i = sum_t taps_t v_(i + t - centre), zeros beyond both ends: v [b h l d], taps [h t], t odd -> v's.

    Each block of rows is a band matrix of taps times the rows around it, the same one for all blocks of a
    head.
    """
    length, num_taps = v.shape[-2], taps.shape[-1]
    block = max(BLOCK, num_taps - 1)  # so that a block reads itself and a part of the next
    num_blocks = -(-length // block)
    before = num_taps // 2
    v = F.pad(v, (0, 0, before, (num_blocks + 1) * block - length - before))
    v = v.unflatten(-2, (num_blocks + 1, block)).transpose(-3, -2)  # [b h i n+1 d]
    read = torch.cat([v[..., :-1, :], v[..., : num_taps - 1, 1:, :]], dim=-3)  # [b h w n d]
    out = band(taps, block) @ read.flatten(-2)  # [b h i nd]
    out = out.unflatten(-1, (num_blocks, -1)).transpose(-3, -2).flatten(-3, -2)
    return out[..., :length, :]


def band(taps: Tensor, rows: int) -> Tensor:
    """Matrices whose row i holds the taps from column i on: taps [h t] -> [h rows rows+t-1]."""
    width = rows + taps.shape[-1] - 1
    apart = F.pad(taps.unsqueeze(-2).expand(-1, rows, -1), (0, rows)).flatten(1)  # starts width + 1 apart
    return apart[:, : rows * width].unflatten(-1, (rows, width))


def conv_rows(
    v: Tensor, taps: Tensor, cu_seqlens: Tensor, max_len: int, *, base: Tensor | None = None
) -> Tensor:
    """`conv_along` within each packed sequence, plus `base` where that is given.

    v: [r h d], taps: [h t], base: as v, zeros at filler rows -> [r h d] in the dtype of v, zeros at filler
    rows.
    """
    if fits_kernels(v, taps):
        return _band_rows(band(taps.float(), BLOCK), v, base, cu_seqlens, max_len)
    (x,) = at_least_fp32(pad_packed(v, cu_seqlens, max_len)[0])
    with full_precision(v):
        out = conv_along(x.transpose(1, 2), taps.to(x.dtype)).transpose(1, 2)
    out = unpad_packed(out, cu_seqlens, v.shape[0])
    return (out if base is None else base + out).to(v.dtype)


def fits_kernels(v: Tensor, taps: Tensor) -> bool:
    """True if `conv_rows` of these is the kernels' to compute."""
    small = v.shape[-1] <= WIDEST and taps.shape[-1] <= BLOCK + 1
    return small and v.dtype in HALF and runs_kernels(v, taps)


@torch.library.custom_op("lra::band_rows", mutates_args=())
def _band_rows(bands: Tensor, x: Tensor, base: Tensor | None, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """Each block of rows of a sequence as bands [h i w] float32 times the rows around it, plus base."""
    from models.kernels import depthwise

    return depthwise.apply(bands, x, base, cu_seqlens, max_len)


@_band_rows.register_fake
def _(bands, x, base, cu_seqlens, max_len):
    return x.new_empty(x.shape)


@torch.library.custom_op("lra::band_gradients", mutates_args=())
def _band_gradients(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor, rows: int, width: int, max_len: int
) -> Tensor:
    """The gradient of bands [h rows width]. It has none itself: autograd raises at a second derivative."""
    from models.kernels import depthwise

    return depthwise.gradients(grad, x, cu_seqlens, rows, width, max_len)


@_band_gradients.register_fake
def _(grad, x, cu_seqlens, rows, width, max_len):
    return x.new_empty(x.shape[1], rows, width, dtype=torch.float32)


def _keep(ctx, inputs, output):
    bands, x, _, cu_seqlens, ctx.max_len = inputs
    ctx.save_for_backward(bands, x, cu_seqlens)


def _backward(ctx, grad):
    bands, x, cu_seqlens = ctx.saved_tensors
    of_bands, of_x, of_base, *_ = ctx.needs_input_grad
    where = cu_seqlens, ctx.max_len
    bands_grad = _band_gradients(grad, x, cu_seqlens, *bands.shape[1:], ctx.max_len) if of_bands else None
    x_grad = _band_rows(bands.flip(1, 2), grad, None, *where) if of_x else None  # the filter backwards
    return bands_grad, x_grad, grad if of_base else None, None, None


_band_rows.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.band_rows)
def _flops(bands, x, *others, out_shape=None) -> int:
    r, h, d = x
    return 2 * r * h * d * bands[-1]


@register_flop_formula(torch.ops.lra.band_gradients)
def _gradient_flops(grad, x, cu_seqlens, rows, width, max_len, *, out_shape=None) -> int:
    return _flops((width,), x)
