"""An interrupted build goes on from its last checkpoint and ends with the bytes of an unbroken one."""

import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from synthetic_tasks import Pairs, Pixels, Synthetic

from lra.data.prepare import prepare
from lra.data.store import open_store, store_path
from lra.data.verify import verify
from lra.errors import UserError

LENGTH = 40


class _Long:
    """A build with a checkpoint every 10 rows that can be stopped before any row."""

    stop_at: ClassVar[int | None] = None
    error: ClassVar[BaseException] = KeyboardInterrupt()
    drawn: ClassVar[list[int]] = []

    def build(self, writer, *, length, workers=None, progress=None):
        rows = [(split, row) for split in ("train", "val", "test") for row in self.rows_of(split, length)]
        first = sum(writer.rows_done(split) for split in ("train", "val", "test"))
        for index in range(first, len(rows)):
            if index == type(self).stop_at:
                raise self.error
            split, (documents, label) = rows[index]
            writer.add(split, documents, label)
            self.drawn.append(index)
            if index % 10 == 9:
                writer.checkpoint()
        writer.describe(source="made here", data_origin="regenerated", generator={"version": 1}, notes=[])


@dataclass(frozen=True)
class LongTokens(_Long, Synthetic):
    name: str = "synthetic"


@dataclass(frozen=True)
class LongPairs(_Long, Pairs):
    name: str = "pairs"


@dataclass(frozen=True)
class LongPixels(_Long, Pixels):
    name: str = "pixels"


def interrupted(cls, monkeypatch, stop_at):
    """Stop a build before row `stop_at`; the folder that it leaves."""
    monkeypatch.setattr(cls, "stop_at", stop_at)
    with pytest.raises(KeyboardInterrupt):
        prepare(cls(), LENGTH)
    monkeypatch.setattr(cls, "stop_at", None)
    monkeypatch.setattr(cls, "drawn", [])
    path = store_path(cls(), LENGTH)
    return path.with_name(f".{path.name}.partial")


@pytest.mark.parametrize("plain, cls", [(Synthetic, LongTokens), (Pairs, LongPairs), (Pixels, LongPixels)])
@pytest.mark.parametrize("stop_at", [10, 37, 40, 64])
def test_an_interrupted_build_goes_on_and_gives_the_same_data(plain, cls, stop_at, monkeypatch, tmp_path):
    unbroken = prepare(plain(), LENGTH).manifest
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "second"))
    interrupted(cls, monkeypatch, stop_at)
    assert prepare(cls(), LENGTH).manifest == unbroken
    assert cls.drawn == list(range(stop_at // 10 * 10, 90))
    assert not (store_path(cls(), LENGTH) / "progress.json").exists()
    assert all(finding.ok for finding in verify(cls(), LENGTH))


def test_what_is_interrupted_does_not_look_finished(monkeypatch):
    partial = interrupted(LongPixels, monkeypatch, 37)
    assert partial.is_dir() and not (partial / "manifest.json").exists()
    with pytest.raises(UserError, match="are not in"):
        open_store(LongPixels(), LENGTH)


@pytest.mark.parametrize("name", ["train.tokens.bin", "train.labels.bin", "train.offsets.bin"])
@pytest.mark.parametrize("fault", ["flipped", "cut"])
def test_rows_that_changed_since_the_checkpoint_are_not_trusted(name, fault, monkeypatch, tmp_path):
    unbroken = prepare(Pixels(), LENGTH).data_hash
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "second"))
    path = interrupted(LongPixels, monkeypatch, 37) / name
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data if fault == "flipped" else data[:20])
    assert prepare(LongPixels(), LENGTH).data_hash == unbroken
    assert LongPixels.drawn == list(range(90))


