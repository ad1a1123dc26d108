"""A data set on disk: flat files and a manifest, written once and read through memory maps.

One folder per variant:
  manifest.json         what it is, where it came from, counts, hashes
  <split>.tokens.bin    all documents end to end: ids (0 never occurs) or raw pixels, uint8 or little-endian
  int16 <split>.offsets.bin   int64 [rows * documents + 1]: document j of row i starts at offsets[i *
  documents + j] <split>.labels.bin    uint8 [rows]
"""

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

import lra
from lra.data import data_root
from lra.errors import UserError, unknown
from lra.tasks.base import SPLITS, Task, canonical, row_digests

FORMAT_VERSION = 1
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
PARTS = {"tokens": None, "offsets": "<i8", "labels": "|u1"}


def store_path(task: Task, length: int) -> Path:
    """The folder of this variant, whether it exists or not."""
    return data_root() / task.folder_name(length)


def prepare_command(task: Task, length: int) -> str:
    """The command that builds this variant."""
    return shlex.join(["lra", "data", "prepare", task.name, *task.overrides(length)])


def file_name(split: str, part: str) -> str:
    """The file of one part ("tokens", "offsets" or "labels") of a split."""
    return f"{split}.{part}.bin"


def disk_dtype(part: str, tokens: str) -> np.dtype:
    """The type of the numbers in a file; `tokens` is the manifest's dtype, "uint8" or "int16"."""
    return np.dtype(PARTS[part] or tokens).newbyteorder("<")


