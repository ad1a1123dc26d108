"""Text: is a film review (IMDb, Maas et al. 2011) positive? Read byte by byte.

A document is the review's UTF-8 bytes as they are (`<br />` kept, nothing lower-cased), id = byte + 1. Whole
reviews are stored; a length cuts them, keeping the beginning, when batches are made. UTF-8 has no byte above
244, so ids fit a uint8.

IMDb has no validation split. By default a tenth of train is held out, stratified by label: of each label the
reviews with the smallest seeded hash of their text. So the choice does not depend on the order or the form of
the source, and equal reviews stay together. `val=test` takes the test split instead, as most published
results do.
"""

import csv
import hashlib
import math
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lra.data import data_root
from lra.errors import UserError
from lra.tasks.base import PADDING, Plan, Progress, Task, check_bounds

HUB_ID = "stanfordnlp/imdb"
ARCHIVE = "aclImdb_v1.tar.gz"
READER_VERSION = 1
ROWS = 25_000
"""Rows of IMDb's train and of its test split, half of them of each label."""
FINGERPRINTS = {
    "train": "e8578dc3791be78f009950708b5dfd0a6759bc2cec9d858f7ee97bac297d359d",
    "test": "4f0300a44f06c752d4879ac0ddb9c511052f732812ec7699da12387bbb4406cc",
}
"""`fingerprint` of the texts and labels of IMDb v1.0."""

_HELD_OUT = 0.1
_SUFFIXES = (".parquet", ".csv", ".tsv", ".tar", ".gz", ".tgz", ".zip", ".txt")
"""What ends in one of these is meant as a file, not as a hub id."""
_LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}

Row = tuple[str, bytes, int]
"""Where it stands in the source (for messages), the text, the label."""
Rows = Callable[[str], Iterator[Row]]
"""From "train" or "test" to its rows, the same ones each time it is called."""


