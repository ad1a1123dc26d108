"""What is written comes back, from any shape of task, and a damaged folder does not open."""

import json
import os
import time

import numpy as np
import pytest
from synthetic_tasks import SHAPES, Pairs, Pixels, Synthetic, Wide

from lra.data.prepare import prepare
from lra.data.store import data_hash, data_root, open_store
from lra.data.writer import StoreWriter
from lra.errors import UserError
from lra.tasks.base import row_digests


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("cls", SHAPES)
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_rows_come_back_as_they_were_written(cls, name):
    task = cls()
    prepare(task, 50)
    split = open_store(task, 50).split(name)
    rows = task.rows_of(name, 50)
    assert len(split) == len(rows) == 30
    assert split.labels.tolist() == [label for _, label in rows]
    for index, (documents, _) in enumerate(rows):
        assert [document.tolist() for document in split.row(index)] == [d.tolist() for d in documents]


@pytest.mark.parametrize(("cls", "dtype"), [(Synthetic, np.uint8), (Wide, np.int16), (Pixels, np.uint8)])
def test_arrays_have_the_types_that_batches_expect(cls, dtype):
    split = prepare(cls(), 50).split("train")
    assert isinstance(split.tokens, np.memmap) and split.tokens.dtype == dtype
    assert split.offsets.dtype == np.int64 and split.labels.dtype == np.int64
    assert split.offsets[0] == 0 and split.offsets[-1] == len(split.tokens)


def test_the_documents_of_a_row_lie_side_by_side():
    split = prepare(Pairs(), 50).split("train")
    assert len(split.offsets) == 2 * len(split) + 1 and len(split.lengths) == 60
    left, right = split.row(4)
    assert left.tolist() == split.tokens[split.offsets[8] : split.offsets[9]].tolist()
    assert right.tolist() == split.tokens[split.offsets[9] : split.offsets[10]].tolist()


def test_bulk_rows_and_single_rows_give_the_same_files(root):
    rows = Synthetic().rows_of("train", 40)
    manifests = []
    for bulk in (True, False):
        writer = StoreWriter(root / str(bulk), Synthetic(), 40)
        for split in ("train", "val", "test"):
            if bulk:
                flat = np.concatenate([documents[0] for documents, _ in rows])
                offsets = np.cumsum([0] + [len(documents[0]) for documents, _ in rows])
                writer.add_rows(split, flat, offsets, np.array([label for _, label in rows]))
            else:
                for documents, label in rows:
                    writer.add(split, documents, label)
        manifests.append(writer.finish())
    assert manifests[0] == manifests[1]


def test_the_manifest_says_what_the_data_are():
    manifest = prepare(Pixels(data_seed=4), 64).manifest
    assert manifest["variant"] == {"task": "pixels", "length": 64, "rows": 30, "data_seed": 4}
    assert manifest["input"] == "pixels" and manifest["documents"] == 1 and manifest["vocabulary"] == []
    assert manifest["data_origin"] == "regenerated" and manifest["source"] == "made here"
    train = manifest["splits"]["train"]
    assert train["rows"] == sum(train["label_counts"]) == 30 and train["tokens"] == 30 * 64
    assert train["length"]["min"] == train["length"]["50"] == train["length"]["max"] == 64
    assert manifest["files"]["train.tokens.bin"]["size"] == 30 * 64
    assert len(manifest["data_hash"]) == 12


def test_the_data_hash_depends_on_the_bytes_and_the_vocabulary_alone():
    files = {"a": {"sha256": "1", "size": 1}, "b": {"sha256": "2", "size": 2}}
    same = {"b": {"sha256": "2", "size": 2}, "a": {"sha256": "1", "size": 1}}
    assert data_hash(files, ["x"]) == data_hash(same, ["x"])
    assert data_hash(files, ["x"]) != data_hash(files, ["y"])
    assert data_hash(files, ["x"]) != data_hash({**files, "a": {"sha256": "3", "size": 1}}, ["x"])


def test_rows_of_two_documents_differ_also_where_only_their_boundary_does():
    flat = np.frombuffer(b"abcabcabc", np.uint8)
    first, second, third = row_digests(flat, np.array([0, 2, 3, 4, 6, 8, 9]), 2)  # ab c, a bc, ab c
    assert first != second and first == third


