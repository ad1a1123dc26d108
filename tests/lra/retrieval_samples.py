"""A few papers and pairs, written in every form of source that Retrieval reads."""

import csv
import io
import tarfile
import zipfile

import pyarrow as pa
from pyarrow import parquet

from lra.tasks.base import SPLITS

TEXTS = {
    "P05-1": 'naïve "parsing"\n\tof trees'.encode(),
    "P05-2": b"it's \\ a backslash, \xe2\x80\x94 and a \r",
    "W99-7": b"""both ' and " in one""",
    "X": b"plain",
}
PAIRS = {
    "train": [("P05-1", "P05-2", 1), ("P05-2", "W99-7", 0), ("X", "X", 1)],
    "val": [("W99-7", "P05-1", 0)],
    "test": [("X", "W99-7", 1), ("P05-1", "X", 0)],
}
LRA_NAMES = {"train": "train", "val": "eval", "test": "test"}


def lra_table(split, end="\n"):
    lines = [f"{float(label)}\t{a}\t{b}\t{TEXTS[a]!r}\t{TEXTS[b]!r}{end}" for a, b, label in PAIRS[split]]
    return "".join(lines).encode()


def as_lra(folder, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in LRA_NAMES.items():
        (folder / f"new_aan_pairs.{name}.tsv").write_bytes(lra_table(split, end))
    return folder


def as_tar(folder):
    folder.mkdir(parents=True)
    with tarfile.open(folder / "any_name.gz", "w:gz") as archive:
        for split in reversed(SPLITS):
            for name in (f"new_aan_pairs.{LRA_NAMES[split]}.tsv", f"{split}.png"):
                content = lra_table(split) if name.endswith("tsv") else b"an image"
                entry = tarfile.TarInfo(f"./lra_release/lra_release/tsv_data/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return folder / "any_name.gz"


def as_release_in_a_folder(folder):
    as_tar(folder).rename(folder / "lra_release.gz")
    return folder


def as_zip(folder):
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "aan.zip", "w") as archive:
        for split, name in LRA_NAMES.items():
            archive.writestr(f"new_aan_pairs.{name}.tsv", lra_table(split))
    return folder / "aan.zip"


def write_texts(folder):
    (folder / "texts").mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / "texts" / f"{name}.txt").write_bytes(text)


def write_table(file, columns, records):
    """CSV, TSV or parquet by the suffix."""
    if file.suffix == ".parquet":
        values = zip(*records, strict=True)
        parquet.write_table(pa.table({name: list(v) for name, v in zip(columns, values, strict=True)}), file)
        return
    with open(file, "w", newline="") as lines:
        writer = csv.writer(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(records)


def as_pairs(folder, suffix=".tsv"):
    write_texts(folder)
    records = [
        ("eval" if split == "val" else split, label, a, b)
        for split, pairs in PAIRS.items()
        for a, b, label in pairs
    ]
    write_table(folder / f"pairs{suffix}", ("split", "label", "id1", "id2"), records)
    return folder


def as_pairs_csv(folder):
    return as_pairs(folder, ".csv")


def as_pairs_parquet(folder):
    return as_pairs(folder, ".parquet")


def as_three_lists(folder):
    write_texts(folder)
    for split, pairs in PAIRS.items():
        name = "my_pairs-val.csv" if split == "val" else f"{split}.csv"
        write_table(folder / name, ("id1", "id2", "label"), [(a, b, f"{label}.0") for a, b, label in pairs])
    return folder


def as_two_tables(folder):
    folder.mkdir(parents=True)
    write_table(
        folder / "some_papers.parquet",
        ("title", "id", "text"),
        [("t", name, text) for name, text in TEXTS.items()],
    )
    records = [(split, label, a, b) for split, pairs in PAIRS.items() for a, b, label in pairs]
    write_table(folder / "aan_pairs_subset.tsv", ("split", "label", "id1", "id2"), records)
    (folder / "notes.csv").write_text("not,a,list\n")
    return folder


def as_two_tables_with_kinds(folder):
    """Each id is there once as an abstract, with another text, and once in full."""
    folder.mkdir(parents=True)
    texts = [("abstract", name, b"short") for name in TEXTS] + [("full", *item) for item in TEXTS.items()]
    write_table(folder / "papers.parquet", ("kind", "id", "text"), texts)
    records = [("full", split, label, a, b) for split, pairs in PAIRS.items() for a, b, label in pairs]
    write_table(folder / "pairs.tsv", ("kind", "split", "label", "id1", "id2"), records)
    return folder


LRA_FORMS = (as_lra, as_tar, as_release_in_a_folder, as_zip)
PAIR_FORMS = (
    as_pairs,
    as_pairs_csv,
    as_pairs_parquet,
    as_three_lists,
    as_two_tables,
    as_two_tables_with_kinds,
)