@dataclass(frozen=True)
class Text(Task):
    """The length only decides where batches cut, so all lengths share one folder."""

    name: str = "text"

    description: ClassVar[str] = "sentiment of a film review, byte by byte (IMDb)"
    num_classes: ClassVar[int] = 2
    default_length: ClassVar[int] = 4000
    vocab_size: ClassVar[int] = 257
    disjoint: ClassVar[bool] = False  # IMDb itself has reviews that are in train and in test

    def check_length(self, length: int) -> None:
        check_bounds("text", length, 16, 65_536)

    def variant(self, length: int) -> dict[str, Any]:
        variant = {"task": "text", "reader": READER_VERSION, "unit": "byte", "val": self.val}
        return variant | (
            {"held_out": _HELD_OUT, "data_seed": self.data_seed} if self.val == "heldout" else {}
        )

    def variant_name(self, length: int) -> str:
        if self.val == "test":
            return "imdb-bytes-val-test (validation is the test split)"
        return "imdb-bytes" + (f"-seed{self.data_seed}" if self.data_seed else "")

    def source_name(self) -> str | None:
        return None if self.source is None else _located(self.source)[0]

    def plan(self, length: int) -> Plan:
        rows, mib = (3 * ROWS, 95) if self.val == "test" else (2 * ROWS, 64)
        return Plan(self._open()[0], rows, mib, 10)

    def vocabulary(self) -> list[str]:
        return [PADDING, *(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in range(256))]

    def decode(self, tokens: np.ndarray, vocab: list[str]) -> str:
        return (np.asarray(tokens).astype(np.int64) - 1).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def build(
        self, writer, *, length: int, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        name, rows = self._open()
        held_out = self._held_out(rows) if self.val == "heldout" else None
        marks: dict[str, list[bytes]] = {"train": [], "test": []}
        for part in marks:
            for index, (_, text, label) in enumerate(rows(part)):
                marks[part].append(hashlib.blake2b(b"%d" % label + text, digest_size=16).digest())
                tokens = np.frombuffer(text, np.uint8) + np.uint8(1)
                held = held_out is not None and part == "train" and held_out[index]
                writer.add("val" if held else part, [tokens], label)
                if part == "test" and held_out is None:
                    writer.add("val", [tokens], label)
                if progress and index % 500 == 499:
                    done = index + 1 + (len(marks["train"]) if part == "test" else 0)
                    progress(done, max(2 * ROWS, done))
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

    def _open(self) -> tuple[str, Rows]:
        """The source's name and its rows. Without `source`: $LRA_DATA/sources/imdb, else the hub."""
        if self.source is not None:
            return _located(self.source)
        place = data_root() / "sources" / "imdb"
        return _located(str(place)) if place.exists() else (HUB_ID, _hub(HUB_ID))


def fingerprint(marks: list[bytes]) -> str:
    """A hash of a split's texts and labels that does not depend on the order of its rows."""
    return hashlib.sha256(b"".join(sorted(marks))).hexdigest()


def _origin(marks: dict[str, list[bytes]]) -> tuple[str, list[str]]:
    """(data_origin, notes): "original" only for exactly the texts and labels of IMDb v1.0."""
    if {part: fingerprint(rows) for part, rows in marks.items()} == FINGERPRINTS:
        return "original", ["texts and labels are exactly those of IMDb v1.0"]
    counts = {part: len(rows) for part, rows in marks.items()}
    if set(counts.values()) == {ROWS}:
        return "lossy_copy", ["as many rows as IMDb v1.0, but texts or labels differ from it"]
    return "stand_in", [f"rows {counts}: not IMDb, which has {ROWS:,} in each"]


def _located(source: str) -> tuple[str, Rows]:
    """The full name and the rows of a folder, file, archive or hub id; UserError if it is none of them."""
    path = Path(source).expanduser()
    if not path.exists():
        if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and path.suffix.lower() not in _SUFFIXES:
            return source, _hub(source)
        raise UserError(f"task.source={source}: there is no such file or folder. {_wanted()}")
    path = path.resolve()
    if path.is_file():
        rows = _archive(path) if ".tar" in path.suffixes or path.suffix == ".tgz" else _tables({"": [path]})
        return str(path), rows
    for folder in (path, path / "aclImdb"):
        if (folder / "train" / "pos").is_dir():
            return str(path), _folder(folder)
    for pattern in ("*.parquet", "*.csv"):
        named = {part: re.compile(rf"(imdb[_-])?{part}[-_.]", re.IGNORECASE) for part in ("train", "test")}
        files = {part: sorted(f for f in path.glob(pattern) if named[part].match(f.name)) for part in named}
        if all(files.values()):
            return str(path), _tables(files)
    if (path / ARCHIVE).is_file():
        return str(path), _archive(path / ARCHIVE)
    if any(path.glob("*/*.parquet")):
        return str(path), _hub(str(path), streaming=True)
    raise UserError(f"{path} holds no IMDb. {_wanted()}")


def _wanted() -> str:
    place = data_root() / "sources" / "imdb"
    return (
        "Wanted: imdb_train.parquet and imdb_test.parquet (or .csv; columns text and label), or the authors' "
        f"archive {ARCHIVE}, or its folder aclImdb, or a copy of the hub's {HUB_ID}. Put it in {place}, "
        "or name the place: lra data prepare text task.source=DIR"
    )


def _row(where: str, text: str | bytes | None, label: Any) -> Row:
    """A checked row."""
    known = _LABELS.get(str(label).lower())
    if known is None:
        raise UserError(f"{where}: label {label!r} is not allowed; labels are 0 (negative) and 1 (positive)")
    if not text:
        raise UserError(f"{where}: the text is empty; every row needs one")
    if isinstance(text, str):
        return where, text.encode(), known
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error}); get the file anew") from error
    return where, text, known