def test_nothing_written_to_a_split_reaches_the_disk():
    store = prepare(Synthetic(), 50)
    before = (store.path / "train.tokens.bin").read_bytes()
    store.split("train").tokens[:] = 7
    assert (store.path / "train.tokens.bin").read_bytes() == before


def test_the_data_root_is_the_environments_else_a_folder_here(monkeypatch, tmp_path):
    assert data_root() == tmp_path
    monkeypatch.delenv("LRA_DATA")
    assert str(data_root()) == "data"


def test_data_that_are_not_there_come_with_the_command_that_makes_them():
    with pytest.raises(UserError, match="run: lra data prepare synthetic length=9 task.rows=5"):
        open_store(Synthetic(rows=5), 9)


@pytest.mark.parametrize("name", ["train.tokens.bin", "val.offsets.bin", "test.labels.bin"])
@pytest.mark.parametrize("change", ["truncated", "missing"])
def test_a_truncated_or_missing_file_is_named_with_its_remedy(name, change):
    path = prepare(Synthetic(), 50).path / name
    data = path.read_bytes()
    path.unlink() if change == "missing" else path.write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=f"{name} (is missing|has).*lra data prepare synthetic length=50 --force"
    ):
        open_store(Synthetic(), 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: json.dumps({**m, "format_version": 99}), "store format 99, this program reads 1"),
        (lambda m: json.dumps([]), "store format None"),
        (lambda m: json.dumps(m)[:100], "is not JSON"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "splits"}), "lacks splits"),
        (lambda m: json.dumps({**m, "files": {}}), "does not list train.tokens.bin"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_with_the_reason(change, message):
    path = prepare(Synthetic(), 50).path / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(UserError, match=f"{message}.*--force"):
        open_store(Synthetic(), 50)


def test_an_unknown_split_is_refused_with_the_splits_there_are():
    with pytest.raises(UserError, match="unknown split 'eval'.*test, train, val"):
        prepare(Synthetic(), 50).split("eval")


def enlarge(store, rows):
    """Make the files as large as `rows` rows of one length ask for; what they hold is a hole of zeros."""
    manifest, length = store.manifest, store.manifest["splits"]["train"]["length"]["max"]
    for split, count in rows.items():
        offsets = np.arange(count + 1, dtype="<i8") * length
        offsets.tofile(store.path / f"{split}.offsets.bin")
        for part, size in (("tokens", count * length), ("labels", count), ("offsets", offsets.nbytes)):
            os.truncate(store.path / f"{split}.{part}.bin", size)
            manifest["files"][f"{split}.{part}.bin"]["size"] = size
    (store.path / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_the_benchmarks_largest_size_opens_in_less_than_a_second():
    task, rows = Pixels(rows=3), {"train": 160_000, "val": 20_000, "test": 20_000}
    enlarge(prepare(task, 16_384), rows)
    started = time.perf_counter()
    store = open_store(task, 16_384)
    assert {name: len(store.split(name)) for name in rows} == rows
    assert store.split("train").row(159_999)[0].shape == (16_384,)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("length", [1024, 16_384, 65_536])
def test_images_of_every_size_of_the_benchmark_fit(length):
    split = prepare(Pixels(rows=3), length).split("train")
    assert split.lengths.tolist() == [length] * 3 and split.tokens.min() == 0 and split.tokens.max() == 255


@pytest.mark.parametrize(
    "row",
    [([np.array([0, 1], np.uint8)], 0), ([np.array([20], np.uint8)], 0), ([np.array([1], np.uint8)], 3)],
)
def test_a_task_that_writes_padding_or_unknown_ids_or_labels_fails_at_once(row, root):
    writer = StoreWriter(root / "x", Synthetic(), 40)
    with pytest.raises(AssertionError):
        writer.add("train", *row)


def test_a_source_without_a_split_is_refused(root):
    writer = StoreWriter(root / "x", Synthetic(), 40)
    writer.add("train", [np.array([1], np.uint8)], 0)
    with pytest.raises(UserError, match="no rows for val, test"):
        writer.finish()
    writer.close()
