"""Pairs of papers from every form of source, the printed form of bytes, and a message for each fault."""

import os

import pytest
import retrieval_samples as samples
from hypothesis import given
from hypothesis import strategies as st
from retrieval_samples import (
    LRA_FORMS,
    LRA_NAMES,
    PAIR_FORMS,
    PAIRS,
    TEXTS,
    as_lra,
    as_pairs,
    as_tar,
    as_three_lists,
    as_two_tables,
    as_two_tables_with_kinds,
    as_zip,
    lra_table,
    write_table,
)

from lra.data import archives
from lra.errors import UserError
from lra.tasks import retrieval_files as module
from lra.tasks.base import SPLITS
from lra.tasks.retrieval_files import decoded, opened


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def whole(where, document):
    return document


def rows(source, text="literal", splits=SPLITS, cut=whole):
    return [
        (row.split, *row.documents, row.label) for row in opened(str(source)).read(tuple(splits), text, cut)
    ]


def expected(text="literal"):
    form = (lambda raw: repr(raw).encode()) if text == "literal" else bytes
    return sorted(
        (split, form(TEXTS[a]), form(TEXTS[b]), label)
        for split, pairs in PAIRS.items()
        for a, b, label in pairs
    )


@pytest.mark.parametrize("text", ["literal", "decoded"])
@pytest.mark.parametrize("form", LRA_FORMS + PAIR_FORMS)
def test_every_form_of_source_gives_the_same_rows(form, text, tmp_path):
    source = form(tmp_path / "source")
    assert sorted(rows(source, text)) == expected(text)
    assert opened(str(source)).is_lra == (form in LRA_FORMS)
    assert opened(str(source)).name == str(source.resolve())


@pytest.mark.parametrize("form", [as_lra, as_tar, as_pairs, as_three_lists])
def test_one_split_can_be_read_alone_and_keeps_its_order(form, tmp_path):
    source = form(tmp_path / "source")
    alone = rows(source, splits=("train",))
    assert alone == [row for row in rows(source) if row[0] == "train"] and len(alone) == 3


@pytest.mark.parametrize("inside", ["tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"])
def test_the_tables_are_found_in_the_folders_of_the_release(inside, tmp_path):
    as_lra(tmp_path / "source" / inside)
    assert sorted(rows(tmp_path / "source")) == expected()


def test_carriage_returns_at_the_end_of_lines_are_no_text(tmp_path):
    assert sorted(rows(as_lra(tmp_path / "source", end="\r\n"))) == expected()


def test_quotes_have_no_meaning_in_lras_tables(tmp_path):
    source = as_lra(tmp_path / "source")
    line = b'1\tA\tB\t"b\'unbalanced\t""b\'x\'"\n'
    (source / "new_aan_pairs.test.tsv").write_bytes(line + lra_table("test"))
    found = rows(source, splits=("test",))
    assert found[0] == ("test", b"\"b'unbalanced", b'""b\'x\'"', 1) and len(found) == 3


@pytest.mark.parametrize(("label", "value"), [("0", 0), ("1", 1), ("0.0", 0), ("1.0", 1)])
def test_labels_may_be_whole_numbers_or_floats(label, value, tmp_path):
    source = as_lra(tmp_path / "source")
    (source / "new_aan_pairs.eval.tsv").write_text(f"{label}\ta\tb\tb'x'\tb'y'\n")
    assert rows(source, splits=("val",)) == [("val", b"b'x'", b"b'y'", value)]


def test_the_cut_is_asked_for_each_text_once_beside_a_list_of_pairs(tmp_path):
    seen = []

    def cut(where, document):
        seen.append(document)
        return document[:4]

    found = rows(as_pairs(tmp_path / "source"), "decoded", cut=cut)
    assert sorted(seen) == sorted(TEXTS.values())
    assert {row[1] for row in found} | {row[2] for row in found} == {t[:4] for t in TEXTS.values()}


@given(st.binary(max_size=300))
def test_decoding_undoes_the_printed_form_of_any_bytes(raw):
    assert decoded("here", repr(raw).encode()) == raw


