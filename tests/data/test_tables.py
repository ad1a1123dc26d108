"""Tables row by row: the same rows from every form, and messages that name the file and the fault."""

import csv

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet as writer

from lra.data.tables import column_names, csv_rows, hub, parquet, require_columns, table
from lra.errors import UserError

ROWS = [(f'a "{i}", b\n\tc', i) for i in range(2500)]


def as_parquet(path, rows=ROWS):
    columns = {"note": ["x"] * len(rows), "text": [text for text, _ in rows], "label": [n for _, n in rows]}
    writer.write_table(pa.table(columns), path, row_group_size=1000)
    return path


def as_csv(path, rows=ROWS, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as lines:
        out = csv.writer(lines, delimiter=delimiter)
        out.writerow(["note", "text", "label"])
        out.writerows(("x", text, label) for text, label in rows)
    return path


def test_every_form_gives_the_same_rows_in_the_asked_order(tmp_path):
    files = [
        as_parquet(tmp_path / "t.parquet"),
        as_csv(tmp_path / "t.csv"),
        as_csv(tmp_path / "t.TSV", delimiter="\t"),
        as_csv(tmp_path / "bom.csv", encoding="utf-8-sig"),
    ]
    for file in files:
        rows = [(int(label), text) for label, text in table(file, ("label", "text"))]
        assert rows == [(label, text) for text, label in ROWS]
        assert column_names(file) == ["note", "text", "label"]


def test_rows_come_before_the_whole_file_is_read(tmp_path):
    file = as_csv(tmp_path / "t.csv")
    with open(file, "ab") as lines:
        lines.write(b"x,\xff,1\n")
    rows = csv_rows(file, ("label",))
    assert next(rows) == ("0",)
    with pytest.raises(UserError, match="t.csv cannot be read as CSV in UTF-8"):
        list(rows)


def test_a_short_row_has_none_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,1\n\nb\n")
    assert list(table(tmp_path / "t.csv", ("text", "label"))) == [("a", "1"), ("b", None)]


def test_a_field_may_be_longer_than_the_csv_module_likes(tmp_path):
    (tmp_path / "t.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(next(table(tmp_path / "t.csv", ("text",)))[0]) == 200_000


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv"])
def test_a_missing_column_is_named_with_those_there_are(name, tmp_path):
    delimiter = "\t" if name.endswith("tsv") else ","
    file = tmp_path / name
    as_parquet(file) if name.endswith("parquet") else as_csv(file, delimiter=delimiter)
    with pytest.raises(UserError, match=rf"{name} has no column id, split; one file .*: note, text, label"):
        list(table(file, ("text", "id", "split")))


def test_the_hint_about_splits_is_only_given_where_it_helps():
    with pytest.raises(UserError) as caught:
        require_columns("t.csv", ("text",), [])
    assert str(caught.value) == "t.csv has no column text; it has: none"


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv"])
def test_a_broken_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 broken")
    for read in (column_names, lambda file: list(table(file, ("text",)))):
        with pytest.raises(UserError, match=f"{name} cannot be read as .*get it anew"):
            read(tmp_path / name)


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path):
    file = as_parquet(tmp_path / "t.parquet")
    data = bytearray(file.read_bytes())
    data[4:4000] = bytes(3996)
    file.write_bytes(data)
    with pytest.raises(UserError, match="t.parquet cannot be read as parquet"):
        list(parquet(file, ("text",)))


def test_an_empty_file_has_no_columns(tmp_path):
    (tmp_path / "t.csv").touch()
    assert column_names(tmp_path / "t.csv") == []
    with pytest.raises(UserError, match="has no column text; it has: none"):
        list(table(tmp_path / "t.csv", ("text",)))


def test_the_hub_is_asked_once_and_only_when_rows_are_wanted(monkeypatch):
    asked = []

    def load_dataset(name, streaming):
        asked.append((name, streaming))
        return {"train": [{"text": "a"}], "test": [{"text": "b"}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = hub("some/thing", wanted="Wanted: x")
    assert asked == []
    assert [*records("test"), *records("train")] == [{"text": "b"}, {"text": "a"}]
    assert asked == [("some/thing", False)]


def test_a_split_that_the_hub_has_not_is_named_with_those_it_has(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: {"train": []})
    with pytest.raises(UserError, match="'some/thing' has no split 'test'; it has: train"):
        list(hub("some/thing", wanted="Wanted: x")("test"))


@pytest.mark.parametrize("streaming", [False, True])
def test_without_the_hub_the_message_says_why_and_what_is_wanted(streaming, monkeypatch):
    def load_dataset(name, streaming):
        raise ConnectionError("no network\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    place = "its files cannot be read" if streaming else "it is not here"
    with pytest.raises(UserError, match=rf"'some/thing': {place}.* \(no network\)\. Wanted: x"):
        list(hub("some/thing", streaming=streaming, wanted="Wanted: x")("train"))
