"""From a store to batches on the device: order, truncation, packing.

A batch is made in two halves. On the host, a `Plan`: which rows, where each of their documents starts in the
stored tokens, how long it is; a few numbers. On the device, `assemble`: the gather that makes inputs, labels
and layout out of them, with no shape that depends on a value, so that it can be part of a captured step.
Which rows make batch number n depends on the seed and n alone, so a resumed run continues the same batches
and every layout sees the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lra.data.source import Source, pinned, resident
from lra.data.store import Split
from lra.layout import Layout, Packed, Padded
from lra.parallel import World, shares
from lra.tasks.base import Task

# b rows, s = b x documents sequences, t packed tokens, l padded length

ALONE = World(0, 1, 0)


@dataclass(frozen=True)
class Batch:
    """inputs: ids or values, [t] packed or [s l] padded (values have a last axis of 1); labels [b] int64."""

    inputs: Tensor
    labels: Tensor
    layout: Layout
    rows: np.ndarray  # which examples of the split these are
    num_tokens: int  # real ones


@dataclass(frozen=True)
class Plan:
    """What the host knows of a batch.

    numbers: int64, the starts of the sequences in the stored tokens [s], their ends in the packed rows after
    a zero [s + 1], and the labels [b]. `stored` are the batch's own tokens where a store is streamed.
    """

    numbers: np.ndarray
    num_rows: int  # packed rows, filler included; of padded batches s x l
    rows: np.ndarray  # which examples of the split these are
    num_tokens: int  # real ones, of all processes
    all_rows: int  # of all processes together, of which this one has `rows`
    stored: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """What two batches must share to go through one captured step."""
        return len(self.rows), self.num_rows


@dataclass(frozen=True)
class Form:
    """What all batches of a split share: how stored numbers become inputs, and how these lie.

    `scaling` (mean, std) makes values out of stored pixels; else stored numbers plus `id_offset` are ids.
    `zero_is_padding` masks stored zeros wherever they stand, which only padded batches can. `full`: every
    sequence has exactly the padded length.
    """

    documents: int
    padded_length: int
    packed: bool = True
    full: bool = False
    id_offset: int = 0
    scaling: tuple[float, float] | None = None
    zero_is_padding: bool = False


def assemble(form: Form, tokens: Tensor, numbers: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Layout]:
    """Inputs, labels and layout of a batch on the device of `tokens`, from the numbers of its plan.

    rows: any tensor of as many rows as the batch has packed ones; its shape alone is read.
    """
    num_sequences = (len(numbers) - 1) * form.documents // (2 * form.documents + 1)
    starts = numbers[:num_sequences]
    ends = numbers[num_sequences : 2 * num_sequences + 1]
    labels = numbers[2 * num_sequences + 1 :]
    within = torch.arange(form.padded_length, device=tokens.device)
    if form.packed:
        layout: Layout = Packed(ends.to(torch.int32), rows.shape[0], form.padded_length, full=form.full)
        if form.full:
            stored = tokens[(starts[:, None] + within).reshape(-1)]
        else:
            where = layout.index.where
            source = starts[where.segment.clamp(max=num_sequences - 1)] + where.position
            stored = tokens[torch.where(where.real, source, 0)]
    else:
        mask = within < ends.diff()[:, None]
        stored = tokens[torch.where(mask, starts[:, None] + within, 0)]
        if not form.full:
            stored = torch.where(mask, stored, 0)  # the padding id; models with some quirks read it
        if form.zero_is_padding:
            mask = mask & (stored != 0)
        layout = Padded(num_sequences, form.padded_length, None if form.full else mask, tokens.device)
    if form.scaling is not None:
        mean, std = form.scaling
        return ((stored.float() - mean) / std).unsqueeze(-1), labels, layout
    return stored.long() + form.id_offset, labels, layout


class Batches:
    """The batches of one split: `train(step)` in seeded random order, `in_order()` each example once.

    `plans` and `plans_in_order` are the same batches before they are gathered.
    """

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
        source: Source | None = None,
        world: World = ALONE,
    ) -> None:
        """`token_sizes`: the row counts that packed batches are filled up to; () takes each batch as it is.

        `source`: where batches find their tokens; by default the split's own, kept on the device. `world`:
        the processes that share each batch; sizes given are those of all together.
        """
        assert not (packed and zero_is_padding), "packed rows have no holes"
        self.split, self.documents, self.batch_size = split, documents, batch_size
        self.device, self.seed, self.token_sizes = device, seed, token_sizes
        self.num_rows, self.world = len(split), world
        self.lengths = np.minimum(np.diff(split.offsets), length).astype(np.int64)  # [rows x documents]
        self.num_real = self.lengths  # [rows x documents], tokens that are not padding
        if zero_is_padding:
            self.num_real = _count_nonzero(split.tokens, split.offsets)
        self.source = source or resident([split], device)
        self.labels = np.asarray(split.labels, dtype=np.int64)
        self.form = Form(
            documents=documents,
            padded_length=padded_length,
            packed=packed,
            full=bool((self.num_real == padded_length).all()),
            id_offset=id_offset,
            scaling=scaling,
            zero_is_padding=zero_is_padding,
        )
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def full(self) -> bool:
        """Whether every sequence has exactly the padded length."""
        return self.form.full

    @cached_property
    def device_labels(self) -> Tensor:
        """[rows] int64 on the device."""
        return torch.from_numpy(self.labels).to(self.device)

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

    def plans(self, step: int, *, micro_batch: int | None = None) -> list[Plan]:
        """The batch of optimisation step `step`, cut into parts of at most `micro_batch` rows, of each of
        which this process has its share.
        """
        rows = self.train_rows(step)
        size = micro_batch or len(rows)
        return [self._shared(rows[start : start + size]) for start in range(0, len(rows), size)]

    def plans_in_order(self) -> Iterator[Plan]:
        """This process's part of the examples, each once, in stored order; the last batch may be smaller."""
        rows = shares(np.arange(self.num_rows), self.world)[self.world.rank]
        for start in range(0, len(rows), self.batch_size):
            yield self.plan(rows[start : start + self.batch_size])

    def train(self, step: int, *, micro_batch: int | None = None) -> list[Batch]:
        return [self.made(plan) for plan in self.plans(step, micro_batch=micro_batch)]

    def in_order(self) -> Iterator[Batch]:
        return map(self.made, self.plans_in_order())

    def gather(self, rows: np.ndarray) -> Batch:
        """The given examples as one batch."""
        return self.made(self.plan(rows))

    def plan(self, rows: np.ndarray) -> Plan:
        """The given examples as a batch still to be gathered, all of it by this process."""
        return self._plan(
            rows, self._tokens(rows), int(self.num_real[self._sequences(rows)].sum()), len(rows)
        )

    def _shared(self, rows: np.ndarray) -> Plan:
        """This process's part of a batch. All parts get the room of the largest, so that every process
        captures the same sizes at the same step.
        """
        parts = shares(rows, self.world)
        room = max(self._tokens(part) for part in parts)
        num_real = int(self.num_real[self._sequences(rows)].sum())
        return self._plan(parts[self.world.rank], room, num_real, len(rows))

    def _plan(self, rows: np.ndarray, room: int, num_tokens: int, all_rows: int) -> Plan:
        sequences = self._sequences(rows)
        lengths = self.lengths[sequences]
        if not self.form.packed or self.form.full:
            num_rows = len(sequences) * self.form.padded_length
        else:
            num_rows = next((size for size in self.token_sizes if size >= room), room)
        starts, stored = self.source.find(self.split, sequences, lengths)
        numbers = np.concatenate([starts, [0], np.cumsum(lengths), self.labels[rows]])
        return Plan(numbers, num_rows, rows, num_tokens, all_rows, stored)

    def _sequences(self, rows: np.ndarray) -> np.ndarray:
        return (rows[:, None] * self.documents + np.arange(self.documents)).reshape(-1)

    def _tokens(self, rows: np.ndarray) -> int:
        return int(self.lengths[self._sequences(rows)].sum())

    def made(self, plan: Plan) -> Batch:
        """The batch of a plan, gathered now."""
        tokens = self.source.tokens_of(plan.stored)
        numbers = pinned(plan.numbers, self.device).to(self.device, non_blocking=True)
        rows = torch.empty(1, device=self.device).expand(plan.num_rows)
        inputs, labels, layout = assemble(self.form, tokens, numbers, rows)
        return Batch(inputs, labels, layout, plan.rows, plan.num_tokens)


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


