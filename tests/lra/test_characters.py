"""Characters as tokens against a plain count: vocabulary, truncation, unknown ones, what verify sees."""

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lra.data.prepare import prepare
from lra.data.store import Split
from lra.data.verify import verify
from lra.errors import UserError
from lra.schema import setting
from lra.tasks.base import Plan
from lra.tasks.characters import (
    SPECIALS,
    Counts,
    Encoder,
    Written,
    check_documents,
    check_vocabulary,
)

TEXTS = {
    "train": ["abba", "cab", "naïve — 😀😀", "x" * 40, "b\n\tb"],
    "val": ["abc"],
    "test": ["zebra", "\x84"],
}


@dataclass(frozen=True)
class Lines(Written):
    """The texts above."""

    name: str = "lines"
    min_freq: int = setting(2, low=1)

    description: ClassVar[str] = "made-up lines"
    num_classes: ClassVar[int] = 2
    default_length: ClassVar[int] = 16
    usual_characters: ClassVar[int] = 9

    def variant(self, length):
        return {"task": "lines", "unit": self.unit, **self.character_variant(length)}

    def variant_name(self, length):
        return "lines"

    def plan(self, length):
        return Plan("made here", 8, 0.01, 0.1)

    def build(self, writer, *, length, workers=None, progress=None):
        encode = self.encoder(writer, (text.encode() for text in TEXTS["train"]), length)
        for split, texts in TEXTS.items():
            for text in texts:
                writer.add(split, [encode(text.encode())], 0)
        writer.describe(source="made here", data_origin="regenerated", generator=None, notes=[])


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))


def counted(texts, length):
    counts = Counts(length)
    for text in texts:
        counts.add(text)
    return counts


def in_memory(documents, vocab_size=50):
    """Documents, given as lists of ids, as a stored split."""
    flat = np.concatenate([np.array(document, np.uint8) for document in documents])
    offsets = np.cumsum([0, *map(len, documents)])
    return Split("train", flat, offsets, np.zeros(len(documents), np.int64), 1)


def test_the_vocabulary_is_the_specials_then_characters_by_falling_count_then_code_point():
    vocab = counted(["ccc bb aa", "d"], 100).vocabulary(1)
    assert vocab == ["<pad>", "<unk>", "<eos>", "c", " ", "a", "b", "d"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)), st.integers(1, 4))
def test_the_vocabulary_is_that_of_a_plain_count(texts, min_freq):
    counts = Counter("".join(text[:19] for text in texts))
    kept = sorted((c for c in counts if counts[c] >= min_freq), key=lambda c: (-counts[c], ord(c)))
    assert counted(texts, 20).vocabulary(min_freq) == SPECIALS + kept


def test_characters_are_counted_after_the_cut():
    assert counted(["abcz"], 4).vocabulary(1) == [*SPECIALS, "a", "b", "c"]


@pytest.mark.parametrize(("min_freq", "kept"), [(1, "cba"), (2, "cb"), (3, "c"), (4, "")])
def test_a_character_is_kept_from_min_freq_occurrences_on(min_freq, kept):
    assert counted(["abbccc"], 100).vocabulary(min_freq) == SPECIALS + list(kept)


def test_a_document_is_its_first_characters_and_the_end():
    encode = Encoder([*SPECIALS, "é", "😀"], 4)
    assert encode("é😀").tolist() == [3, 4, 2]
    assert encode("😀é😀éé").tolist() == [4, 3, 4, 2]
    assert encode("éxé").tolist() == [3, 1, 3, 2]


def test_a_store_of_characters_holds_them_and_verifies():
    task = Lines(unit="char")
    store = prepare(task, 16)
    assert store.vocab[:3] == SPECIALS and store.vocab_size == len(store.vocab)
    assert store.vocab[3:] == ["x", "b", "a", " ", "😀"]
    assert store.split("train").lengths.tolist() == [5, 4, 11, 16, 5]
    assert task.decode(store.split("train").row(2)[0], store.vocab) == "<unk>a<unk><unk><unk> <unk> 😀😀<eos>"
    assert task.decode(store.split("test").row(0)[0], store.vocab) == "<unk><unk>b<unk>a<eos>"
    assert all(finding.ok for finding in verify(task, 16))
    shares = task.statistics(store.split("train"))["unknown characters"]
    assert shares == {"<unk>": 8 / 36}


