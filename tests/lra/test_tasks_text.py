"""Text from every form of source, its held-out split, and the messages for missing or faulty sources."""

import csv
import json
import os
import tarfile
import zipfile
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lra.data.prepare import prepare
from lra.data.store import store_path
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks import text as module
from lra.tasks.base import canonical
from lra.tasks.text import Text


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def reviews(part, count=40):
    """Sorted by label, as IMDb is: (text, label), with bytes above 127, quotes, commas and line breaks."""
    rows = [
        (f'{part} {i}: {"great" if i % 2 else "dull"}, "naïve"<br />\n film — {"x" * i}', i % 2)
        for i in range(count)
    ]
    return sorted(rows, key=lambda row: row[1])


SPLITS = {part: reviews(part) for part in ("train", "test")}


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"text": [text for text, _ in rows], "label": [label for _, label in rows], "id": range(len(rows))}
    )
    parquet.write_table(table, path)


def as_parquet(folder, splits=SPLITS):
    for part, rows in splits.items():
        write_parquet(folder / f"imdb_{part}.parquet", rows)
    write_parquet(folder / "other_train.parquet", [("not a review", 0)])
    return folder


def as_csv(folder, splits=SPLITS):
    folder.mkdir(parents=True)
    for part, rows in splits.items():
        with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines)
            writer.writerow(["text", "label"])
            writer.writerows((text, ("neg", "pos")[label]) for text, label in rows)
    return folder


