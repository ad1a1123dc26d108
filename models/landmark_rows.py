"""Sums over the landmarks of packed sequences: which rows each has, and the sums of two tensors over them.

For float32 and half precision on a CUDA GPU the Triton kernel of models/kernels/landmark_rows.py adds up;
elsewhere torch, over rows laid out one landmark beside the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.common import at_least_fp32
from models.packed import Chunks, Segments
from models.row_products import runs_kernels

# b sequences, m landmarks of each, n = b m, t packed rows, h heads, d width


@dataclass(frozen=True)
class LandmarkRows:
    """Equal parts of `size` rows, num_landmarks to a sequence of the padded length; later ones may be empty.

    bounds: [n+1] int32, landmark i has the rows from bounds[i] to bounds[i + 1]; owner: [t] int64 each row's
    landmark, n for filler rows.
    """

    bounds: Tensor
    owner: Tensor
    size: int
    num_landmarks: int

    @staticmethod
    def of(cu_seqlens: Tensor, num_rows: int, max_len: int, num_landmarks: int) -> "LandmarkRows":
        """Of sequences padded to `max_len`, which num_landmarks parts divide, the last ones cut short."""
        size = -(-max_len // num_landmarks)
        start = size * torch.arange(num_landmarks, dtype=torch.int32, device=cu_seqlens.device)
        cu_seqlens = cu_seqlens.to(torch.int32)
        first = cu_seqlens[:-1, None] + torch.minimum(start, cu_seqlens.diff()[:, None])  # [b m]
        bounds = torch.cat([first.flatten(), cu_seqlens[-1:]])
        where = Segments.of(cu_seqlens, num_rows)
        owner = torch.where(where.real, where.segment * num_landmarks + where.position // size, first.numel())
        return LandmarkRows(bounds, owner, size, num_landmarks)

    def counts(self) -> Tensor:
        """[b m] rows of each landmark."""
        return self.bounds.diff().unflatten(0, (-1, self.num_landmarks))

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Over the rows of each landmark: x, y [t h d] -> twice [b m h d], at least float32."""
        if runs_kernels(x, y):
            found = _landmark_sums(x, y, self.bounds, self.owner, self.size)
        else:
            chunks = Chunks.of(self.bounds, x.shape[0], size=self.size, max_len=self.size)
            found = (chunks.lay_out(part).sum(dim=1) for part in at_least_fp32(x, y))
        x, y = (part.unflatten(0, (-1, self.num_landmarks)) for part in found)
        return x, y


@torch.library.custom_op("lra::landmark_sums", mutates_args=())
def _landmark_sums(x: Tensor, y: Tensor, bounds: Tensor, owner: Tensor, size: int) -> tuple[Tensor, Tensor]:
    from models.kernels import landmark_rows

    return landmark_rows.sums(x, y, bounds, size)


@_landmark_sums.register_fake
def _(x, y, bounds, owner, size):
    shape = bounds.shape[0] - 1, *x.shape[1:]
    return tuple(x.new_empty(shape, dtype=torch.float32) for _ in range(2))


def _keep(ctx, inputs, output):
    x, y, _, owner, _ = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(owner)


def _backward(ctx, *grads):
    (owner,) = ctx.saved_tensors
    rows = owner.clamp(max=grads[0].shape[0] - 1)
    real = (owner < grads[0].shape[0])[:, None, None]
    spread = (torch.where(real, grad[rows], 0).to(kind) for grad, kind in zip(grads, ctx.dtypes, strict=True))
    return *spread, None, None, None


_landmark_sums.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.landmark_sums)
def _flops(x, y, bounds, owner, size, *, out_shape=None) -> int:
    """As torch's sums are counted: no products."""
    return 0
