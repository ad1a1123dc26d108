"""Packed sequences as one long row, for recurrences that start anew where a sequence starts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.packed import Segments

# b sequences, t packed rows, l places of the row, n chunks, c places of a chunk


@dataclass(frozen=True)
class LongRow:
    """Each sequence starts at a whole chunk, and at least `gap` unused places follow it; l = n c.

    where: the segments of the packed rows; slot: [t] the place of each, l for filler rows; first, last: [n]
    bool, the chunks in which a sequence (or the unused rest) begins and ends; num_places: l; no sequence has
    more than `reach` chunks.
    """

    where: Segments
    slot: Tensor
    first: Tensor
    last: Tensor
    num_places: int
    reach: int
    same: bool  # the places are the packed rows

    @staticmethod
    def of(cu_seqlens: Tensor, num_rows: int, max_len: int, *, chunk: int = 1, gap: int = 0) -> "LongRow":
        """As many chunks as any lengths could need, so that their number is known without `cu_seqlens`."""
        where = Segments.of(cu_seqlens, num_rows)
        num_chunks = (num_rows + (cu_seqlens.shape[0] - 1) * (gap + chunk - 1)) // chunk
        needed = (cu_seqlens.long().diff() + (gap + chunk - 1)) // chunk
        ends = F.pad(needed.cumsum(0), (1, 0))  # [b+1] chunks before each sequence
        slot = torch.where(where.real, ends[where.segment] * chunk + where.position, num_chunks * chunk)
        owner = torch.searchsorted(ends, torch.arange(num_chunks, device=ends.device), right=True)
        changes = owner[1:] != owner[:-1]
        first, last = F.pad(changes, (1, 0), value=True), F.pad(changes, (0, 1), value=True)
        reach = (max_len + gap + chunk - 1) // chunk
        return LongRow(where, slot, first, last, num_chunks * chunk, reach, chunk == 1 and gap == 0)

    def lay_out(self, x: Tensor) -> Tensor:
        """[t ...] -> [1 l ...], zeros at unused places."""
        if self.same:
            return x.masked_fill(~self.where.real.view(-1, *[1] * (x.dim() - 1)), 0).unsqueeze(0)
        return _LayOut.apply(x, self.slot, self.num_places).unsqueeze(0)

    def take_back(self, x: Tensor) -> Tensor:
        """[1 l ...] -> [t ...]; filler rows have some value of x, and what comes back for them reaches no
        sequence.
        """
        if self.same:
            return x.squeeze(0)
        return _TakeBack.apply(x.squeeze(0), self.slot)


def _written(x: Tensor, slot: Tensor, num_places: int) -> Tensor:
    """Rows [t ...] to their places [l ...]; those of filler rows go to a place that is cut off."""
    return x.new_zeros(num_places + 1, *x.shape[1:]).index_copy_(0, slot, x)[:-1]


def _read(x: Tensor, slot: Tensor) -> Tensor:
    return x.index_select(0, slot.clamp(max=x.shape[0] - 1))


class _LayOut(torch.autograd.Function):
    """Each one's gradient is the other: what autograd would add to places is written, for they differ."""

    @staticmethod
    def forward(ctx, x: Tensor, slot: Tensor, num_places: int) -> Tensor:
        ctx.save_for_backward(slot)
        return _written(x, slot, num_places)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        filler = (slot == grad.shape[0]).view(-1, *[1] * (grad.dim() - 1))
        return _read(grad, slot).masked_fill_(filler, 0), None, None


class _TakeBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.num_places = x.shape[0]
        return _read(x, slot)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        return _written(grad, slot, ctx.num_places), None
