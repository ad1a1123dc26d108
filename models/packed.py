"""Packed rows: which sequence each belongs to, and how they are laid out where a product wants a batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# b batch, t packed tokens, n chunks, c places of a chunk


@dataclass(frozen=True)
class Segments:
    """Which sequence each packed row belongs to, and where in it; filler rows belong to segment b.

    segment, position: [t] int64. real: [t] bool.
    """

    segment: Tensor
    position: Tensor
    real: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, num_rows: int) -> "Segments":
        row = torch.arange(num_rows, device=cu_seqlens.device)
        segment = torch.searchsorted(cu_seqlens, row.to(cu_seqlens.dtype), right=True) - 1
        start = cu_seqlens.long()[segment]  # filler rows find the total: they count on from it
        return Segments(segment=segment, position=row - start, real=row < cu_seqlens[-1])


CHUNK = 64  # rows


@dataclass(frozen=True)
class Chunks:
    """Packed rows laid out in chunks of one size, none of which holds rows of two sequences.

    where: the segments of the rows; owner: [n] each chunk's sequence, b for spare chunks; slot: [t] the place
    of each row in the flattened chunks, past their end for filler rows; inside: [n c] bool, True if used.
    Places are written and read by row, never gathered from repeated rows, whose gradient would need a sort.
    """

    where: Segments
    owner: Tensor
    slot: Tensor
    inside: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, num_rows: int, *, size: int = CHUNK, max_len: int | None = None) -> "Chunks":
        """At most t / size + b chunks are needed, so their number is known without reading `cu_seqlens`.

        `max_len`, if known, tells that one chunk a sequence is enough when `size` is at least that.
        """
        batch_size = cu_seqlens.shape[0] - 1
        where = Segments.of(cu_seqlens, num_rows)
        if max_len is not None and size >= max_len:
            num_chunks, owner = batch_size, torch.arange(batch_size, device=cu_seqlens.device)
            first_chunk = where.segment
        else:
            num_chunks = batch_size - (-num_rows // size)
            needed = (cu_seqlens.long().diff() + size - 1) // size
            ends = F.pad(needed.cumsum(0), (1, 0))  # [b+1] chunks before sequence i
            owner = torch.searchsorted(ends, torch.arange(num_chunks, device=ends.device), right=True) - 1
            first_chunk = ends[where.segment]
        places = num_chunks * size
        slot = torch.where(where.real, first_chunk * size + where.position, places)
        inside = torch.zeros(places + 1, dtype=torch.bool, device=slot.device).index_fill(0, slot, True)
        return Chunks(where, owner, slot, inside[:-1].unflatten(0, (num_chunks, size)))

    def lay_out(self, x: Tensor) -> Tensor:
        """x [t ...] -> [n c ...], zeros at unused places."""
        flat = x.new_zeros(self.inside.numel() + 1, *x.shape[1:])
        flat = flat.index_copy(0, self.slot, x * _rows(self.where.real, x))
        return flat[:-1].unflatten(0, self.inside.shape)

    def take_back(self, places: Tensor) -> Tensor:
        """[n c ...] -> [t ...], zeros at filler rows."""
        rows = places.flatten(0, 1).index_select(0, self.slot.clamp(max=self.inside.numel() - 1))
        return rows * _rows(self.where.real, rows)

    def sum_by_sequence(self, partial: Tensor, batch_size: int) -> Tensor:
        """One value per chunk [n ...] -> one per sequence [b ...], by a product: deterministic on a GPU."""
        return (self._membership(batch_size, partial) @ partial.flatten(1)).unflatten(1, partial.shape[1:])

    def max_by_sequence(self, partial: Tensor, batch_size: int) -> Tensor:
        """Numbers of each chunk [n ...] -> the largest of each sequence [b ...], without chunks the least
        are.
        """
        owned = self._owned(batch_size).view(batch_size, -1, *[1] * (partial.dim() - 1))  # [b n ...]
        return partial.masked_fill(~owned, torch.finfo(partial.dtype).min).amax(1)

    def of_sequence(self, per_sequence: Tensor) -> Tensor:
        """`spread` of what needs no gradient, by reading: [b ...] -> [n ...], those of the last at spares."""
        return per_sequence[self.owner.clamp(max=per_sequence.shape[0] - 1)]

    def spread(self, per_sequence: Tensor) -> Tensor:
        """One value per sequence [b ...] -> one per chunk [n ...], zeros at spares: the inverse product."""
        membership = self._membership(per_sequence.shape[0], per_sequence)
        return (membership.T @ per_sequence.flatten(1)).unflatten(1, per_sequence.shape[1:])

    def _membership(self, batch_size: int, like: Tensor) -> Tensor:
        return self._owned(batch_size).to(like.dtype)

    def _owned(self, batch_size: int) -> Tensor:
        sequence = torch.arange(batch_size, device=self.owner.device)
        return self.owner == sequence[:, None]  # [b n]


def pad_packed(x: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """x [t ...] -> ([b max_len ...] with zeros at padding, mask [b max_len] bool)."""
    chunks = Chunks.of(cu_seqlens, x.shape[0], size=max_len, max_len=max_len)
    return chunks.lay_out(x), chunks.inside


def unpad_packed(padded: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """The inverse of `pad_packed`: [b max_len ...] -> [t ...], zeros at filler rows."""
    max_len = padded.shape[1]
    return Chunks.of(cu_seqlens, num_rows, size=max_len, max_len=max_len).take_back(padded)


def read_padded(cu_seqlens: Tensor, max_len: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each x [t ...] as [b max_len ...], zeros at padding: `pad_packed` by reading rows, which a compiler
    joins with what reads the result, where that writes them.
    """
    num_rows = tensors[0].shape[0]
    if num_rows == 0:  # there is no row to read
        return tuple(x.sum(dim=0).expand(cu_seqlens.shape[0] - 1, max_len, *x.shape[1:]) for x in tensors)
    where = Segments.of(cu_seqlens, num_rows)
    place = torch.where(where.real, where.segment * max_len + where.position, 0)  # [t]
    position = torch.arange(max_len, device=cu_seqlens.device)
    inside = position < cu_seqlens.diff()[:, None]  # [b max_len]
    row = (cu_seqlens[:-1, None] + position).clamp(max=num_rows - 1)
    return tuple(_Read.apply(x, row, inside, place, where.real) for x in tensors)


class _Read(torch.autograd.Function):
    """x [t ...] at row [b l] where inside [b l]; the gradient of a real row is read at place [t], since that
    of repeated rows would need a sort.
    """

    @staticmethod
    def forward(ctx, x: Tensor, row: Tensor, inside: Tensor, place: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(place, real)
        return torch.where(inside.view(*inside.shape, *[1] * (x.dim() - 1)), x[row], 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        place, real = ctx.saved_tensors
        rows = grad.flatten(0, 1)[place]
        return torch.where(real.view(-1, *[1] * (rows.dim() - 1)), rows, 0), None, None, None, None


def _rows(keep: Tensor, x: Tensor) -> Tensor:
    """keep [t] as a factor for the rows of x [t ...]."""
    return keep.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