def as_one_csv(folder, splits=SPLITS):
    folder.mkdir(parents=True)
    with open(folder / "all.csv", "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["split", "label", "text"])
        for part, rows in splits.items():
            writer.writerows((part, label, text) for text, label in rows)
    return folder / "all.csv"


def as_folder(folder, splits=SPLITS):
    for part, rows in splits.items():
        for label in ("neg", "pos"):
            (folder / "aclImdb" / part / label).mkdir(parents=True)
        for index, (text, label) in enumerate(rows):
            (folder / "aclImdb" / part / ("neg", "pos")[label] / f"{index}_7.txt").write_bytes(text.encode())
        (folder / "aclImdb" / part / "urls_pos.txt").write_text("not a review")
    return folder


def as_archive(folder, splits=SPLITS):
    as_folder(folder / "unpacked", splits)
    with tarfile.open(folder / "aclImdb_v1.tar.gz", "w:gz") as archive:
        archive.add(folder / "unpacked" / "aclImdb", "aclImdb")
    return folder / "aclImdb_v1.tar.gz"


def as_zip(folder, splits=SPLITS):
    as_folder(folder / "unpacked", splits)
    with zipfile.ZipFile(folder / "reviews.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "unpacked").rglob("*.txt")):
            archive.write(path, path.relative_to(folder / "unpacked"))
        archive.writestr("__MACOSX/aclImdb/train/pos/._0_7.txt", b"\x00\x05\x16\x07 not a review")
    return folder / "reviews.zip"


def as_hub_layout(folder, splits=SPLITS):
    for part, rows in splits.items():
        write_parquet(folder / "plain_text" / f"{part}-00000-of-00001.parquet", rows)
    return folder


FORMS = (as_parquet, as_csv, as_one_csv, as_folder, as_archive, as_zip, as_hub_layout)


def stored(store, name):
    split = store.split(name)
    return [((split.row(i)[0] - 1).tobytes().decode(), int(split.labels[i])) for i in range(len(split))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_source_gives_the_same_bytes(form, tmp_path):
    reference = prepare(Text(source=str(as_parquet(tmp_path / "reference"))), 4000)
    store = prepare(Text(source=str(form(tmp_path / "source"))), 4000, force=True)
    assert store.data_hash == reference.data_hash
    assert stored(store, "test") == SPLITS["test"]
    assert sorted(stored(store, "train") + stored(store, "val")) == sorted(SPLITS["train"])


def test_an_id_is_the_byte_plus_one_and_documents_are_stored_whole(tmp_path):
    store = prepare(Text(source=str(as_parquet(tmp_path / "s"))), 16)
    assert store.vocab_size == len(store.vocab) == 257 and store.split("test").tokens.dtype == np.uint8
    text, label = SPLITS["test"][5]
    assert store.split("test").row(5)[0].tolist() == [byte + 1 for byte in text.encode()]
    assert store.split("test").labels[5] == label
    assert store.split("test").lengths.max() > 16
    assert Text().decode(store.split("test").row(5)[0], store.vocab) == text


def test_a_tenth_of_each_label_is_held_out_and_the_rest_keeps_its_order(tmp_path):
    store = prepare(Text(source=str(as_parquet(tmp_path / "s"))), 4000)
    assert store.manifest["splits"]["val"]["label_counts"] == [2, 2]
    held_out = stored(store, "val")
    assert stored(store, "train") == [row for row in SPLITS["train"] if row not in held_out]


def test_the_tenth_of_a_label_is_rounded_to_the_nearest_number(tmp_path):
    splits = {"train": reviews("train", 32), "test": reviews("test")}  # 16 of each label: 1.6 reviews
    store = prepare(Text(source=str(as_parquet(tmp_path / "s", splits))), 4000)
    assert store.manifest["splits"]["val"]["label_counts"] == [2, 2]


def test_the_held_out_reviews_depend_on_the_seed_and_not_on_the_order_of_the_source(tmp_path):
    shuffled = {part: rows[::-1] for part, rows in SPLITS.items()}
    a = prepare(Text(source=str(as_parquet(tmp_path / "a"))), 4000)
    held_out = sorted(stored(a, "val"))
    b = prepare(Text(source=str(as_parquet(tmp_path / "b", shuffled))), 4000, force=True)
    assert sorted(stored(b, "val")) == held_out
    c = prepare(Text(source=str(as_parquet(tmp_path / "a")), data_seed=1), 4000)
    assert sorted(stored(c, "val")) != held_out and c.path != a.path


def test_equal_reviews_stay_on_one_side_of_the_held_out_split(tmp_path):
    splits = {"train": sorted(reviews("train", 200) * 2, key=lambda row: row[1]), "test": reviews("test")}
    store = prepare(Text(source=str(as_parquet(tmp_path / "s", splits))), 4000)
    assert store.manifest["duplicates"]["between"]["train val"] == 0
    assert store.manifest["duplicates"]["within"]["val"] == 20


def test_reviews_in_train_and_test_are_counted(tmp_path):
    splits = {"train": SPLITS["train"], "test": SPLITS["test"] + SPLITS["train"][:3]}
    store = prepare(Text(source=str(as_parquet(tmp_path / "s", splits)), val="test"), 4000)
    assert store.manifest["duplicates"]["between"] == {"train val": 3, "train test": 3, "val test": 43}


def test_validation_on_the_test_split_is_another_variant_and_says_so(tmp_path):
    source = str(as_parquet(tmp_path / "s"))
    held_out, peers = prepare(Text(source=source), 4000), prepare(Text(source=source, val="test"), 4000)
    assert stored(peers, "val") == stored(peers, "test") == SPLITS["test"]
    assert stored(peers, "train") == SPLITS["train"]
    assert peers.path != held_out.path and peers.data_hash != held_out.data_hash
    assert "validation is the test split" in peers.data_variant


def test_all_lengths_share_one_folder():
    assert store_path(Text(), 1000) == store_path(Text(), 4096)


def test_only_the_texts_of_imdb_count_as_original(tmp_path, monkeypatch):
    source = str(as_parquet(tmp_path / "s"))
    assert prepare(Text(source=source), 4000).data_origin == "stand_in"
    monkeypatch.setattr(module, "ROWS", 40)
    other = prepare(Text(source=source), 4000, force=True)
    assert other.data_origin == "stand_in"
    assert other.manifest["notes"] == ["as many rows as IMDb v1.0, but other texts or labels"]
    seen = {}
    fingerprint = module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda marks: seen.setdefault(len(seen), fingerprint(marks)))
    prepare(Text(source=source), 4000, force=True)
    monkeypatch.setattr(module, "fingerprint", fingerprint)
    monkeypatch.setattr(module, "FINGERPRINTS", {"train": seen[0], "test": seen[1]})
    backwards = {part: rows[::-1] for part, rows in SPLITS.items()}
    source = str(as_parquet(tmp_path / "t", backwards))
    assert prepare(Text(source=source), 4000, force=True).data_origin == "original"
    (text, label), *rest = SPLITS["test"]
    flipped = str(as_parquet(tmp_path / "u", SPLITS | {"test": [(text, 1 - label), *rest]}))
    assert prepare(Text(source=flipped), 4000, force=True).data_origin == "stand_in"


def test_the_archive_may_lie_among_the_sources_as_it_is(root):
    as_archive(root / "sources")
    store = prepare(Text(), 4000)
    assert store.manifest["source"] == str((root / "sources" / "aclImdb_v1.tar.gz").resolve())


def test_an_archive_without_reviews_is_refused_with_what_is_wanted(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("train/pos.txt", "not a review")
    with pytest.raises(UserError, match="x.zip holds no aclImdb/train/pos. Wanted: imdb_train.parquet"):
        prepare(Text(source=str(tmp_path / "x.zip")), 4000)


def test_without_a_source_the_data_root_is_looked_at_first(root):
    as_csv(root / "sources" / "imdb")
    store = prepare(Text(), 4000)
    assert store.manifest["source"] == str((root / "sources" / "imdb").resolve())
    assert stored(store, "test") == SPLITS["test"]


def test_a_hub_id_is_loaded_by_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name, streaming):
        asked.append((name, streaming))
        return {
            part: [{"text": text, "label": label} for text, label in rows] for part, rows in SPLITS.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    store = prepare(Text(), 4000)
    assert asked == [("stanfordnlp/imdb", False)] and store.manifest["source"] == "stanfordnlp/imdb"
    assert stored(store, "test") == SPLITS["test"]


@pytest.mark.parametrize("source", [None, "someone/reviews"])
def test_without_a_network_the_message_names_the_files_and_their_place(source, root, monkeypatch):
    def load_dataset(name, streaming):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"no network.*imdb_train.parquet.*aclImdb.*task.source=DIR"
    ) as caught:
        prepare(Text(source=source), 4000)
    assert str(root / "sources" / "imdb") in str(caught.value)
    assert not [path for path in root.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("fine", 1), ("", 0)], "imdb_train.parquet row 2: the text is empty"),
        ([("fine", 1), ("unlabelled", -1)], "row 2: label -1 is not allowed"),
        ([("fine", 1), (None, 0)], "row 2: the text is empty"),
    ],
)
def test_a_faulty_row_is_named(rows, message, tmp_path):
    source = as_parquet(tmp_path / "s", {"train": rows, "test": reviews("test")})
    with pytest.raises(UserError, match=message):
        prepare(Text(source=str(source)), 4000)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    source = as_folder(tmp_path / "s")
    (source / "aclImdb" / "test" / "pos" / "99_7.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="99_7.txt is not UTF-8"):
        prepare(Text(source=str(source)), 4000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place, other: place.symlink_to(other), "'train/pos/999_1.txt' is a link out of the folder"),
        (
            lambda place, other: place.symlink_to(place.parent / "none"),
            "'train/pos/999_1.txt' is a .* link to",
        ),
        (lambda place, other: os.mkfifo(place), "'train/pos/999_1.txt' is a device, pipe"),
    ],
    ids=["link", "dangling", "pipe"],
)
def test_what_is_no_file_in_the_folder_of_reviews_is_refused(make, message, tmp_path):
    (tmp_path / "secret").write_text("not a review")
    source = as_folder(tmp_path / "s")
    make(source / "aclImdb" / "train" / "pos" / "999_1.txt", tmp_path / "secret")
    with pytest.raises(UserError, match=message):
        prepare(Text(source=str(source)), 4000)


