"""Retrieval in the store: both texts of a pair, what is cut, characters, origins, and idle settings."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from lra.data.prepare import prepare
from lra.data.show import examples, statistics
from lra.data.store import store_path
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks import retrieval as module
from lra.tasks.base import canonical
from lra.tasks.retrieval import Retrieval

LONG = b"z" * 9_990 + b"\n" + b"w" * 500
TEXTS = {"a": b"abc", "b": "—é".encode(), "c": b"it's\n", "long": LONG}
PAIRS = {
    "train": [("a", "b", 1), ("c", "a", 0), ("long", "c", 1), ("c", "c", 0)],
    "val": [("b", "a", 0)],
    "test": [("a", "c", 1), ("a", "b", 1)],
}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def lra_form(folder, texts=TEXTS):
    folder.mkdir(parents=True)
    for split, name in {"train": "train", "val": "eval", "test": "test"}.items():
        with open(folder / f"new_aan_pairs.{name}.tsv", "w") as lines:
            for a, b, label in PAIRS[split]:
                lines.write(f"{float(label)}\t{a}\t{b}\t{texts[a]!r}\t{texts[b]!r}\n")
    return str(folder)


def pair_form(folder, texts=TEXTS):
    (folder / "texts").mkdir(parents=True)
    for name, text in texts.items():
        (folder / "texts" / f"{name}.txt").write_bytes(text)
    with open(folder / "pairs.csv", "w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["split", "label", "id1", "id2"])
        writer.writerows((split, label, a, b) for split in PAIRS for a, b, label in PAIRS[split])
    return str(folder)


def documents(store, split):
    """The stored bytes of each pair."""
    part = store.split(split)
    return [
        tuple((np.asarray(d).astype(int) - 1).astype(np.uint8).tobytes() for d in part.row(i))
        for i in range(len(part))
    ]


@pytest.mark.parametrize(
    "values", [{}, {"text": "decoded"}, {"unit": "char"}, {"unit": "char", "text": "decoded"}]
)
def test_both_forms_of_source_give_the_same_bytes_and_verify(values, tmp_path):
    first = Retrieval(source=lra_form(tmp_path / "lra"), **values)
    second = Retrieval(source=pair_form(tmp_path / "pairs"), **values)
    a, b = prepare(first, 100), prepare(second, 100, force=True)
    assert a.data_hash == b.data_hash
    assert all(finding.ok for finding in verify(first, 100))
    assert a.split("train").labels.tolist() == [1, 0, 1, 0] and len(a.split("val")) == 1
    assert a.split("train").documents == 2


def test_a_literal_is_stored_with_its_quotes_and_backslashes(tmp_path):
    store = prepare(Retrieval(source=lra_form(tmp_path / "s")), 4000)
    assert documents(store, "train")[0] == (b"b'abc'", rb"b'\xe2\x80\x94\xc3\xa9'")
    assert documents(store, "test")[0] == (b"b'abc'", rb'''b"it's\n"''')
    assert store.vocab_size == len(store.vocab) == 257 and store.manifest["dtype"] == "uint8"


def test_decoded_texts_are_the_bytes_themselves(tmp_path):
    store = prepare(Retrieval(source=lra_form(tmp_path / "s"), text="decoded"), 4000)
    assert documents(store, "train")[0] == (b"abc", "—é".encode())


def test_any_byte_can_be_decoded_and_stored(tmp_path):
    texts = TEXTS | {"a": bytes(range(256))}
    task = Retrieval(source=lra_form(tmp_path / "s", texts), text="decoded")
    store = prepare(task, 4000)
    assert documents(store, "test")[0][0] == bytes(range(256))
    assert store.split("test").row(0)[0].tolist() == list(range(1, 257))
    assert all(finding.ok for finding in verify(task, 4000))


def test_bytes_are_stored_up_to_10000_and_characters_up_to_the_length(tmp_path):
    source = lra_form(tmp_path / "s")
    assert documents(prepare(Retrieval(source=source), 16), "train")[2][0] == repr(LONG).encode()[:10_000]
    decoded = prepare(Retrieval(source=source, text="decoded"), 16)
    assert documents(decoded, "train")[2][0] == LONG[:10_000]
    task = Retrieval(source=source, unit="char")
    store = prepare(task, 16)
    assert task.decode(store.split("train").row(2)[0], store.vocab) == "b'" + 13 * "z" + "<eos>"
    assert task.decode(store.split("train").row(2)[1], store.vocab) == r"""b"it's\n"<eos>"""


def test_the_vocabulary_counts_both_documents_of_train_after_the_cut(tmp_path):
    source = lra_form(tmp_path / "s")
    store = prepare(Retrieval(source=source, unit="char"), 16)
    counts = Counter("".join(repr(TEXTS[name])[:15] for a, b, _ in PAIRS["train"] for name in (a, b)))
    assert store.vocab[3:] == sorted(counts, key=lambda c: (-counts[c], c))
    assert "w" not in store.vocab
    rarer = prepare(Retrieval(source=source, unit="char", min_freq=3), 16)
    assert sorted(rarer.vocab[3:]) == sorted(c for c in counts if counts[c] >= 3)


def test_characters_of_decoded_texts_are_unicode(tmp_path):
    task = Retrieval(source=lra_form(tmp_path / "s"), text="decoded", unit="char")
    store = prepare(task, 16)
    shown = examples(task, store, "train", 1)[0]
    assert shown["documents"] == ["abc<eos>", "—é<eos>"] and shown["lengths"] == [4, 3]


def test_text_that_is_not_utf8_has_bytes_and_no_characters(tmp_path):
    source = lra_form(tmp_path / "s", TEXTS | {"b": b"caf\xe9"})
    with pytest.raises(UserError, match="train.tsv line 1, text2 is not UTF-8 .*task.unit=byte"):
        prepare(Retrieval(source=source, text="decoded", unit="char"), 100)
    assert documents(prepare(Retrieval(source=source, text="decoded"), 100), "val")[0][0] == b"caf\xe9"


def test_a_field_with_a_byte_that_no_text_has_is_named(tmp_path):
    source = lra_form(tmp_path / "s")
    (tmp_path / "s" / "new_aan_pairs.eval.tsv").write_bytes(b"0\ta\tb\tb'\xff'\tb'x'\n")
    with pytest.raises(UserError, match="new_aan_pairs.eval.tsv line 1, text1 has the byte 255"):
        prepare(Retrieval(source=source), 100)


def test_pairs_and_papers_that_repeat_are_counted_and_no_fault(tmp_path):
    task = Retrieval(source=pair_form(tmp_path / "s"))
    store = prepare(task, 100)
    assert store.manifest["duplicates"]["between"] == {"train val": 0, "train test": 1, "val test": 0}
    assert all(finding.ok for finding in verify(task, 100))


def test_only_lras_tables_with_lras_row_counts_count_as_original(tmp_path, monkeypatch):
    lra, pairs = lra_form(tmp_path / "lra"), pair_form(tmp_path / "pairs")
    store = prepare(Retrieval(source=lra), 100)
    assert store.data_origin == "stand_in" and "'train': 4" in store.manifest["notes"][0]
    monkeypatch.setattr(module, "LRA_ROWS", {split: len(rows) for split, rows in PAIRS.items()})
    store = prepare(Retrieval(source=lra), 100, force=True)
    assert store.data_origin == "original"
    assert "by their form and their number" in store.manifest["notes"][0]
    assert prepare(Retrieval(source=pairs), 100, force=True).data_origin == "stand_in"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_one_split_with_another_number_of_rows_makes_it_a_stand_in(split, tmp_path, monkeypatch):
    counts = {name: len(rows) for name, rows in PAIRS.items()}
    monkeypatch.setattr(module, "LRA_ROWS", counts | {split: counts[split] + 1})
    assert prepare(Retrieval(source=lra_form(tmp_path / "s")), 100).data_origin == "stand_in"


def test_the_row_counts_of_lra_are_pinned():
    assert module.LRA_ROWS == {"train": 147_086, "val": 18_090, "test": 17_437}


def test_texts_that_are_not_printed_bytes_are_counted_in_the_notes(tmp_path):
    source = lra_form(tmp_path / "s")
    with open(tmp_path / "s" / "new_aan_pairs.test.tsv", "ab") as lines:
        lines.write(b"1\ta\tb\tplain text\tb'x'\n")
    store = prepare(Retrieval(source=source), 100)
    assert store.manifest["notes"][1].startswith("1 documents are not the printed form of bytes")
    assert documents(store, "test")[2] == (b"plain text", b"b'x'")


def test_all_lengths_of_bytes_share_a_folder_and_those_of_characters_do_not():
    assert store_path(Retrieval(), 1000) == store_path(Retrieval(), 4000)
    chars = Retrieval(unit="char")
    assert store_path(chars, 1000) != store_path(chars, 4000)


def test_variants_are_pinned():
    assert canonical(Retrieval().variant(4000)).decode() == (
        '{"reader":1,"task":"retrieval","text":"literal","unit":"byte"}'
    )
    chars = Retrieval(unit="char", text="decoded").variant(4000)
    assert chars == {
        "task": "retrieval",
        "reader": 1,
        "text": "decoded",
        "unit": "char",
        "min_freq": 1,
        "length": 4000,
    }
    assert json.loads(json.dumps(chars)) == chars


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "aan-bytes"),
        ({"text": "decoded"}, "aan-decoded-bytes"),
        ({"unit": "char"}, "aan-chars-4000"),
        ({"unit": "char", "text": "decoded"}, "aan-decoded-chars-4000"),
        ({"unit": "char", "min_freq": 5}, "aan-chars-4000 (min_freq=5)"),
    ],
)
def test_the_name_of_a_variant_says_how_it_was_made(values, name):
    assert Retrieval(**values).variant_name(4000) == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val": "test"}, "val=test: retrieval has a validation split of its own"),
        ({"data_seed": 1}, "data_seed=1 would change nothing"),
        ({"min_freq": 2}, "min_freq=2 would change nothing"),
        ({"text": "raw"}, "unknown task.text 'raw'"),
    ],
)
def test_settings_that_change_nothing_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Retrieval(**values).check()


@pytest.mark.parametrize("length", [15, 65_537])
def test_a_length_out_of_bounds_is_refused(length):
    with pytest.raises(UserError, match="from 16 to 65536"):
        Retrieval().check_length(length)


def test_sizes_for_measuring_need_no_data():
    assert Retrieval().vocab_size == 257 and Retrieval(unit="char").vocab_size == 98


@pytest.mark.parametrize("form", [lra_form, pair_form])
def test_the_plan_is_of_the_size_of_the_source(form, tmp_path):
    plan = Retrieval(source=form(tmp_path / "s")).plan(4000)
    assert plan.rows == 7 and 0 < plan.mib < 0.2 and plan.source == str(tmp_path / "s")


def test_documents_that_are_cut_are_counted(tmp_path):
    task = Retrieval(source=lra_form(tmp_path / "s"))
    shares = statistics(task, prepare(task, 100), "train")["of 10,000 bytes or cut there"]
    assert shares == {"documents": 1 / 8}


def test_a_stored_document_above_10000_bytes_is_a_fault(tmp_path, monkeypatch):
    task = Retrieval(source=lra_form(tmp_path / "s"))
    prepare(task, 100)
    monkeypatch.setattr(module, "LONGEST", 9_999)
    assert [f.what for f in verify(task, 100) if not f.ok] == ["train longest"]


def test_a_missing_source_leaves_nothing_behind(root):
    with pytest.raises(UserError, match="no pairs of papers.*new_aan_pairs.train.tsv.*task.source=DIR"):
        prepare(Retrieval(), 100)
    assert not [path for path in root.iterdir() if path.is_dir()]