def test_min_freq_and_length_make_other_variants_of_characters_and_not_of_bytes():
    chars, names = Lines(unit="char"), set()
    names |= {chars.folder_name(16), chars.folder_name(17), Lines(unit="char", min_freq=3).folder_name(16)}
    names |= {Lines().folder_name(16), Lines().folder_name(17)}
    assert len(names) == 4


def test_min_freq_is_refused_where_it_would_change_nothing():
    with pytest.raises(UserError, match="min_freq=3 would change nothing: .*task.unit=char"):
        Lines(min_freq=3).check()
    Lines(min_freq=3, unit="char").check()
    Lines(min_freq=2).check()


@pytest.mark.parametrize("values", [{"unit": "word"}, {"unit": "char", "min_freq": 0}])
def test_other_units_and_counts_below_one_are_refused(values):
    with pytest.raises(UserError, match="unit|min_freq"):
        Lines(**values).check()


def test_a_vocabulary_without_characters_is_refused():
    with pytest.raises(UserError, match="no character occurs 999 times.*lower task.min_freq"):
        prepare(Lines(unit="char", min_freq=999), 16)


def test_the_size_for_measuring_needs_no_data():
    assert Lines().vocab_size == 257 and Lines(unit="char").vocab_size == 9
    assert Lines(unit="char").vocabulary() is None and len(Lines().vocabulary()) == 257


def test_the_training_texts_are_not_read_for_bytes():
    encode = Lines().encoder(SimpleNamespace(), (1 / 0 for _ in "x"), 16)
    assert encode(b"\x00a\xfe").tolist() == [1, 98, 255]


GOOD = [[3, 3, 3, 4, 4, 1, 2], [5, 5, 2]]  # a three times, b and c twice


@pytest.mark.parametrize(
    ("vocab", "min_freq", "fault"),
    [
        ([*SPECIALS, "a", "b", "c"], 2, None),
        (["<pad>", "<eos>", "<unk>", "a", "b", "c"], 2, "vocabulary symbols"),
        ([*SPECIALS, "a", "b", "cc"], 2, "vocabulary symbols"),
        ([*SPECIALS, 7, "b", "c"], 2, "vocabulary symbols"),
        ([*SPECIALS, "a", "b", "b"], 2, "vocabulary symbols"),
        ([*SPECIALS, "a", "b", "c"], 3, "vocabulary counts"),
        ([*SPECIALS, "a", "b", "c", "d"], 2, "vocabulary counts"),
        ([*SPECIALS, "a", "c", "b"], 2, "vocabulary order"),
    ],
)
def test_a_vocabulary_that_is_not_that_of_the_stored_rows_is_a_fault(vocab, min_freq, fault):
    findings = check_vocabulary(vocab, in_memory(GOOD), min_freq)
    assert [finding.what for finding in findings if not finding.ok] == ([fault] if fault else [])


def test_a_vocabulary_ordered_against_the_counts_is_a_fault():
    findings = check_vocabulary([*SPECIALS, "a", "b"], in_memory([[3, 4, 4, 2]]), 1)
    assert [finding.detail for finding in findings if not finding.ok] == ["'b' belongs before 'a'"]


@pytest.mark.parametrize(
    ("documents", "faults"),
    [
        (GOOD, []),
        ([[3, 2, 3]], ["train ends"]),
        ([[3, 2, 2]], ["train ends"]),
        ([[3, 3], [2]], ["train ends"]),
        ([[3, 2, 3], [3, 2]], ["train ends"]),
        ([[3] * 16 + [2]], ["train longest"]),
    ],
)
def test_a_document_that_does_not_end_once_and_in_time_is_a_fault(documents, faults):
    findings = check_documents(in_memory(documents), 16)
    assert [finding.what for finding in findings if not finding.ok] == faults