def test_a_folder_with_the_name_of_a_review_is_passed_over(tmp_path):
    source = as_folder(tmp_path / "s")
    (source / "aclImdb" / "train" / "pos" / "999_1.txt").mkdir()
    store = prepare(Text(source=str(source)), 4000)
    assert sorted(stored(store, "train") + stored(store, "val")) == sorted(SPLITS["train"])


@pytest.mark.parametrize("other", ["aclImdb/aclImdb", "b/aclImdb"])
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_two_copies_are_refused_with_their_places(form, other, tmp_path):
    source = as_folder(tmp_path / "s")
    (source / other).parent.mkdir(exist_ok=True)
    os.rename(as_folder(tmp_path / "again") / "aclImdb", source / other)
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "x", "w") as archive:
            for path in source.rglob("*.txt"):
                archive.write(path, path.relative_to(source))
    elif form == "tar":
        with tarfile.open(tmp_path / "x", "w") as archive:
            archive.add(source, ".")
    with pytest.raises(UserError, match="has IMDb twice, in '.*' and in '.*'; leave one") as caught:
        prepare(Text(source=str(source if form == "folder" else tmp_path / "x")), 4000)
    assert f"{other}'" in str(caught.value)


def test_a_review_that_an_archive_has_twice_is_refused(tmp_path):
    source = as_archive(tmp_path / "s")
    folder = tmp_path / "s" / "unpacked" / "aclImdb"
    with tarfile.open(source, "w") as archive:
        archive.add(folder, "aclImdb")
        archive.add(folder / "test" / "neg" / "0_7.txt", "aclImdb/test/neg/0_7.txt")
    with pytest.raises(UserError, match="'aclImdb/test/neg/0_7.txt' is there twice; get it anew"):
        prepare(Text(source=str(source)), 4000)