def test_the_rest_of_another_variant_is_not_continued(monkeypatch):
    partial = interrupted(LongPixels, monkeypatch, 37)
    other = LongPixels(data_seed=1)
    partial.rename(partial.with_name(f".{store_path(other, LENGTH).name}.partial"))
    prepare(other, LENGTH)
    assert LongPixels.drawn == list(range(90))


def test_the_rest_of_another_source_is_not_continued(monkeypatch, tmp_path):
    interrupted(LongPixels, monkeypatch, 37)
    other = LongPixels(source=str(tmp_path))
    assert store_path(other, LENGTH) == store_path(LongPixels(), LENGTH)
    prepare(other, LENGTH)
    assert LongPixels.drawn == list(range(90))


def cut(data):
    return data[:-1]


def longer(data):
    return data + bytes(1)


@pytest.mark.parametrize(
    ("part", "change"), [("labels", cut), ("labels", longer), ("tokens", cut), ("tokens", longer)]
)
def test_files_of_a_checkpoint_that_do_not_fit_together_are_not_trusted(part, change, monkeypatch, tmp_path):
    unbroken = prepare(Pixels(), LENGTH).data_hash
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "second"))
    partial = interrupted(LongPixels, monkeypatch, 37)
    name, note = f"train.{part}.bin", json.loads((partial / "progress.json").read_text())
    data = change((partial / name).read_bytes()[: note["files"][name]["size"]])
    (partial / name).write_bytes(data)
    note["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (partial / "progress.json").write_text(json.dumps(note))
    assert prepare(LongPixels(), LENGTH).data_hash == unbroken
    assert LongPixels.drawn == list(range(90))


def test_a_fault_leaves_nothing_even_after_a_checkpoint(root, monkeypatch):
    monkeypatch.setattr(LongPixels, "stop_at", 37)
    monkeypatch.setattr(LongPixels, "error", RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        prepare(LongPixels(), LENGTH)
    assert [path.name for path in root.iterdir()] == [f".{store_path(LongPixels(), LENGTH).name}.lock"]


@dataclass(frozen=True)
class Found(Synthetic):
    """A vocabulary that the data decide, of `symbols` symbols."""

    name: str = "found"
    symbols: int = 300

    def vocabulary(self):
        return None

    def build(self, writer, *, length, workers=None, progress=None):
        writer.set_vocabulary(["<pad>", *(f"s{i}" for i in range(1, self.symbols))])
        for split in ("train", "val", "test"):
            writer.add(split, [np.arange(1, self.symbols)], 0)
        writer.describe(source="made here", data_origin="stand_in", generator=None, notes=[])


@pytest.mark.parametrize("symbols, dtype", [(256, np.uint8), (257, np.int16), (32_768, np.int16)])
def test_a_vocabulary_of_the_data_decides_how_ids_are_stored(symbols, dtype):
    store = prepare(Found(symbols=symbols), LENGTH)
    assert store.vocab_size == len(store.vocab) == symbols
    assert store.split("test").tokens.dtype == dtype
    assert store.split("test").tokens.tolist() == list(range(1, symbols))
    assert all(f.ok for f in verify(Found(symbols=symbols), LENGTH) if "disjoint" not in f.what)


def test_more_symbols_than_a_store_takes_are_refused():
    with pytest.raises(UserError, match="the vocabulary has 32,769 symbols.*task.min_freq"):
        prepare(Found(symbols=32_769), LENGTH)


def test_a_split_is_read_in_parts_that_cover_it(monkeypatch):
    split = prepare(Pairs(), LENGTH).split("train")
    monkeypatch.setattr("lra.data.store.CHUNK_BYTES", 200)
    parts = list(split.chunks())
    assert len(parts) > 5 and parts[0][0] == 0
    assert np.concatenate([part.tokens for _, part in parts]).tolist() == split.tokens.tolist()
    assert [label for _, part in parts for label in part.labels] == split.labels.tolist()
    for first, part in parts:
        assert [d.tolist() for d in part.row(0)] == [d.tolist() for d in split.row(first)]