@pytest.mark.parametrize(
    ("field", "raw"),
    [
        (rb"b'\xe2\x80\x94'", b"\xe2\x80\x94"),
        (rb"b'a\nb\tc\rd'", b"a\nb\tc\rd"),
        (rb"b'\\n'", b"\\n"),
        (rb"b'\'\"'", b"'\""),
        (rb"""b"it's" """.strip(), b"it's"),
        (b"b''", b""),
    ],
)
def test_escapes_are_decoded(field, raw):
    assert decoded("here", field) == raw


@pytest.mark.parametrize(
    "field",
    [
        b"",
        b"plain text",
        b"b'open",
        b"b'a' b'b'",
        b"b'a'+b'b'",
        b"b'it's'",
        b"b'\"",
        rb"b'\q'",
        rb"b'\x4'",
        rb"b'\u0041'",
        rb"b'\101'",
        rb"b'end\'",
        b"b'\xe2'",
        b"b'a\x00'",
        b"'text'",
        b"rb'a'",
        b"b'a'\n",
        b"__import__('os')",
    ],
)
def test_what_is_not_the_printed_form_of_bytes_is_refused(field):
    with pytest.raises(UserError, match="table line 3, text1 is not the printed form.*task.text=literal"):
        decoded("table line 3, text1", field)


def test_a_long_field_that_is_no_literal_is_refused_quickly():
    with pytest.raises(UserError):
        decoded("here", b"b'" + rb"a\n" * 200_000)


