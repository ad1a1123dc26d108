"""What a task must say about itself: its settings, its variants on disk, and how its rows are made and read.

A task knows nothing of models or training. The store keeps its rows, `lra.data` prepares, verifies and shows
them.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lra import schema
from lra.errors import UserError
from lra.schema import setting

if TYPE_CHECKING:
    from lra.data.store import Split
    from lra.data.writer import StoreWriter

SPLITS = ("train", "val", "test")
PADDING = "<pad>"
"""The name of id 0 in every vocabulary. It never occurs in stored data."""

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all) while a data set is built."""


@dataclass(frozen=True)
class Plan:
    """What building a data set will take, before it starts."""

    source: str
    rows: int
    mib: float
    seconds: float


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what, whether it holds, and the numbers or the fault."""

    what: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Task:
    """Settings of one task. The fields are the keys of conf/task/<name>.yaml, with its values as defaults."""

    name: str
    source: str | None = setting(None, semantic=False)  # folder, file, archive or hub id to take data from
    val: str = setting("heldout", choices=("heldout", "test"))
    padded_length: int | None = setting(None, low=1)  # what a recipe pads to; None: the length itself
    data_seed: int = setting(0, low=0)  # of the generator and of the held-out split

    description: ClassVar[str]
    num_classes: ClassVar[int]
    default_length: ClassVar[int]
    vocab_size: ClassVar[int]
    """Ids including the padding id 0. Pixels are stored raw (0 to 255); as tokens they are pixel + 1, so
    257. Where the data decide the vocabulary this is a usual size, for measuring without data; training asks
    the store.
    """
    documents: ClassVar[int] = 1
    black: ClassVar[str] = "pixel"
    """What a black pixel is: a "pixel" like others, or "padding", as in code whose mask is `id > 0`."""
    input: ClassVar[str] = "tokens"
    """What the model sees: "tokens" or "continuous"."""
    stored: ClassVar[str] = "tokens"
    """What lies on disk: "tokens" (ids from 1) or "pixels" (raw values from 0)."""
    dtype: ClassVar[str] = "uint8"
    """The smallest of uint8 and int16 that holds every stored number."""
    disjoint: ClassVar[bool] = True
    """Whether one row in two splits is a fault. Where the source itself repeats rows it is only counted."""

    @property
    def scaling(self) -> tuple[float, float]:
        """(mean, std) on the scale of the stored pixels; a continuous input is (pixel - mean) / std."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UserError for settings that are not allowed or would change nothing."""
        schema.check(self, "task.")
        if self.data_seed >= 1 << 63:
            raise UserError(f"task.data_seed={self.data_seed} is out of range; it must be below 2^63")

    def check_length(self, length: int) -> None:
        """Raises UserError for a length this task cannot have."""
        raise NotImplementedError

    def variant(self, length: int) -> dict[str, Any]:
        """Everything that decides the bytes on disk, as plain JSON values; no paths."""
        raise NotImplementedError

    def variant_name(self, length: int) -> str:
        """The variant in words. What stands before the first blank also names the folder."""
        raise NotImplementedError

    def folder_name(self, length: int) -> str:
        """The variant's slug and 8 hex digits of its hash."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.variant_name(length).split()[0].lower())
        return f"{slug}-{hashlib.sha256(canonical(self.variant(length))).hexdigest()[:8]}"

    def source_name(self) -> str | None:
        """The place named by `source` in full, or None where the data are generated or the default place is
        used.
        """
        return self.source

    def plan(self, length: int) -> Plan:
        """Source, rows and a rough cost; UserError where the source cannot be found."""
        raise NotImplementedError

    def build(
        self,
        writer: "StoreWriter",
        *,
        length: int,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Acquire or generate the rows and hand them to `writer`, with `writer.describe(source=,
        data_origin=)`.
        """
        raise NotImplementedError

    def vocabulary(self) -> list[str] | None:
        """The meaning of each id, id 0 first; empty for pixels; None where the data decide it, and the build
        then hands it to the writer.
        """
        raise NotImplementedError

    def check_vocabulary(self, vocab: list[str], train: "Split") -> list[Finding]:
        """Whether a vocabulary that the data decide is the one that the stored training rows give."""
        return []

    def decode(self, tokens: np.ndarray, vocab: list[str]) -> str:
        """One document as text for people."""
        raise NotImplementedError

    def class_names(self) -> list[str]:
        """The meaning of each label."""
        return [str(label) for label in range(self.num_classes)]

    def check_rows(self, split: "Split", length: int) -> list[Finding]:
        """What only this task can verify about stored rows."""
        return []

    def statistics(self, split: "Split") -> dict[str, Any]:
        """What only this task counts, for `lra data stats`."""
        return {}

    def overrides(self, length: int) -> list[str]:
        """The command-line overrides that lead from the defaults to this task at this length."""
        changed = [
            f"task.{f.name}={_quoted(value)}"
            for f in dataclasses.fields(self)
            if f.name not in ("name", "padded_length") and (value := getattr(self, f.name)) != f.default
        ]
        return [f"length={length}", *changed]


def _quoted(value: Any) -> str:
    """A value as an override has it."""
    if value is None or (isinstance(value, str) and not re.fullmatch(r"[\w./:@%+-]+", value)):
        return "null" if value is None else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no blanks, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def check_bounds(name: str, length: int, low: int, high: int) -> None:
    """The error for a length outside [low, high]."""
    if not low <= length <= high:
        raise UserError(f"length={length} is not allowed for {name}; give one from {low} to {high}")


def row_digests(flat: np.ndarray, offsets: np.ndarray, documents: int = 1) -> list[bytes]:
    """16 bytes for each row, equal for equal rows; labels do not count."""
    data = memoryview(np.ascontiguousarray(flat)).cast("B")
    bounds = (np.asarray(offsets) * flat.itemsize).tolist()
    digests = []
    for first in range(0, len(bounds) - 1, documents):
        ends = bounds[first : first + documents + 1]
        digest = hashlib.blake2b(data[ends[0] : ends[-1]], digest_size=16)
        if documents > 1:
            digest.update(repr([end - ends[0] for end in ends]).encode())
        digests.append(digest.digest())
    return digests


def available_cpus() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
