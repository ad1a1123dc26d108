"""Retrieval: does one paper cite the other? Two texts of the ACL Anthology Network, read byte by byte.

LRA's tables hold each text as the printed form of Python bytes, and LRA's own code (like S4's) feeds that
form to the model: the characters b' and the backslashes of every escape. That is `text=literal`.
`text=decoded` feeds the bytes that were printed. Where a source has plain texts, literal prints them first.

Bytes: id = byte + 1, a document is stored as its first 10,000 bytes, where LRA's code cuts it too, and a
length cuts it further when batches are made. Characters are described in `lra.tasks.characters`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lra.errors import UserError
from lra.schema import setting
from lra.tasks import retrieval_files
from lra.tasks.base import SPLITS, Finding, Plan, Progress
from lra.tasks.characters import Written
from lra.tasks.retrieval_files import LRA_ROWS, Cut

if TYPE_CHECKING:
    from lra.data.store import Split

READER_VERSION = 1
LONGEST = 10_000
"""Bytes of a document that are stored."""


@dataclass(frozen=True)
class Retrieval(Written):
    """Of bytes the length only decides where batches cut, so all lengths share one folder."""

    name: str = "retrieval"
    text: str = setting("literal", choices=("literal", "decoded"))

    description: ClassVar[str] = "does one paper cite the other, from their texts (ACL Anthology Network)"
    num_classes: ClassVar[int] = 2
    default_length: ClassVar[int] = 4000
    documents: ClassVar[int] = 2
    usual_characters: ClassVar[int] = 98  # S4's, at a length of 4,000
    disjoint: ClassVar[bool] = False  # a paper, and a pair, may be in several splits

    @property
    def dtype(self) -> str:
        """Decoded bytes are any bytes, and id 256 needs two; printed ones are ASCII."""
        return "int16" if self.unit == "byte" and self.text == "decoded" else "uint8"

    def check(self) -> None:
        super().check()
        if self.val != "heldout":
            raise UserError(
                f"task.val={self.val}: retrieval has a validation split of its own; leave task.val=heldout"
            )
        if self.data_seed:
            raise UserError(
                f"task.data_seed={self.data_seed} would change nothing: the pairs come in their splits; "
                "leave it away"
            )

    def variant(self, length: int) -> dict[str, Any]:
        variant = {"task": "retrieval", "reader": READER_VERSION, "unit": self.unit, "text": self.text}
        return variant | self.character_variant(length)

    def variant_name(self, length: int) -> str:
        name = "aan-decoded" if self.text == "decoded" else "aan"
        if self.unit == "byte":
            return f"{name}-bytes"
        remark = f" (min_freq={self.min_freq})" if self.min_freq != Retrieval.min_freq else ""
        return f"{name}-chars-{length}{remark}"

    def source_name(self) -> str | None:
        return None if self.source is None else f"{Path(self.source).expanduser().resolve()}"

    def class_names(self) -> list[str]:
        return ["unrelated", "citing"]

    def plan(self, length: int) -> Plan:
        source = retrieval_files.opened(self.source)
        longest = LONGEST if self.unit == "byte" else length
        tokens = min(source.num_bytes, 2 * source.rows * longest)
        size = tokens * (2 if self.dtype == "int16" else 1) + 17 * source.rows
        read = min(source.num_bytes, 2 * source.rows * 30_000)
        return Plan(source.name, source.rows, size / 2**20, 1 + read / 1e8)

    def build(
        self, writer, *, length: int, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        source, cut = retrieval_files.opened(self.source), self._cut(length)

        def training_texts() -> Iterator[bytes]:
            for row in source.read(("train",), self.text, cut):
                yield from row.documents

        encode = self.encoder(writer, training_texts(), length)
        counts, unprinted = dict.fromkeys(SPLITS, 0), 0
        for row in source.read(SPLITS, self.text, cut):
            writer.add(row.split, [encode(document) for document in row.documents], row.label)
            counts[row.split] += 1
            unprinted += sum(not document.startswith((b"b'", b'b"')) for document in row.documents)
            if progress and (done := sum(counts.values())) % 500 == 0:
                progress(done, max(source.rows, done))
        whole = source.is_lra and counts == LRA_ROWS
        notes = [
            "taken for LRA's own pairs by their form and their number; the texts themselves are not checked"
            if whole
            else f"rows {counts}: not LRA's pairs, which are {LRA_ROWS}"
        ]
        if self.text == "literal" and unprinted:
            notes.append(
                f"{unprinted:,} documents are not the printed form of bytes, and are kept as they are"
            )
        origin = "original" if whole else "stand_in"
        writer.describe(source=source.name, data_origin=origin, generator=None, notes=notes)

    def _cut(self, length: int) -> Cut:
        """The part of a document that is stored, still as bytes."""

        def first_bytes(where: str, document: bytes) -> bytes:
            kept = document[:LONGEST]
            if self.dtype == "uint8" and b"\xff" in kept:
                raise UserError(f"{where} has the byte 255, which no text in UTF-8 has; get it anew")
            return kept

        def first_characters(where: str, document: bytes) -> bytes:
            try:
                return document.decode()[: length - 1].encode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where} is not UTF-8 ({error}); get it anew, or read bytes: task.unit=byte"
                ) from error

        return first_bytes if self.unit == "byte" else first_characters

    def check_rows(self, split: "Split", length: int) -> list[Finding]:
        if self.unit == "char":
            return super().check_rows(split, length)
        longest = int(split.lengths.max())
        return [
            Finding(f"{split.name} longest", longest <= LONGEST, f"{longest:,} bytes, allowed {LONGEST:,}")
        ]

    def statistics(self, split: "Split") -> dict[str, Any]:
        if self.unit == "char":
            return super().statistics(split)
        return {f"of {LONGEST:,} bytes or cut there": {"documents": float((split.lengths == LONGEST).mean())}}