LINE = b"1.0\ta\tb\tb'x'\tb'y'\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + b"1.0\ta\tb\tb'x'\n", "new_aan_pairs.train.tsv line 2: 4 columns, not 5"),
        (LINE + b"\n", "line 2: 1 columns, not 5"),
        (LINE + LINE.replace(b"\n", b"\tmore\n"), "line 2: 6 columns"),
        (b"label\tid1\tid2\ttext1\ttext2\n", "line 1: label 'label' is not allowed; labels are 0 and 1"),
        (b"2.0\ta\tb\tb'x'\tb'y'\n", "line 1: label '2.0' is not allowed"),
        (b"\xff\ta\tb\tb'x'\tb'y'\n", "line 1: label .* is not allowed"),
        (LINE * 2 + b"0.0\ta\tb\t\tb'y'\n", "line 3, text1 is empty"),
        (LINE * 2 + b"0.0\ta\tb\tb'x'\t\r\n", "line 3, text2 is empty"),
    ],
)
def test_a_faulty_line_is_named(content, message, tmp_path):
    source = as_lra(tmp_path / "source")
    (source / "new_aan_pairs.train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows(source)


@pytest.mark.parametrize(
    ("field", "message"),
    [(b"no literal", "line 1, text2 is not the printed"), (b"b''", "line 1, text2 is empty")],
)
def test_a_text_that_cannot_be_decoded_is_named_and_is_kept_under_literal(field, message, tmp_path):
    source = as_lra(tmp_path / "source")
    (source / "new_aan_pairs.eval.tsv").write_bytes(b"0.0\ta\tb\tb'x'\t" + field + b"\n")
    with pytest.raises(UserError, match=message):
        rows(source, "decoded")
    assert rows(source, splits=("val",)) == [("val", b"b'x'", field, 0)]


@pytest.mark.parametrize("form", [as_lra, as_zip])
def test_a_line_without_end_is_not_read_into_memory(form, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_LINE", 100)
    monkeypatch.setitem(TEXTS, "X", b"x" * 10_000)
    with pytest.raises(UserError, match="new_aan_pairs.train.tsv line 3 has more than 100 bytes"):
        rows(form(tmp_path / "source"))


@pytest.mark.parametrize("form", [as_tar, as_zip])
def test_of_a_line_without_end_in_an_archive_no_more_than_the_limit_is_held(form, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_LINE", 100)
    monkeypatch.setattr(archives, "_PIECE", 50)
    monkeypatch.setitem(TEXTS, "P05-1", b"x" * 10_000)
    held, pieces = [], module.pieces

    def counted(*arguments, **limits):
        for name, piece in pieces(*arguments, **limits):
            held.append(len(piece))
            yield name, piece

    monkeypatch.setattr(module, "pieces", counted)
    with pytest.raises(UserError, match="line [12] has more than 100 bytes"):
        rows(form(tmp_path / "source"))
    assert sum(held) <= 200


@pytest.mark.parametrize("form", [as_tar, as_zip])
def test_a_large_table_in_an_archive_has_the_rows_of_the_file(form, tmp_path, monkeypatch):
    monkeypatch.setitem(TEXTS, "P05-1", b"".join(b"%d\n" % number for number in range(100_000)))
    monkeypatch.setitem(TEXTS, "P05-2", b"z" * (1 << 20))
    assert sorted(rows(form(tmp_path / "source"))) == expected()


@pytest.mark.parametrize("form", [as_lra, as_tar, as_zip])
@pytest.mark.parametrize("cut", [1, 4, 30])
def test_a_table_that_ends_in_the_middle_of_a_line_is_refused(cut, form, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "lra_table", lambda split, end="\n": lra_table(split, end)[:-cut])
    source = form(tmp_path / "source")
    with pytest.raises(
        UserError, match="tsv line [123]: the file ends in the middle of a line; it is cut off"
    ):
        rows(source)


@pytest.mark.parametrize("form", [as_lra, as_zip])
def test_a_table_of_lra_that_is_missing_is_named(form, tmp_path, monkeypatch):
    monkeypatch.delitem(LRA_NAMES, "val")
    with pytest.raises(UserError, match="lacks new_aan_pairs.eval.tsv. Wanted: LRA's"):
        rows(form(tmp_path / "source"))


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train\t1\tP05-1", "train\t1\tP06-1", "pairs.tsv row 1: there is no text of 'P06-1' in texts/"),
        (
            "train\t0",
            "training\t0",
            "pairs.tsv row 2: split 'training' is not allowed; splits are train, val",
        ),
        ("train\t0", "train\tmaybe", "pairs.tsv row 2: label 'maybe' is not allowed"),
        ("train\t0\tP05-2\tW99-7", "train\t0\tP05-2", "row 2: there is no text of 'None'"),
        ("train\t0\tP05-2", "train\t0\t../pairs", "row 2: the id '../pairs' cannot be the name of a file"),
        ("train\t0\tP05-2", "train\t0\t", "row 2: the id '' cannot be the name of a file"),
        ("id2", "id_2", "pairs.tsv has no column id2; it has: split, label, id1, id_2"),
        ("split", "part", "pairs.tsv has no column split; one file for all splits needs it"),
        ("split", "kind", "pairs.tsv has a column kind and the texts have none"),
    ],
)
def test_a_faulty_pair_is_named(old, new, message, tmp_path):
    source = as_pairs(tmp_path / "source")
    change(source / "pairs.tsv", old, new)
    with pytest.raises(UserError, match=message):
        rows(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place, other: place.symlink_to(other), "X.txt is a link out of texts/"),
        (lambda place, other: place.symlink_to("none"), "X.txt is no regular file"),
        (lambda place, other: place.symlink_to("X.txt"), "X.txt is no regular file"),
        (lambda place, other: place.mkdir(), "X.txt is no regular file"),
        (lambda place, other: os.mkfifo(place), "X.txt is no regular file"),
    ],
    ids=["link", "dangling", "loop", "folder", "pipe"],
)
def test_a_text_that_is_no_file_of_the_folder_is_refused(make, message, tmp_path):
    source = as_pairs(tmp_path / "source")
    (source / "texts" / "X.txt").rename(tmp_path / "secret")
    make(source / "texts" / "X.txt", tmp_path / "secret")
    with pytest.raises(UserError, match=f"pairs.tsv row 3: .*{message}"):
        rows(source)


def test_a_link_within_the_folder_of_texts_is_followed(tmp_path):
    source = as_pairs(tmp_path / "source")
    (source / "texts" / "X.txt").rename(source / "texts" / "plain")
    (source / "texts" / "X.txt").symlink_to("plain")
    assert sorted(rows(source)) == expected()


