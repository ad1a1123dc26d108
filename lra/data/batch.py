"""From a store to batches on the device: order, truncation, packing.

The tokens of a split live on the training device as they lie on disk (one flat array), and a batch is
gathered there. Which rows make batch number n depends on the seed and n alone, so a resumed run continues
the same batches and every layout sees the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lra.data.store import Split
from lra.layout import Layout, Packed, Padded
from lra.tasks.base import Task

# b rows, s = b x documents sequences, t packed tokens, l padded length


@dataclass(frozen=True)
class Batch:
    """inputs: ids or values, [t] packed or [s l] padded (values have a last axis of 1); labels [b] int64."""

    inputs: Tensor
    labels: Tensor
    layout: Layout
    rows: np.ndarray  # which examples of the split these are
    num_tokens: int  # real ones


class Batches:
    """The batches of one split: `train(step)` in seeded random order, `in_order()` each example once."""

    def __init__(
        self,
        split: Split,
        *,
        documents: int,
        length: int,
        padded_length: int,
        batch_size: int,
        device: torch.device,
        packed: bool = True,
        seed: int = 0,
        id_offset: int = 0,
        scaling: tuple[float, float] | None = None,
        zero_is_padding: bool = False,
        token_sizes: tuple[int, ...] = (),
    ) -> None:
        """`scaling` (mean, std) makes values out of stored pixels; else stored numbers plus `id_offset` are
        ids. `zero_is_padding` masks stored zeros wherever they stand, which only padded batches can.

        `token_sizes`: the row counts that packed batches are filled up to; () takes each batch as it is.
        """
        self.documents, self.padded_length, self.batch_size = documents, padded_length, batch_size
        self.device, self.packed, self.seed = device, packed, seed
        self.id_offset, self.scaling, self.token_sizes = id_offset, scaling, token_sizes
        assert not (packed and zero_is_padding), "packed rows have no holes"
        self.num_rows, self.zero_is_padding = len(split), zero_is_padding
        self.lengths = np.minimum(np.diff(split.offsets), length).astype(np.int64)  # [rows x documents]
        self.num_real = self.lengths  # [rows x documents], tokens that are not padding
        if zero_is_padding:
            self.num_real = _count_nonzero(split.tokens, split.offsets)
        self.tokens = torch.from_numpy(np.asarray(split.tokens)).to(device)
        self.starts = torch.from_numpy(np.asarray(split.offsets[:-1], dtype=np.int64)).to(device)
        self.labels = torch.from_numpy(np.asarray(split.labels, dtype=np.int64)).to(device)
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of data kept on the device."""
        return sum(x.numel() * x.element_size() for x in (self.tokens, self.starts, self.labels))

    @cached_property
    def full(self) -> bool:
        """Whether every sequence has exactly the padded length."""
        return bool((self.num_real == self.padded_length).all())

    @property
    def batches_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def train_rows(self, step: int) -> np.ndarray:
        """The examples of optimisation step `step`; an epoch's incomplete last batch is left out."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_rows)
            self._epoch = (epoch, order)
        return self._epoch[1][index * self.batch_size : (index + 1) * self.batch_size]

    def train(self, step: int, *, micro_batch: int | None = None) -> list[Batch]:
        """The batch of optimisation step `step`, cut into parts of at most `micro_batch` rows."""
        rows = self.train_rows(step)
        size = micro_batch or len(rows)
        return [self.gather(rows[start : start + size]) for start in range(0, len(rows), size)]

    def in_order(self) -> Iterator[Batch]:
        """Every example once, in stored order; the last batch may be smaller."""
        for start in range(0, self.num_rows, self.batch_size):
            yield self.gather(np.arange(start, min(start + self.batch_size, self.num_rows)))

    def gather(self, rows: np.ndarray) -> Batch:
        """The given examples as one batch."""
        sequences = (rows[:, None] * self.documents + np.arange(self.documents)).reshape(-1)
        lengths = self.lengths[sequences]
        starts = self.starts[self._to_device(sequences)]
        if self.packed:
            inputs, layout = self._pack(starts, lengths)
        else:
            inputs, layout = self._pad(starts, lengths)
        labels = self.labels[self._to_device(rows)]
        return Batch(self._as_inputs(inputs), labels, layout, rows, int(self.num_real[sequences].sum()))

    def _pack(self, starts: Tensor, lengths: np.ndarray) -> tuple[Tensor, Packed]:
        total = int(lengths.sum())
        num_rows = next((size for size in self.token_sizes if size >= total), total)
        cu_seqlens = self._to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        full = self.full and num_rows == total
        layout = Packed(cu_seqlens, num_rows, self.padded_length, full=full)
        if full:
            within = torch.arange(self.padded_length, device=self.device)
            return self.tokens[(starts[:, None] + within).reshape(-1)], layout
        where = layout.index.where
        source = starts[where.segment.clamp(max=len(lengths) - 1)] + where.position
        return self.tokens[torch.where(where.real, source, 0)], layout

    def _pad(self, starts: Tensor, lengths: np.ndarray) -> tuple[Tensor, Padded]:
        within = torch.arange(self.padded_length, device=self.device)
        mask = within < self._to_device(lengths)[:, None]
        stored = self.tokens[torch.where(mask, starts[:, None] + within, 0)]
        if self.zero_is_padding:
            mask = mask & (stored != 0)
        return stored, Padded(len(lengths), self.padded_length, None if self.full else mask, self.device)

    def _as_inputs(self, stored: Tensor) -> Tensor:
        if self.scaling is not None:
            mean, std = self.scaling
            return ((stored.float() - mean) / std).unsqueeze(-1)
        return stored.long() + self.id_offset

    def _to_device(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host


def decoding(task: Task) -> dict[str, Any]:
    """How a task's stored numbers become inputs, as arguments of `Batches`."""
    if task.input == "continuous":
        return {"scaling": task.scaling}
    return {
        "id_offset": 1 if task.stored == "pixels" else 0,
        "zero_is_padding": task.black == "padding",
    }


def _count_nonzero(tokens: np.ndarray, offsets: np.ndarray, *, rows_at_once: int = 4096) -> np.ndarray:
    """How many stored numbers of each row are not zero, [rows] int64; no row may be empty."""
    counts = [
        np.add.reduceat(tokens[bounds[0] : bounds[-1]] != 0, bounds[:-1] - bounds[0], dtype=np.int64)
        for start in range(0, len(offsets) - 1, rows_at_once)
        if len(bounds := offsets[start : start + rows_at_once + 1]) > 1
    ]
    return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def token_sizes(
    lengths: np.ndarray, batch_size: int, documents: int, *, count: int = 4, seed: int = 0
) -> tuple[int, ...]:
    """At most `count` row counts for packed batches: quantiles of the totals of random batches, then the
    largest.

    The largest is the total of the longest possible batch, so every batch fits one of them.
    """
    per_row = lengths.reshape(-1, documents).sum(1)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    totals = [
        int(generator.choice(per_row, min(batch_size, len(per_row)), replace=False).sum()) for _ in range(500)
    ]
    worst = int(np.sort(per_row)[-batch_size:].sum())
    quantiles = np.quantile(totals, np.linspace(0, 1, count)[1:] - 0.5 / count) if count > 1 else []
    sizes = {-(-int(q) // 128) * 128 for q in quantiles} | {worst}
    return tuple(sorted(size for size in sizes if size <= worst))
