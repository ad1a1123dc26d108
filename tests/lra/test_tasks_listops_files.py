"""LRA's own ListOps files as a source: read exactly, refused with the line of any fault."""

import tarfile
import zipfile

import numpy as np
import pytest

from lra.data.prepare import prepare
from lra.data.store import store_path
from lra.errors import UserError
from lra.tasks import get
from lra.tasks import listops_generator as generator
from lra.tasks.listops import SYMBOLS, ListOps

SMALL = {"num_train": 300, "num_val": 40, "num_test": 40}
DIGITS = "0123456789"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path))
    return tmp_path


def write_tables(folder, rows, newline="\r\n", quote=""):
    """LRA's files, from (symbols, label) of each split."""

    def source(symbols):
        def node(position):
            if symbols[position] in DIGITS:
                return symbols[position], position + 1
            text, position = symbols[position], position + 1
            while symbols[position] != "]":
                argument, position = node(position)
                text = f"( {text} {argument} )"
            return f"( {text} ] )", position + 1

        return node(0)[0]

    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in rows.items():
        lines = [f"{quote}{source(symbols)}{quote}\t{label}" for symbols, label in examples]
        (folder / f"basic_{split}.tsv").write_bytes(newline.join(["Source\tTarget", *lines, ""]).encode())


def sample():
    """90 expressions of 16 to 59 symbols with their values."""
    flat, offsets, labels = generator.draw_block(np.uint64(0), np.uint64(0), 6000, 16, 59, 10, 10)
    rows = np.split(flat, offsets[1:-1])
    examples = [([SYMBOLS[i - 1] for i in row], int(label)) for row, label in zip(rows, labels, strict=True)]
    return {"train": examples[:60], "val": examples[60:75], "test": examples[75:90]}


def stored_rows(store):
    return {
        split: [
            ([SYMBOLS[token - 1] for token in part.row(i)[0]], int(part.labels[i])) for i in range(len(part))
        ]
        for split in ("train", "val", "test")
        for part in [store.split(split)]
    }


@pytest.mark.parametrize(("newline", "quote"), [("\r\n", ""), ("\n", ""), ("\r\n", '"')])
def test_the_files_of_lra_are_read_row_by_row(tmp_path, newline, quote):
    rows = sample()
    write_tables(tmp_path / "tsv", rows, newline, quote)
    store = prepare(ListOps(source=str(tmp_path / "tsv")), 60)
    assert stored_rows(store) == rows


def test_generated_rows_written_as_lra_files_come_back_the_same(tmp_path):
    made = prepare(ListOps(**SMALL), 64)
    write_tables(tmp_path / "tsv" / "listops-1000", stored_rows(made))
    read = prepare(ListOps(source=str(tmp_path / "tsv")), 64)
    assert read.data_hash == made.data_hash and read.path != made.path


def write_archive(tmp_path, name):
    write_tables(tmp_path / "a" / "lra_release" / "listops-1000", sample())
    files = sorted((tmp_path / "a").rglob("*.tsv"))
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(tmp_path / "a"))
    else:
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for file in files:
                archive.add(file, file.relative_to(tmp_path / "a"))
    return tmp_path / name


@pytest.mark.parametrize("name", ["lra_release.gz", "listops.zip"])
def test_an_archive_is_read_like_its_folder(tmp_path, name):
    from_archive = prepare(ListOps(source=str(write_archive(tmp_path, name))), 60)
    assert stored_rows(from_archive) == sample()


def test_the_first_of_two_copies_in_an_archive_is_read(tmp_path):
    write_tables(tmp_path / "a", sample())
    other = {split: rows[::-1] for split, rows in sample().items()}
    write_tables(tmp_path / "b", other)
    with tarfile.open(tmp_path / "lra_release.gz", "w:gz") as archive:
        archive.add(tmp_path / "b", "lra_release/listops-1000")
        archive.add(tmp_path / "a", "lra_release/lra_release/listops-1000")
    assert stored_rows(prepare(ListOps(source=str(tmp_path / "lra_release.gz")), 60)) == other


def test_a_truncated_archive_is_named(tmp_path):
    path = write_archive(tmp_path, "lra_release.gz")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match="lra_release.gz cannot be read as an archive"):
        prepare(ListOps(source=str(path)), 60)


def test_an_archive_without_one_of_the_files_is_refused_with_its_name(tmp_path):
    path = write_archive(tmp_path, "listops.zip")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in whole.namelist():
            if "val" not in name:
                part.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="part.zip lacks basic_val.tsv. Name the folder"):
        prepare(ListOps(source=str(tmp_path / "part.zip")), 60)


def test_only_files_of_the_size_of_lra_count_as_original(tmp_path, monkeypatch):
    write_tables(tmp_path / "tsv", sample())
    task = ListOps(source=str(tmp_path / "tsv"))
    assert prepare(task, 2000).data_origin == "stand_in"
    monkeypatch.setattr("lra.tasks.listops_files.LRA_ROWS", (60, 15, 15))
    assert prepare(task, 2000, force=True).data_origin == "original"
    assert prepare(task, 60).data_origin == "stand_in"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.replace("Source\tTarget", "source,target"), "line 1: the header"),
        (lambda t: t.replace("[MED", "[MEAN"), r"unknown symbol '\[MEAN'"),
        (lambda t: t + "( ( ( [MAX 2 ) 9 ) ] )\t8\r\n", "line 62: the label is 8, but the value is 9"),
        (lambda t: t + "( ( [MAX 2 ) 9 )\t9\r\n", "line 62: .*not a well-formed"),
        (lambda t: t + "( [MAX 2 )\r\n", "line 62: 1 columns"),
        (lambda t: t + "5\tfive\r\n", "line 62: cannot be read"),
        (lambda t: t + "( [SM" + " 1 )" * 70 + " ] )\t0\r\n", "line 62: 72 symbols, more than length=60"),
    ],
)
def test_a_fault_in_a_file_is_named_with_its_line(tmp_path, spoil, message):
    write_tables(tmp_path / "tsv", sample())
    path = tmp_path / "tsv" / "basic_train.tsv"
    path.write_bytes(spoil(path.read_bytes().decode()).encode())
    task = ListOps(source=str(tmp_path / "tsv"))
    with pytest.raises(UserError, match=message):
        prepare(task, 60)
    assert not store_path(task, 60).exists()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("no archive")])
def test_a_source_without_the_files_is_refused_with_their_names(tmp_path, make):
    make(tmp_path / "source")
    with pytest.raises(UserError, match="basic_train.tsv, basic_val.tsv"):
        prepare(ListOps(source=str(tmp_path / "source")), 2000)


def test_a_setting_of_the_generator_is_refused_where_files_are_read():
    with pytest.raises(UserError, match="task.num_train would change nothing"):
        get("listops")(source="somewhere", num_train=5).check()