def _folder(root: Path) -> Rows:
    """root/{train,test}/{neg,pos}/ID_RATING.txt: all negatives by id, then all positives by id."""

    def rows(part: str) -> Iterator[Row]:
        for label in ("neg", "pos"):
            for path in sorted((root / part / label).glob("*.txt"), key=_by_id):
                yield _row(str(path), path.read_bytes(), label)

    return rows


def _by_id(path: Path) -> tuple[float, str]:
    number = path.stem.split("_")[0]
    return (int(number) if number.isdigit() else math.inf, path.name)


def _archive(path: Path) -> Rows:
    """The authors' tar archive, in the order of `_folder`. Held in memory while it is read: 65 MB of
    reviews.
    """
    found: dict[str, list[tuple[Path, bytes]]] = {}

    def rows(part: str) -> Iterator[Row]:
        if not found:
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        parts = Path(member.name).parts[-4:-1]
                        if member.isfile() and parts[-2:] in _ARCHIVE_FOLDERS:
                            found.setdefault("/".join(parts[-2:]), []).append(
                                (Path(member.name), archive.extractfile(member).read())
                            )
            except (tarfile.TarError, EOFError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path} cannot be read as a tar archive ({reason}); get it anew") from error
            if not found:
                raise UserError(f"{path} holds no aclImdb/train/pos. {_wanted()}")
        for label in ("neg", "pos"):
            for member, text in sorted(found.get(f"{part}/{label}", []), key=lambda entry: _by_id(entry[0])):
                yield _row(f"{path.name}: {member}", text, label)

    return rows


_ARCHIVE_FOLDERS = {(part, label) for part in ("train", "test") for label in ("neg", "pos")}


def _tables(files: dict[str, list[Path]]) -> Rows:
    """Parquet or CSV files with columns text and label; one file for both splits has a column split as
    well.
    """

    def rows(part: str) -> Iterator[Row]:
        columns = ("text", "label") if part in files else ("text", "label", "split")
        for path in files.get(part) or files[""]:
            read = _parquet if path.suffix == ".parquet" else _csv
            for number, values in enumerate(read(path, columns), 1):
                if len(values) == 2 or values[2] == part:
                    yield _row(f"{path.name} row {number}", values[0], values[1])

    return rows


def _require_columns(path: Path, columns: tuple[str, ...], found: Iterable[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        hint = "; one file for both splits needs it, else give a folder with a train and a test file"
        raise UserError(
            f"{path} has no column {', '.join(missing)}{hint if 'split' in missing else ''}; "
            f"it has: {', '.join(found)}"
        )


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _require_columns(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(1000, columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); get it anew") from error


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple]:
    csv.field_size_limit(1 << 26)
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            _require_columns(path, columns, reader.fieldnames or [])
            for record in reader:
                yield tuple(record[name] for name in columns)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error}); get it anew") from error


def _hub(name: str, streaming: bool = False) -> Rows:
    """A data set on the hub, or (`streaming`, so that no second copy is made) a local folder laid out like
    one.
    """
    loaded: dict[str, Any] = {}

    def rows(part: str) -> Iterator[Row]:
        import datasets

        try:
            if not loaded:
                loaded.update(datasets.load_dataset(name, streaming=streaming))
            if part not in loaded:
                raise UserError(f"'{name}' has no split '{part}'; it has: {', '.join(loaded)}")
            for number, record in enumerate(loaded[part]):
                if "text" not in record or "label" not in record:
                    raise UserError(f"'{name}' has columns {', '.join(record)}; it needs text and label")
                yield _row(f"{name} {part} row {number}", record["text"], record["label"])
        except UserError:
            raise
        except Exception as error:
            # The network, the hub and each file format have exceptions of their own, without a common base.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            place = "its files cannot be read" if streaming else "it is not here, and the hub cannot give it"
            raise UserError(f"'{name}': {place} ({reason}). {_wanted()}") from error

    return rows