@pytest.mark.parametrize("val", ["heldout", "test"])
@pytest.mark.parametrize(("part", "label", "kind"), [("train", 1, "positive"), ("test", 0, "negative")])
def test_a_part_without_one_of_the_labels_is_refused(part, label, kind, val, tmp_path):
    splits = SPLITS | {part: [row for row in SPLITS[part] if row[1] != label]}
    source = str(as_folder(tmp_path / "s", splits))
    with pytest.raises(UserError, match=f"{part} has no {kind} reviews; .*get it anew"):
        prepare(Text(source=source, val=val), 4000)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "reviews.csv").write_text("review,label\nfine,1\n")
    with pytest.raises(
        UserError, match="no column text, split.*a file for each split.*it has: review, label"
    ):
        prepare(Text(source=str(tmp_path / "reviews.csv")), 4000)


@pytest.mark.parametrize("name", ["imdb_train.parquet", "aclImdb_v1.tar.gz", "train.csv"])
def test_a_broken_file_is_named(name, tmp_path):
    for file in {name, "imdb_test.parquet" if "parquet" in name else "test.csv"}:
        (tmp_path / file).write_bytes(b"\xff\xfe broken \x00")
    source = tmp_path / name if "tar" in name else tmp_path
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        prepare(Text(source=str(source)), 4000)


def test_a_broken_file_in_a_hub_layout_is_a_message(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "plain_text").mkdir(exist_ok=True)
        (tmp_path / "plain_text" / f"{part}-00000-of-00001.parquet").write_bytes(b"broken")
    with pytest.raises(UserError, match="its files cannot be read"):
        prepare(Text(source=str(tmp_path)), 4000)


@pytest.mark.parametrize("source", ["/nowhere/imdb", "reviews.csv", "./imdb", "a/b/c"])
def test_a_place_that_does_not_exist_is_not_taken_for_a_hub_id(source):
    with pytest.raises(UserError, match="there is no such file or folder.*Wanted"):
        prepare(Text(source=source), 4000)


