"""Text: is a film review (IMDb, Maas et al. 2011) positive? Read byte by byte, or by characters as S4 does.

A document is the review's UTF-8 bytes as they are (`<br />` kept, nothing lower-cased), id = byte + 1. Whole
reviews are stored; a length cuts them, keeping the beginning, when batches are made. UTF-8 has no byte above
244, so ids fit a uint8. Characters are described in `lra.tasks.characters`.

IMDb has no validation split. By default a tenth of train is held out, stratified by label: of each label the
reviews with the smallest seeded hash of their text. So the choice does not depend on the order or the form of
the source, and equal reviews stay together. `val=test` takes the test split instead, as most published
results do.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lra.errors import UserError
from lra.schema import setting
from lra.tasks import text_files
from lra.tasks.base import Plan, Progress
from lra.tasks.characters import Written
from lra.tasks.text_files import Rows

READER_VERSION = 1
ROWS = 25_000
"""Rows of IMDb's train and of its test split, half of them of each label."""
FINGERPRINTS = {
    "train": "e8578dc3791be78f009950708b5dfd0a6759bc2cec9d858f7ee97bac297d359d",
    "test": "4f0300a44f06c752d4879ac0ddb9c511052f732812ec7699da12387bbb4406cc",
}
"""`fingerprint` of the texts and labels of IMDb v1.0."""

_HELD_OUT = 0.1


@dataclass(frozen=True)
class Text(Written):
    """Of bytes the length only decides where batches cut, so all lengths share one folder."""

    name: str = "text"
    min_freq: int = setting(15, low=1)  # S4's

    description: ClassVar[str] = "sentiment of a film review, from its bytes or characters (IMDb)"
    num_classes: ClassVar[int] = 2
    default_length: ClassVar[int] = 4000
    usual_characters: ClassVar[int] = 135  # S4's; with val=test and 4,096 there are 134
    disjoint: ClassVar[bool] = False  # IMDb itself has reviews that are in train and in test

    def variant(self, length: int) -> dict[str, Any]:
        variant = {"task": "text", "reader": READER_VERSION, "unit": self.unit, "val": self.val}
        if self.val == "heldout":
            variant |= {"held_out": _HELD_OUT, "data_seed": self.data_seed}
        return variant | self.character_variant(length)

    def variant_name(self, length: int) -> str:
        name, remarks = "imdb-bytes", []
        if self.unit == "char":
            name = f"imdb-chars-{length}"
            remarks = [f"min_freq={self.min_freq}"] if self.min_freq != Text.min_freq else []
        if self.val == "test":
            name, remarks = f"{name}-val-test", ["validation is the test split", *remarks]
        elif self.data_seed:
            name += f"-seed{self.data_seed}"
        return name + (f" ({', '.join(remarks)})" if remarks else "")

    def source_name(self) -> str | None:
        return None if self.source is None else text_files.located(self.source)[0]

    def class_names(self) -> list[str]:
        return ["negative", "positive"]

    def plan(self, length: int) -> Plan:
        rows, mib = (3 * ROWS, 95) if self.val == "test" else (2 * ROWS, 64)
        return Plan(text_files.opened(self.source)[0], rows, mib, 10)

    def build(
        self, writer, *, length: int, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        name, rows = text_files.opened(self.source)
        held_out = self._held_out(rows) if self.val == "heldout" else None
        encode = self.encoder(writer, _kept(rows, held_out), length)
        marks: dict[str, list[bytes]] = {"train": [], "test": []}
        for part in marks:
            counts = [0] * self.num_classes
            for index, (_, text, label) in enumerate(rows(part)):
                counts[label] += 1
                marks[part].append(hashlib.blake2b(b"%d" % label + text, digest_size=16).digest())
                tokens = encode(text)
                held = held_out is not None and part == "train" and held_out[index]
                writer.add("val" if held else part, [tokens], label)
                if part == "test" and held_out is None:
                    writer.add("val", [tokens], label)
                if progress and index % 500 == 499:
                    done = index + 1 + (len(marks["train"]) if part == "test" else 0)
                    progress(done, max(2 * ROWS, done))
            lacking = [label for label, count in zip(self.class_names(), counts, strict=True) if not count]
            if lacking:
                raise UserError(
                    f"{name}: {part} has no {' and no '.join(lacking)} reviews; it needs both kinds. "
                    "The source is not whole, get it anew"
                )
        origin, notes = _origin(marks)
        writer.describe(source=name, data_origin=origin, generator=None, notes=notes)

    def _held_out(self, rows: Rows) -> np.ndarray:
        """Which rows of the source's train split are for validation: a tenth of each label, at least one."""
        keys, labels = [], []
        for _, text, label in rows("train"):
            digest = hashlib.blake2b(b"%d:" % self.data_seed + text, digest_size=8).digest()
            keys.append(int.from_bytes(digest, "big"))
            labels.append(label)
        keys, labels = np.array(keys, np.uint64), np.array(labels)
        held = np.zeros(len(labels), bool)
        for label in range(self.num_classes):
            members = np.flatnonzero(labels == label)
            order = np.argsort(keys[members], kind="stable")
            held[members[order[: max(1, round(_HELD_OUT * len(members)))]]] = True
        return held


def fingerprint(marks: list[bytes]) -> str:
    """A hash of a split's texts and labels that does not depend on the order of its rows."""
    return hashlib.sha256(b"".join(sorted(marks))).hexdigest()


def _kept(rows: Rows, held_out: np.ndarray | None) -> Iterator[bytes]:
    """The texts that are train in this variant."""
    for index, (_, text, _) in enumerate(rows("train")):
        if held_out is None or not held_out[index]:
            yield text


def _origin(marks: dict[str, list[bytes]]) -> tuple[str, list[str]]:
    """(data_origin, notes): "original" only for exactly the texts and labels of IMDb v1.0."""
    if {part: fingerprint(rows) for part, rows in marks.items()} == FINGERPRINTS:
        return "original", ["texts and labels are exactly those of IMDb v1.0"]
    counts = {part: len(rows) for part, rows in marks.items()}
    if set(counts.values()) == {ROWS}:
        return "stand_in", ["as many rows as IMDb v1.0, but other texts or labels"]
    return "stand_in", [f"rows {counts}: not IMDb, which has {ROWS:,} in each"]
