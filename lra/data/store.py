"""A data set on disk: flat files and a manifest, written by `lra.data.writer`, read through memory maps.

One folder per variant:
  manifest.json         what it is, where it came from, counts, hashes
  <split>.tokens.bin    all documents end to end: ids (0 never occurs) or raw pixels, uint8 or
                        little-endian int16
  <split>.offsets.bin   int64 [rows * documents + 1]: document j of row i starts at offsets[i * documents + j]
  <split>.labels.bin    uint8 [rows]
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lra.data import data_root
from lra.errors import UserError, unknown
from lra.tasks.base import SPLITS, Task, canonical

FORMAT_VERSION = 1
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
PARTS = {"tokens": None, "offsets": "<i8", "labels": "|u1"}
CHUNK_BYTES = 1 << 24
"""About how much of a split is read in one go, so that a large one never has to fit into memory."""


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

    def part(self, start: int, stop: int) -> "Split":
        """Rows start .. stop - 1 as a split of their own, in memory, with offsets from 0.

        They are read from the file, not through the memory map: pages of a map count as memory of this
        process for as long as the map lives.
        """
        offsets = np.array(self.offsets[start * self.documents : stop * self.documents + 1])
        first, last = int(offsets[0]), int(offsets[-1])
        if isinstance(self.tokens, np.memmap):
            position = self.tokens.offset + first * self.tokens.itemsize
            tokens = np.fromfile(self.tokens.filename, self.tokens.dtype, last - first, offset=position)
        else:
            tokens = self.tokens[first:last]
        return Split(self.name, tokens, offsets - first, self.labels[start:stop], self.documents)

    def chunks(self) -> Iterator[tuple[int, "Split"]]:
        """(first row, part) of one part after another, each of about CHUNK_BYTES."""
        ends = self.offsets[:: self.documents]
        start, numbers = 0, CHUNK_BYTES // self.tokens.itemsize
        while start < len(self):
            stop = int(np.searchsorted(ends, ends[start] + numbers, side="right")) - 1
            stop = min(max(stop, start + 1), len(self))
            yield start, self.part(start, stop)
            start = stop


class Store:
    """One variant on disk, opened without reading it: sizes are checked, hashes are not (`verify` does
    that).
    """

    def __init__(self, path: Path, remedy: str) -> None:
        """`remedy` is the command that builds this variant, for messages."""
        self.path, self.remedy, self._splits = path, remedy, {}
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
            split = Split(name, tokens, offsets, labels.astype(np.int64), self.manifest["documents"])
            try:
                check_split(split)
                if split.labels.max() >= self.manifest["num_classes"]:
                    raise ValueError(f"label {split.labels.max()} of {self.manifest['num_classes']} classes")
            except ValueError as error:
                command = self.remedy.replace("prepare", "verify", 1)
                raise UserError(f"{self.path}: {name} is damaged ({error}); for more: {command}") from error
            self._splits[name] = split
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
    entries = manifest["files"].values() if isinstance(manifest["files"], dict) else [None]
    whole = all(
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        for entry in entries
    )
    typed = all(isinstance(manifest[key], kind) for key, kind in _MANIFEST_TYPES.items())
    if not whole or not typed or not all(isinstance(symbol, str) for symbol in manifest["vocabulary"]):
        raise UserError(f"{path / 'manifest.json'} is damaged; build it again: {remedy} --force")
    return manifest


def check_split(split: Split) -> None:
    """Raises ValueError if the arrays of a split do not fit together; tokens are not read."""
    tokens, offsets, labels = split.tokens, split.offsets, split.labels
    if len(offsets) != len(labels) * split.documents + 1:
        raise ValueError(f"{len(offsets):,} offsets do not fit {len(labels):,} labels")
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(
            f"offsets run from {offsets[0]:,} to {offsets[-1]:,}, there are {len(tokens):,} tokens"
        )
    backwards = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if len(backwards):
        raise ValueError(f"offsets do not rise after document {backwards[0]:,}")


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


def smallest_dtype(vocab_size: int) -> str:
    """The name of the smallest type on disk that holds every id."""
    return "uint8" if vocab_size <= 256 else "int16"


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


_MANIFEST_TYPES = {
    "splits": dict,
    "duplicates": dict,
    "vocabulary": list,
    "vocab_size": int,
    "num_classes": int,
    "documents": int,
    "dtype": str,
    "data_origin": str,
    "variant_name": str,
}
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