SAMPLED_BATCHES = 20_000
SIZE_STEP = 128  # rows; packed batches are filled up to a multiple of it


def token_sizes(
    lengths: list[np.ndarray], batch_sizes: list[int], documents: int, *, count: int = 4
) -> tuple[int, ...]:
    """At most `count` row counts for packed batches; every batch fits one of them, few rows are filler.

    lengths: of the documents of each split [rows x documents]; batch_sizes: rows a forward of each. The last
    is the total of the longest possible batch, which hardly ever comes. The one before it holds the largest
    of many random batches, and those below are where they leave the least filler. Seeds play no part, so that
    runs that differ in theirs share what was compiled or captured for these sizes.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    totals, worst = [], 0
    for split, batch_size in zip(lengths, batch_sizes, strict=True):
        per_row = split.reshape(-1, documents).sum(1)
        batch_size = min(batch_size, len(per_row))
        if batch_size:
            worst = max(worst, int(np.sort(per_row)[-batch_size:].sum()))
            drawn = generator.integers(0, len(per_row), (max(1, SAMPLED_BATCHES // len(lengths)), batch_size))
            totals.append(per_row[drawn].sum(1))
    sampled = _rounded_up(np.sort(np.concatenate(totals)) if totals else np.zeros(1, np.int64))
    candidates = np.unique(np.quantile(sampled, np.linspace(0, 1, 33), method="higher"))
    largest, below = candidates[-1], candidates[:-1]
    chosen = min(
        (
            (*some, largest)
            for few in range(max(1, count - 1))
            for some in combinations(below.tolist(), min(few, len(below)))
        ),
        key=lambda sizes: np.asarray(sizes)[np.searchsorted(sizes, sampled)].sum(),
    )
    return tuple(sorted({min(int(size), worst) for size in chosen} | {worst}))


def _rounded_up(totals: np.ndarray) -> np.ndarray:
    return -(-totals // SIZE_STEP) * SIZE_STEP