@dataclass(frozen=True)
class Split:
    """tokens: flat memory map; offsets: int64 [rows * documents + 1]; labels: int64 [rows]."""

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    documents: int

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int) -> list[np.ndarray]:
        """The documents of one row."""
        bounds = self.offsets[index * self.documents : (index + 1) * self.documents + 1]
        return [self.tokens[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """The length of each document, [rows * documents]."""
        return np.diff(self.offsets)


class Store:
    """One variant on disk, opened without reading it: sizes are checked, hashes are not (`verify` does
    that).
    """

    def __init__(self, path: Path, remedy: str) -> None:
        """`remedy` is the command that builds this variant, for messages."""
        self.path, self._splits = path, {}
        self.manifest = read_manifest(path, remedy)
        files = self.manifest["files"]
        for name in (file_name(split, part) for split in SPLITS for part in PARTS):
            if name not in files:
                raise UserError(
                    f"{path / 'manifest.json'} does not list {name}; build it again: {remedy} --force"
                )
            entry = files[name]
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != entry["size"]:
                found = "is missing" if size is None else f"has {size:,} bytes, not {entry['size']:,}"
                raise UserError(f"{path / name} {found}; build it again: {remedy} --force")

    @property
    def vocab(self) -> list[str]:
        return self.manifest["vocabulary"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def data_hash(self) -> str:
        return self.manifest["data_hash"]

    @property
    def data_origin(self) -> str:
        return self.manifest["data_origin"]

    @property
    def data_variant(self) -> str:
        return self.manifest["variant_name"]

    def split(self, name: str) -> Split:
        """One of train, val and test."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        if name not in self._splits:
            # Copy on write: torch warns about read-only arrays, and nothing written here reaches the disk.
            tokens, offsets, labels = (
                np.memmap(
                    self.path / file_name(name, part), disk_dtype(part, self.manifest["dtype"]), mode="c"
                )
                for part in PARTS
            )
            self._splits[name] = Split(
                name, tokens, offsets, labels.astype(np.int64), self.manifest["documents"]
            )
        return self._splits[name]


def open_store(task: Task, length: int) -> Store:
    """The prepared variant; UserError if it is missing, truncated or of another format version."""
    task.check()
    task.check_length(length)
    path, remedy = store_path(task, length), prepare_command(task, length)
    if not path.is_dir():
        raise UserError(
            f"the data of {task.variant_name(length)} are not in {data_root()}; run: {remedy} "
            "(or set LRA_DATA to the folder that has them)"
        )
    return Store(path, remedy)


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """The manifest of a variant's folder; UserError if it cannot be used."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path} has no manifest.json; build it again: {remedy} --force") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path / 'manifest.json'} is not JSON ({error}); build it again: {remedy} --force"
        ) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has store format {version}, this program reads {FORMAT_VERSION}; "
            f"build it again: {remedy} --force"
        )
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise UserError(
            f"{path / 'manifest.json'} lacks {', '.join(missing)}; build it again: {remedy} --force"
        )
    return manifest


class StoreWriter:
    """Streams rows into a new folder and hashes them on the way; `finish` writes the manifest, last.

    The folder is not the final one: `lra.data.prepare` renames it when it is complete.
    """

    def __init__(
        self, folder: Path, *, dtype: str, documents: int, num_classes: int, vocab_size: int, stored: str
    ):
        folder.mkdir(parents=True)
        self.folder, self.documents, self.stored = folder, documents, stored
        self.num_classes, self.vocab_size = num_classes, vocab_size
        self.dtype = disk_dtype("tokens", dtype)
        self._description: dict[str, Any] = {}
        self._splits: dict[str, _SplitWriter] = {}

    def describe(self, **fields: Any) -> None:
        """Manifest fields that only the build knows: source, data_origin, generator, notes."""
        self._description |= fields

    def add(self, split: str, documents: Sequence[np.ndarray], label: int) -> None:
        """One row."""
        offsets = np.cumsum([0] + [len(document) for document in documents])
        flat = documents[0] if len(documents) == 1 else np.concatenate(documents)
        self.add_rows(split, flat, offsets, np.array([label]))

    def add_rows(self, split: str, flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> None:
        """Many rows: flat numbers, offsets [rows * documents + 1] that start at 0, labels [rows]."""
        if len(labels) == 0:
            return
        low = 0 if self.stored == "pixels" else 1
        high = 255 if self.stored == "pixels" else self.vocab_size - 1
        high = min(high, np.iinfo(self.dtype).max)
        assert len(offsets) == len(labels) * self.documents + 1, "offsets do not fit the labels"
        assert offsets[0] == 0 and offsets[-1] == len(flat), "offsets do not fit the numbers"
        assert (np.diff(offsets) > 0).all(), "a document without tokens"
        assert low <= flat.min() and flat.max() <= high, "a number out of range"
        assert labels.min() >= 0 and labels.max() < self.num_classes, "a label out of range"
        if split not in self._splits:
            assert split in SPLITS
            self._splits[split] = _SplitWriter(self.folder, split)
        self._splits[split].add_rows(flat.astype(self.dtype, copy=False), offsets, labels, self.documents)

    def close(self) -> None:
        """Close the files of a build that is given up."""
        for writer in self._splits.values():
            for file in writer.files.values():
                with contextlib.suppress(OSError):  # a full disk cannot take the last buffer either
                    file.handle.close()

    def finish(self, *, vocabulary: list[str], **fields: Any) -> dict[str, Any]:
        """Flush everything to the disk and write the manifest, which it returns."""
        empty = [split for split in SPLITS if split not in self._splits]
        if empty:
            raise UserError(
                f"the source has no rows for {', '.join(empty)}; each of {', '.join(SPLITS)} needs some"
            )
        splits = {split: self._splits[split] for split in SPLITS}
        files = {file.name: file.finish() for writer in splits.values() for file in writer.files.values()}
        manifest = {
            "format_version": FORMAT_VERSION,
            **fields,
            **self._description,
            "input": self.stored,
            "documents": self.documents,
            "num_classes": self.num_classes,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "vocabulary": vocabulary,
            "vocabulary_sha256": vocabulary_hash(vocabulary),
            "splits": {split: writer.summary(self.num_classes) for split, writer in splits.items()},
            "duplicates": duplicates({split: writer.digests for split, writer in splits.items()}),
            "files": files,
            "data_hash": data_hash(files, vocabulary),
            "written_by": f"lra {lra.__version__}",
        }
        manifest["manifest_sha256"] = manifest_hash(manifest)
        with open(self.folder / "manifest.json", "w") as handle:
            json.dump(manifest, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        sync_folder(self.folder)
        return manifest


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self.name, self.size, self._sha256 = path.name, 0, hashlib.sha256()
        self.handle = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  it stays open for the whole build

    def write(self, numbers: np.ndarray) -> None:
        data = np.ascontiguousarray(numbers).data.cast("B")
        self._sha256.update(data)
        self.handle.write(data)
        self.size += len(data)

    def finish(self) -> dict[str, Any]:
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()
        return {"size": self.size, "sha256": self._sha256.hexdigest()}


class _SplitWriter:
    """The three files of one split, and what the manifest says about it."""

    def __init__(self, folder: Path, split: str) -> None:
        self.files = {part: _HashedFile(folder / file_name(split, part)) for part in PARTS}
        self.files["offsets"].write(np.zeros(1, disk_dtype("offsets", "")))
        self.lengths: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.digests: list[bytes] = []
        self._end = 0

    def add_rows(self, flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray, documents: int) -> None:
        self.files["tokens"].write(flat)
        self.files["offsets"].write((offsets[1:] + self._end).astype("<i8"))
        self.files["labels"].write(labels.astype(np.uint8))
        self._end += len(flat)
        self.lengths.append(np.diff(offsets).astype(np.int64))
        self.labels.append(labels.astype(np.uint8))
        self.digests += row_digests(flat, offsets, documents)

    def summary(self, num_classes: int) -> dict[str, Any]:
        return summary(np.concatenate(self.lengths), np.concatenate(self.labels), num_classes)


def summary(lengths: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Rows, tokens, label counts and quantiles (in percent) of the document lengths of a split."""
    quantiles = np.quantile(lengths, np.array(QUANTILES) / 100, method="inverted_cdf")
    return {
        "rows": len(labels),
        "tokens": int(lengths.sum()),
        "label_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "length": {
            "mean": round(float(lengths.mean()), 3),
            "min": int(lengths.min()),
            **{str(q): int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
            "max": int(lengths.max()),
        },
    }


def duplicates(digests: dict[str, list[bytes]]) -> dict[str, Any]:
    """Rows of a split that repeat an earlier one of it, and distinct rows that two splits share."""
    distinct = {split: set(rows) for split, rows in digests.items()}
    return {
        "within": {split: len(rows) - len(distinct[split]) for split, rows in digests.items()},
        "between": {f"{a} {b}": len(distinct[a] & distinct[b]) for a, b in combinations(digests, 2)},
    }


def vocabulary_hash(vocabulary: list[str]) -> str:
    return hashlib.sha256(canonical(vocabulary)).hexdigest()


def data_hash(files: dict[str, dict[str, Any]], vocabulary: list[str]) -> str:
    """12 hex digits over the files' SHA-256 and the vocabulary: equal exactly when the stored bytes mean the
    same.
    """
    content = {name: entry["sha256"] for name, entry in files.items()}
    return hashlib.sha256(canonical([content, vocabulary])).hexdigest()[:12]


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything in the manifest but this hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_MANIFEST_KEYS = (
    *(
        "task",
        "variant",
        "variant_name",
        "data_origin",
        "source",
        "input",
        "documents",
        "num_classes",
        "dtype",
    ),
    *(
        "vocab_size",
        "vocabulary",
        "vocabulary_sha256",
        "splits",
        "duplicates",
        "files",
        "data_hash",
        "manifest_sha256",
    ),
)
