"""Small tasks of each shape the store must hold: tokens, wide tokens, two documents, pixels."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lra.schema import setting
from lra.tasks.base import Plan, Task, check_bounds


@dataclass(frozen=True)
class Synthetic(Task):
    """Random rows; subclasses say of which shape."""

    name: str = "synthetic"
    rows: int = setting(30, low=1)

    description: ClassVar[str] = "random numbers"
    num_classes: ClassVar[int] = 3
    default_length: ClassVar[int] = 50
    vocab_size: ClassVar[int] = 20

    def check_length(self, length):
        check_bounds(self.name, length, 1, 65_536)

    def variant(self, length):
        return {"task": self.name, "length": length, "rows": self.rows, "data_seed": self.data_seed}

    def variant_name(self, length):
        return f"{self.name}-{length}"

    def plan(self, length):
        return Plan("made here", 3 * self.rows, 0.01, 0.1)

    def vocabulary(self):
        return ["<pad>", *(f"w{i}" for i in range(1, self.vocab_size))]

    def decode(self, tokens, vocab):
        return " ".join(vocab[token] for token in tokens)

    def document(self, rng, length):
        return rng.integers(1, self.vocab_size, rng.integers(min(6, length), length + 1)).astype(self.dtype)

    def rows_of(self, split, length):
        """The rows as they should come back: [(documents, label)]."""
        rng = np.random.default_rng([self.data_seed, ["train", "val", "test"].index(split)])
        return [
            ([self.document(rng, length) for _ in range(self.documents)], int(rng.integers(self.num_classes)))
            for _ in range(self.rows)
        ]

    def build(self, writer, *, length, workers=None, progress=None):
        for split in ("train", "val", "test"):
            for documents, label in self.rows_of(split, length):
                writer.add(split, documents, label)
        writer.describe(source="made here", data_origin="regenerated", generator={"version": 1}, notes=[])


@dataclass(frozen=True)
class Wide(Synthetic):
    """A vocabulary that does not fit into a byte."""

    name: str = "wide"
    vocab_size: ClassVar[int] = 1000
    dtype: ClassVar[str] = "int16"


@dataclass(frozen=True)
class Pairs(Synthetic):
    """Two documents of different lengths in a row, as Retrieval has them."""

    name: str = "pairs"
    documents: ClassVar[int] = 2


@dataclass(frozen=True)
class Pixels(Synthetic):
    """Images as raw grey values, all of one length, as Image and Pathfinder have them."""

    name: str = "pixels"
    stored: ClassVar[str] = "pixels"
    input: ClassVar[str] = "continuous"
    vocab_size: ClassVar[int] = 257

    def vocabulary(self):
        return []

    def decode(self, tokens, vocab):
        return " ".join(map(str, tokens))

    def document(self, rng, length):
        return rng.integers(0, 256, length).astype(np.uint8)


SHAPES = (Synthetic, Wide, Pairs, Pixels)