def test_a_folder_without_reviews_is_refused_with_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match="holds no IMDb. Wanted: imdb_train.parquet"):
        prepare(Text(source=str(tmp_path)), 4000)


def test_the_variants_of_bytes_are_those_that_were_always_there():
    held_out = '{"data_seed":0,"held_out":0.1,"reader":1,"task":"text","unit":"byte","val":"heldout"}'
    assert canonical(Text().variant(4000)).decode() == held_out
    assert canonical(Text(val="test").variant(16)).decode() == (
        '{"reader":1,"task":"text","unit":"byte","val":"test"}'
    )
    assert Text(data_seed=2).variant_name(16) == "imdb-bytes-seed2"
    assert Text(val="test").variant_name(16) == "imdb-bytes-val-test (validation is the test split)"


def test_the_variant_of_characters_names_the_length_and_min_freq():
    chars = Text(unit="char").variant(512)
    assert chars == Text().variant(512) | {"unit": "char", "min_freq": 15, "length": 512}
    assert json.loads(json.dumps(chars)) == chars


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "imdb-chars-512"),
        ({"data_seed": 3}, "imdb-chars-512-seed3"),
        ({"min_freq": 2}, "imdb-chars-512 (min_freq=2)"),
        ({"val": "test"}, "imdb-chars-512-val-test (validation is the test split)"),
        (
            {"val": "test", "min_freq": 2},
            "imdb-chars-512-val-test (validation is the test split, min_freq=2)",
        ),
    ],
)
def test_the_name_of_a_variant_of_characters_says_how_it_was_made(values, name):
    task = Text(unit="char", **values)
    assert task.variant_name(512) == name
    assert task.folder_name(512).rpartition("-")[0] == name.split()[0]


@pytest.mark.parametrize("val", ["heldout", "test"])
def test_characters_are_counted_over_the_rows_that_are_train_in_the_variant(val, tmp_path):
    source = str(as_parquet(tmp_path / "s"))
    task = Text(source=source, val=val, unit="char", min_freq=37)
    store = prepare(task, 24)
    of_bytes = stored(prepare(Text(source=source, val=val), 24), "train")
    counts = Counter("".join(text[:23] for text, _ in of_bytes))
    assert sorted(store.vocab[3:]) == sorted(c for c, count in counts.items() if count >= 37)
    assert ("ï" in store.vocab) == (val == "test")  # once in each of the 40 reviews, 4 of them held out
    shown = task.decode(store.split("train").row(0)[0], store.vocab)
    kept = "".join(c if counts[c] >= 37 else "<unk>" for c in of_bytes[0][0][:23])
    assert shown == f"{kept}<eos>"
    assert all(finding.ok for finding in verify(task, 24))


def test_characters_are_held_out_like_bytes(tmp_path):
    source = str(as_parquet(tmp_path / "s"))
    task = Text(source=source, unit="char", min_freq=1)
    store, of_bytes = prepare(task, 4000), prepare(Text(source=source), 4000)
    for part in ("train", "val"):
        split = store.split(part)
        shown = [(task.decode(split.row(i)[0], store.vocab), split.labels[i]) for i in range(len(split))]
        assert shown == [(f"{text}<eos>", label) for text, label in stored(of_bytes, part)]


def test_an_id_that_is_too_rare_for_the_vocabulary_is_a_fault(tmp_path):
    task = Text(source=str(as_parquet(tmp_path / "s")), unit="char", min_freq=2)
    store = prepare(task, 64)
    tokens = np.fromfile(store.path / "train.tokens.bin", np.uint8)
    rare = np.flatnonzero(tokens == len(store.vocab) - 1)
    tokens[rare[1:]] = 3
    tokens.tofile(store.path / "train.tokens.bin")
    faults = [finding.what for finding in verify(task, 64) if not finding.ok]
    assert "vocabulary counts" in faults and "file train.tokens.bin" in faults
