"""Writing a data set: rows stream into flat files that are hashed on the way, the manifest comes last.

A build that takes long leaves checkpoints: progress.json says how far the files are good, and the next build
of the same variant goes on from there.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lra
from lra.data.store import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    PARTS,
    Split,
    data_hash,
    disk_dtype,
    duplicates,
    file_name,
    manifest_hash,
    smallest_dtype,
    summary,
    sync_folder,
    vocabulary_hash,
)
from lra.errors import UserError
from lra.tasks.base import SPLITS, Task, canonical, row_digests

log = logging.getLogger(__name__)

PROGRESS = "progress.json"


class StoreWriter:
    """Streams rows into a folder and hashes them on the way; `finish` writes the manifest, last.

    The folder is not the final one: `lra.data.prepare` renames it when it is complete. If it holds a
    checkpoint of the same variant, the rows up to it are kept (`rows_done`); else it is made new.
    """

    def __init__(self, folder: Path, task: Task, length: int) -> None:
        self.folder, self.documents, self.stored = folder, task.documents, task.stored
        self.num_classes = task.num_classes
        self.vocabulary: list[str] | None = None
        self._key = _variant_key(task, length)
        self._description: dict[str, Any] = {}
        self._splits: dict[str, _SplitWriter] = {}
        vocabulary = task.vocabulary()
        self._dtype, self._vocab_size = task.dtype, task.vocab_size
        if vocabulary is not None:
            self.vocabulary = vocabulary
        if not self._resume():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    @property
    def dtype(self) -> np.dtype:
        return disk_dtype("tokens", self._dtype)

    def set_vocabulary(self, vocabulary: list[str]) -> None:
        """The vocabulary that the data decided, id 0 first; before the first row."""
        assert self.vocabulary is None and not self._splits, "the vocabulary is set already"
        limit = np.iinfo(np.int16).max + 1
        if len(vocabulary) > limit:
            raise UserError(
                f"the vocabulary has {len(vocabulary):,} symbols, a store takes {limit:,}; "
                "raise task.min_freq"
            )
        self.vocabulary, self._vocab_size = vocabulary, len(vocabulary)
        self._dtype = smallest_dtype(len(vocabulary))

    def describe(self, **fields: Any) -> None:
        """Manifest fields that only the build knows: source, data_origin, generator, notes."""
        self._description |= fields

    def rows_done(self, split: str) -> int:
        """Rows of this split that are there, written by this build or by an interrupted earlier one."""
        return self._splits[split].rows if split in self._splits else 0

    def add(self, split: str, documents: Sequence[np.ndarray], label: int) -> None:
        """One row."""
        offsets = np.cumsum([0] + [len(document) for document in documents])
        flat = documents[0] if len(documents) == 1 else np.concatenate(documents)
        self.add_rows(split, flat, offsets, np.array([label]))

    def add_rows(self, split: str, flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> None:
        """Many rows: flat numbers, offsets [rows * documents + 1] that start at 0, labels [rows]."""
        if len(labels) == 0:
            return
        assert self.vocabulary is not None, "rows before the vocabulary"
        low = 0 if self.stored == "pixels" else 1
        high = 255 if self.stored == "pixels" else self._vocab_size - 1
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

    def checkpoint(self) -> None:
        """Put every row so far onto the disk, and note that it is there."""
        files = {
            file.name: file.checkpoint() for split in self._splits.values() for file in split.files.values()
        }
        note = {"key": self._key, "files": files}
        partial = self.folder / f"{PROGRESS}.partial"
        with open(partial, "w") as handle:
            json.dump(note, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, self.folder / PROGRESS)
        sync_folder(self.folder)

    @property
    def resumable(self) -> bool:
        """Whether a later build could go on from here."""
        return (self.folder / PROGRESS).is_file()

    def _resume(self) -> bool:
        """Take over what the last checkpoint in the folder vouches for; False if there is nothing to take."""
        try:
            note = json.loads((self.folder / PROGRESS).read_text())
            if note["key"] != self._key or self.vocabulary is None:
                return False
            for split in SPLITS:
                if file_name(split, "labels") in note["files"]:
                    self._splits[split] = _SplitWriter(self.folder, split, note["files"])
                    self._splits[split].take_over(self.dtype, self.documents)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "%s: the interrupted build cannot be continued (%s); it starts anew", self.folder, error
            )
            self.close()
            self._splits = {}
            return False
        rows = sum(split.rows for split in self._splits.values())
        log.warning("%s: going on with the %s rows of an interrupted build", self.folder.name, f"{rows:,}")
        return True

    def close(self) -> None:
        """Close the files of a build that is given up."""
        for writer in self._splits.values():
            for file in writer.files.values():
                with contextlib.suppress(OSError):  # a full disk cannot take the last buffer either
                    file.handle.close()

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Flush everything to the disk and write the manifest, which it returns."""
        empty = [split for split in SPLITS if split not in self._splits]
        if empty:
            raise UserError(
                f"the source has no rows for {', '.join(empty)}; each of {', '.join(SPLITS)} needs some. "
                "Check that it is whole"
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
            "vocab_size": self._vocab_size,
            "vocabulary": self.vocabulary,
            "vocabulary_sha256": vocabulary_hash(self.vocabulary),
            "splits": {split: writer.summary(self.num_classes) for split, writer in splits.items()},
            "duplicates": duplicates({split: writer.digests for split, writer in splits.items()}),
            "files": files,
            "data_hash": data_hash(files, self.vocabulary),
            "written_by": f"lra {lra.__version__}",
        }
        manifest["manifest_sha256"] = manifest_hash(manifest)
        with open(self.folder / "manifest.json", "w") as handle:
            json.dump(manifest, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        (self.folder / PROGRESS).unlink(missing_ok=True)
        sync_folder(self.folder)
        return manifest


def _variant_key(task: Task, length: int) -> str:
    """What must be equal for two builds to continue each other."""
    return hashlib.sha256(canonical([FORMAT_VERSION, task.variant(length), task.source_name()])).hexdigest()


class _HashedFile:
    def __init__(self, path: Path, note: dict[str, Any] | None = None) -> None:
        """A new file, or with a checkpoint's note the one that is there, cut to what the note vouches for;
        ValueError if its bytes are not those.
        """
        self.name, self.size, self._sha256 = path.name, 0, hashlib.sha256()
        if note is None:
            self.handle = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  it stays open for the whole build
            return
        self.handle = open(path, "r+b", buffering=1 << 20)  # noqa: SIM115
        while self.size < note["size"]:
            data = self.handle.read(min(CHUNK_BYTES, note["size"] - self.size))
            if not data:
                raise ValueError(f"{path.name} has {self.size:,} bytes, not {note['size']:,}")
            self._sha256.update(data)
            self.size += len(data)
        if self._sha256.hexdigest() != note["sha256"]:
            raise ValueError(f"the bytes of {path.name} are not those of its checkpoint")
        self.handle.truncate(self.size)
        self.handle.seek(self.size)

    def write(self, numbers: np.ndarray) -> None:
        data = np.ascontiguousarray(numbers).data.cast("B")
        self._sha256.update(data)
        self.handle.write(data)
        self.size += len(data)

    def checkpoint(self) -> dict[str, Any]:
        """Its size and hash, once all of it is on the disk."""
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return {"size": self.size, "sha256": self._sha256.hexdigest()}

    def finish(self) -> dict[str, Any]:
        """As `checkpoint`, and the file is closed."""
        entry = self.checkpoint()
        self.handle.close()
        return entry


class _SplitWriter:
    """The three files of one split, and what the manifest says about it."""

    def __init__(self, folder: Path, split: str, notes: dict[str, Any] | None = None) -> None:
        self.folder, self.split = folder, split
        self.files = {}
        for part in PARTS:
            name = file_name(split, part)
            self.files[part] = _HashedFile(folder / name, None if notes is None else notes[name])
        if notes is None:
            self.files["offsets"].write(np.zeros(1, disk_dtype("offsets", "")))
        self.rows = 0
        self.lengths: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.digests: list[bytes] = []
        self._end = 0

    def take_over(self, dtype: np.dtype, documents: int) -> None:
        """Count the rows that the files hold already."""
        tokens, offsets, labels = (
            np.memmap(self.folder / file_name(self.split, part), disk_dtype(part, dtype.name), mode="r")
            for part in PARTS
        )
        if len(offsets) != len(labels) * documents + 1 or offsets[-1] != len(tokens):
            raise ValueError(f"the files of {self.split} do not fit together")
        there = Split(self.split, tokens, offsets, labels, documents)
        for _, part in there.chunks():
            self._count(part.tokens, part.offsets, part.labels, documents)

    def add_rows(self, flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray, documents: int) -> None:
        self.files["tokens"].write(flat)
        self.files["offsets"].write((offsets[1:] + self._end).astype("<i8"))
        self.files["labels"].write(labels.astype(np.uint8))
        self._count(flat, offsets, labels, documents)

    def _count(self, flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray, documents: int) -> None:
        self.rows += len(labels)
        self._end += len(flat)
        self.lengths.append(np.diff(offsets).astype(np.int64))
        self.labels.append(labels.astype(np.uint8))
        self.digests += row_digests(flat, offsets, documents)

    def summary(self, num_classes: int) -> dict[str, Any]:
        return summary(np.concatenate(self.lengths), np.concatenate(self.labels), num_classes)