def test_an_empty_text_is_named_where_it_is_used(tmp_path):
    source = as_pairs(tmp_path / "source")
    (source / "texts" / "unused.txt").touch()
    rows(source)
    (source / "texts" / "X.txt").write_bytes(b"")
    with pytest.raises(UserError, match="pairs.tsv row 3: the text of 'X' is empty"):
        rows(source)


def test_an_id_that_a_table_of_texts_has_twice_is_named(tmp_path):
    source = as_two_tables(tmp_path / "source")
    write_table(source / "some_papers.parquet", ("id", "text"), [("X", "a"), ("Y", "b"), ("X", "c")])
    with pytest.raises(UserError, match="some_papers.parquet row 3: the id 'X' is there a second time"):
        rows(source)


def test_a_text_that_is_there_only_in_another_kind_is_missing(tmp_path):
    source = as_two_tables_with_kinds(tmp_path / "source")
    change(source / "pairs.tsv", "full", "poster")
    with pytest.raises(
        UserError, match="pairs.tsv row 1: there is no text of 'poster P05-1' in papers.parquet"
    ):
        rows(source)


def test_kinds_of_texts_need_kinds_of_pairs(tmp_path):
    source = as_two_tables_with_kinds(tmp_path / "source")
    change(source / "pairs.tsv", "kind", "sort")
    with pytest.raises(UserError, match="pairs.tsv has no column kind and the texts have one"):
        rows(source)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("more_pairs.csv", "more than one list of pairs: .*more_pairs.csv, .*pairs.tsv"),
        ("val.csv", "more than one list of pairs: pairs.tsv, val.csv"),
        ("papers.csv", "has texts in papers.csv and texts/; leave one"),
    ],
)
def test_what_is_there_twice_is_refused(extra, message, tmp_path):
    source = as_pairs(tmp_path / "source")
    (source / extra).write_text("label,id1,id2,split,id,text\n")
    with pytest.raises(UserError, match=message):
        rows(source)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("pairs.tsv", "source has no list of pairs. W"), ("texts", "source has no texts. W")],
)
def test_half_of_a_source_is_refused_with_what_is_wanted(missing, message, tmp_path):
    source = as_pairs(tmp_path / "source")
    (source / missing).rename(tmp_path / missing)
    with pytest.raises(UserError, match=message):
        rows(source)


def test_a_list_of_pairs_that_is_named_after_papers_is_no_table_of_texts(tmp_path):
    source = as_pairs(tmp_path / "source")
    (source / "pairs.tsv").rename(source / "pairs-of-papers.tsv")
    assert sorted(rows(source)) == expected()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "imdb_train.parquet").write_bytes(b"reviews")
    with pytest.raises(UserError, match="has no texts and no list of pairs. Wanted: LRA's"):
        rows(tmp_path)


def test_a_list_of_pairs_for_each_split_must_be_there_for_all(tmp_path):
    source = as_three_lists(tmp_path / "source")
    (source / "test.csv").unlink()
    with pytest.raises(UserError, match="has no list of test pairs. Wanted"):
        rows(source)


@pytest.mark.parametrize("name", ["file.tsv", "lra_release.gz"])
def test_a_file_that_is_no_archive_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"1.0\ta\tb\n")
    with pytest.raises(UserError, match=f"{name} is neither a folder nor a tar or zip archive. Wanted"):
        rows(tmp_path / name)


def test_a_place_that_does_not_exist_is_named_with_what_is_wanted(root):
    with pytest.raises(UserError, match="task.source=nowhere: there is no such.*Wanted: LRA's") as caught:
        opened("nowhere")
    assert str(root / "sources" / "aan") in str(caught.value)


def test_without_a_source_the_usual_places_are_tried_in_order(root):
    with pytest.raises(UserError, match="no pairs of papers, and no place to fetch them from. Wanted"):
        opened(None)
    as_tar(root / "sources").rename(root / "sources" / "lra_release.gz")
    assert opened(None).name == str(root / "sources" / "lra_release.gz")
    as_lra(root / "sources" / "lra_release" / "lra_release" / "tsv_data")
    assert opened(None).name == str(root / "sources" / "lra_release")
    as_pairs(root / "sources" / "aan")
    assert opened(None).name == str(root / "sources" / "aan")
