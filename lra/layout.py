"""How the tokens of a batch lie in memory: packed without padding, or padded with a mask.

Embedding, norms and feed-forward work on [... d] and do not care. What does care (mixing, pooling,
per-sequence dropout, the [CLS] token) asks the layout, so that a model is written once.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.common import Block, Mixer, full_precision
from models.packed import Chunks, Segments

# s sequences (batch rows x documents), l padded length, t packed rows, d width

POOLS = ("cls", "first", "mean", "mean_padded", "mean_all", "max")


@dataclass(frozen=True)
class Padded:
    """x [s l d]; mask [s l] bool, True = real, or None when every position is real."""

    num_sequences: int
    length: int
    mask: Tensor | None
    device: torch.device

    @property
    def real(self) -> Tensor | None:
        return self.mask

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.length, device=self.device)

    def mix(self, mixer: Mixer, x: Tensor) -> Tensor:
        return mixer(x, self.mask)

    def through(self, block: Block, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return block(x, self.mask, carry)

    def per_sequence(self, values: Tensor) -> Tensor:
        """values [s d] as a factor for x."""
        return values[:, None]

    def pool(self, x: Tensor, kind: str) -> Tensor:
        """x [s l d] -> [s d]; sums and means in at least float32."""
        if kind in ("cls", "first"):
            return x[:, 0]
        if kind == "max":
            if self.mask is None:
                return x.amax(1)
            largest = x.masked_fill(~self.mask[..., None], float("-inf")).amax(1)
            return largest.masked_fill(~self.mask.any(1, keepdim=True), 0.0)
        wide = x if x.dtype == torch.float64 else x.float()
        if kind == "mean_all" or self.mask is None:
            return wide.mean(1)
        total = (wide * self.mask[..., None]).sum(1)
        count = self.mask.sum(1, keepdim=True).clamp_min(1) if kind == "mean" else self.length
        return total / count

    def prepend(self, x: Tensor, token: Tensor) -> tuple[Tensor, "Padded"]:
        """Puts token [d] before every sequence."""
        x = torch.cat([token.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
        mask = None if self.mask is None else torch.cat([torch.ones_like(self.mask[:, :1]), self.mask], dim=1)
        return x, Padded(self.num_sequences, self.length + 1, mask, self.device)


@dataclass(frozen=True)
class Packed:
    """x [t d]; sequence i is x[cu_seqlens[i]:cu_seqlens[i + 1]], later rows are filler.

    `length` is the padded length that mechanisms without a packed path get; `full` says that every sequence
    has exactly that length and that there is no filler, so that padding is a reshape.
    """

    cu_seqlens: Tensor
    num_rows: int
    length: int
    full: bool = False
    index: Chunks | None = field(init=False)  # one chunk a sequence, the padded batch; None if full

    def __post_init__(self) -> None:
        # Not a cached_property: Python 3.11's takes a lock, which torch.compile cannot trace.
        index = None
        if not self.full:
            index = Chunks.of(self.cu_seqlens, self.num_rows, size=self.length, max_len=self.length)
        object.__setattr__(self, "index", index)

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def real(self) -> Tensor | None:
        return None if self.full else self.index.where.real

    @property
    def positions(self) -> Tensor:
        """[t] position of each row in its sequence; filler rows count on, below `length`."""
        if self.full:
            return torch.arange(self.length, device=self.cu_seqlens.device).repeat(self.num_sequences)
        return self.index.where.position.clamp(max=self.length - 1)

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.full:
            return x.unflatten(0, (self.num_sequences, self.length)), None
        return self.index.lay_out(x), self.index.inside

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.full else self.index.take_back(x)

    def mix(self, mixer: Mixer, x: Tensor) -> Tensor:
        if mixer.traits.packed and not self.full:
            return mixer.forward_packed(x, self.cu_seqlens, self.length)
        return self.unpad(mixer(*self.pad(x)))

    def through(self, block: Block, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if block.traits.packed and not self.full:
            return block.forward_packed(x, self.cu_seqlens, self.length, carry)
        padded, carry = block(*self.pad(x), carry)
        return self.unpad(padded), carry

    def per_sequence(self, values: Tensor) -> Tensor:
        """values [s d] as a factor for x."""
        if self.full:
            return values.repeat_interleave(self.length, dim=0)
        return values[self.index.where.segment.clamp(max=self.num_sequences - 1)]

    def pool(self, x: Tensor, kind: str) -> Tensor:
        """x [t d] -> [s d]; sums are a product with the 0/1 membership matrix, so they are deterministic on
        a GPU.
        """
        if kind in ("cls", "first"):
            return x[self.cu_seqlens[:-1].long()]
        if self.full or kind == "max":
            padded, mask = self.pad(x)
            return Padded(self.num_sequences, self.length, mask, x.device).pool(padded, kind)
        wide = x if x.dtype == torch.float64 else x.float()
        sequence = torch.arange(self.num_sequences, device=x.device)
        membership = (self.index.where.segment == sequence[:, None]).to(wide.dtype)  # [s t]
        with full_precision(x):
            total = membership @ wide
        count = self.cu_seqlens.diff()[:, None].clamp_min(1) if kind == "mean" else self.length
        return total / count

    def prepend(self, x: Tensor, token: Tensor) -> tuple[Tensor, "Packed"]:
        """Puts token [d] before every sequence."""
        steps = torch.arange(self.num_sequences + 1, device=x.device, dtype=self.cu_seqlens.dtype)
        wider = Packed(
            self.cu_seqlens + steps, self.num_rows + self.num_sequences, self.length + 1, self.full
        )
        where = Segments.of(wider.cu_seqlens, wider.num_rows)
        source = torch.arange(wider.num_rows, device=x.device) - where.segment - 1
        moved = x[source.clamp(0, self.num_rows - 1)]
        first = ((where.position == 0) & where.real)[:, None]
        return torch.where(first, token.to(x.dtype), moved), wider


Layout = Padded | Packed
