"""Every way to damage a data set is found and named."""

import json

import numpy as np
import pytest
from synthetic_tasks import SHAPES, Synthetic

from lra.data.prepare import prepare
from lra.data.store import manifest_hash
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks.listops import ListOps

LISTOPS = ListOps(num_train=60, num_val=10, num_test=10)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path))
    return tmp_path


def faults(task, length):
    return {finding.what: finding.detail for finding in verify(task, length) if not finding.ok}


def flip(path, position, value=None):
    data = bytearray(path.read_bytes())
    data[position] = data[position] ^ 1 if value is None else value
    path.write_bytes(data)


def edit(path, reseal=False, **changes):
    """Change manifest fields; `reseal` also mends the manifest's own hash, as a careful forger would."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    if reseal:
        manifest["manifest_sha256"] = manifest_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("task", [*(cls() for cls in SHAPES), LISTOPS], ids=lambda task: task.name)
def test_an_untouched_data_set_has_no_fault(task):
    prepare(task, 50)
    assert faults(task, 50) == {}


@pytest.mark.parametrize("part", ["tokens", "offsets", "labels"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_flipped_bit_is_found_in_its_file(split, part):
    path = prepare(Synthetic(), 50).path
    flip(path / f"{split}.{part}.bin", 8)
    found = faults(Synthetic(), 50)
    assert "its bytes changed" in found[f"file {split}.{part}.bin"]
    assert "data hash" in found


def test_a_truncated_file_is_found():
    path = prepare(Synthetic(), 50).path
    file = path / "val.tokens.bin"
    file.write_bytes(file.read_bytes()[:-1])
    found = faults(Synthetic(), 50)
    assert "bytes, not" in found["file val.tokens.bin"] and "offsets run" in found["val rows"]
    assert "not checked: val" in found["disjoint splits"]


def test_a_missing_split_is_found():
    path = prepare(Synthetic(), 50).path
    for part in ("tokens", "offsets", "labels"):
        (path / f"test.{part}.bin").unlink()
    found = faults(Synthetic(), 50)
    assert (
        found["file test.tokens.bin"] == found["file test.labels.bin"] == "missing" and "test rows" in found
    )


def test_an_empty_file_is_found():
    path = prepare(Synthetic(), 50).path
    (path / "train.labels.bin").write_bytes(b"")
    assert {"file train.labels.bin", "train rows"} <= faults(Synthetic(), 50).keys()


@pytest.mark.parametrize("reseal", [False, True])
def test_a_changed_vocabulary_is_found(reseal):
    store = prepare(Synthetic(), 50)
    edit(store.path, reseal, vocabulary=[*store.vocab[:4], "other", *store.vocab[5:]])
    found = faults(Synthetic(), 50)
    assert "4: 'other', not 'w4'" in found["vocabulary"] and "data hash" in found
    assert ("manifest" in found) is not reseal


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data_origin": "original"}, set()),
        ({"data_hash": "0" * 12}, {"data hash"}),
        ({"variant": {"task": "other"}}, {"variant"}),
        ({"variant_name": "listops-2000"}, {"variant name"}),
        ({"num_classes": 4}, {"kind of numbers"}),
        ({"documents": 2}, {"kind of numbers"}),
        ({"dtype": "nonsense"}, {"kind of numbers"}),
        ({"splits": {}}, {"train rows", "train label counts", "train lengths", "train tokens", "val rows"}),
        ({"duplicates": {"within": {}, "between": {}}}, {"disjoint splits"}),
        ({"files": {}}, {"file train.tokens.bin"}),
    ],
)
def test_an_edited_manifest_is_found_and_what_is_wrong_in_it_is_named(changes, named):
    edit(prepare(Synthetic(), 50).path, **changes)
    found = faults(Synthetic(), 50)
    assert "changed since it was written" in found["manifest"]
    assert named <= found.keys()
    edit(prepare(Synthetic(), 50, force=True).path, reseal=True, **changes)
    assert named <= faults(Synthetic(), 50).keys()


def test_a_manifest_that_is_no_json_is_found():
    path = prepare(Synthetic(), 50).path
    (path / "manifest.json").write_text("{")
    assert "is not JSON" in faults(Synthetic(), 50)["manifest"]


def test_offsets_that_fall_are_found():
    path = prepare(Synthetic(), 50).path / "train.offsets.bin"
    offsets = np.fromfile(path, "<i8")
    offsets[3] = offsets[5]
    offsets.tofile(path)
    assert "offsets do not rise after document 3" in faults(Synthetic(), 50)["train rows"]


@pytest.mark.parametrize(("value", "ok"), [(0, False), (20, False), (19, True)])
def test_ids_out_of_range_are_found(value, ok):
    path = prepare(Synthetic(), 50).path
    flip(path / "train.tokens.bin", 3, value)
    assert ("train ids" not in faults(Synthetic(), 50)) is ok


def test_a_label_out_of_range_is_found():
    path = prepare(Synthetic(), 50).path
    flip(path / "val.labels.bin", 0, 9)
    found = faults(Synthetic(), 50)
    assert "0 to 9 of 3 classes" in found["val labels"] and "val label counts" in found


def test_a_row_in_two_splits_is_a_fault_unless_the_source_repeats_itself(monkeypatch):
    rows_of = Synthetic.rows_of
    monkeypatch.setattr(Synthetic, "rows_of", lambda task, split, length: rows_of(task, "train", length))
    prepare(Synthetic(), 50)
    assert "train and test share 30" in faults(Synthetic(), 50)["disjoint splits"]
    monkeypatch.setattr(Synthetic, "disjoint", False)
    (finding,) = [f for f in verify(Synthetic(), 50) if f.what == "disjoint splits"]
    assert finding.ok and "train and test share 30" in finding.detail


def test_a_wrong_value_of_an_expression_is_found_even_if_every_hash_was_mended():
    store = prepare(LISTOPS, 50)
    labels = store.split("test").labels
    flip(store.path / "test.labels.bin", 7, (labels[7] + 1) % 10)
    found = faults(LISTOPS, 50)
    assert f"first in row 7: label {(labels[7] + 1) % 10}, value {labels[7]}" in found["test values"]


def test_rows_outside_the_length_bounds_are_found(monkeypatch):
    store = prepare(ListOps(num_train=60, num_val=10, num_test=10), 50)
    monkeypatch.setattr(ListOps, "folder_name", lambda task, length: store.path.name)
    found = faults(LISTOPS, 40)
    assert "11 to 39" in found["train length bounds"] and "variant" in found


def test_data_that_are_not_there_are_not_a_finding():
    with pytest.raises(UserError, match="run: lra data prepare synthetic"):
        verify(Synthetic(), 50)
