"""What is damaged, missing or there twice among LRA's Pathfinder files gives a message that names it."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from pathfinder_samples import (
    HARD,
    as_folder,
    as_tar,
    level_files,
    line,
    pixels_of,
    png,
    refused,
    under,
    with_the_known_empty_image,
)

from lra.data.prepare import prepare
from lra.errors import UserError
from lra.tasks.pathfinder import Pathfinder32


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def truncated(content):
    return content[: len(content) // 2]


def damaged(content):
    middle = len(content) // 2
    return (
        content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )


def bomb():
    """A small PNG of 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"IDAT" + zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in (chunk, data, b"IEND")
    )


SQUARE = pixels_of(2, 0, 64)
WIDE = png(np.zeros((32, 32), np.uint16))
FIRST = "imgs/2/sample_0.png"
TABLE = "metadata/2.npy"
NUMPY = io.BytesIO()
np.save(NUMPY, np.array([["imgs/2", "sample_0.png", "0", "1"]]))


@pytest.mark.parametrize("form", ["folder", "tar.gz", "zip"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (FIRST, lambda content: b"", "sample_0.png has zero bytes; get it anew"),
        (FIRST, truncated, "sample_0.png cannot be read as a PNG image"),
        (FIRST, damaged, "sample_0.png cannot be read as a PNG image"),
        (FIRST, lambda content: b"GIF89a" + bytes(60), "sample_0.png is not a PNG image"),
        (FIRST, lambda content: png(SQUARE), "sample_0.png has 64 x 64 pixels, not 32 x 32"),
        (FIRST, lambda content: png(SQUARE[:32]), "sample_0.png has 64 x 32 pixels, not 32 x 32"),
        (FIRST, lambda content: png(SQUARE[:, :32]), "sample_0.png has 32 x 64 pixels, not 32 x 32"),
        (FIRST, lambda content: bomb(), "sample_0.png has 60000 x 60000 pixels, not 32 x 32"),
        (FIRST, lambda content: WIDE, "sample_0.png has pixels of mode I;16, not 8 bits"),
        (TABLE, lambda content: NUMPY.getvalue(), "2.npy is a NumPy file.*unpickled.*plain text"),
        (TABLE, lambda content: b"\xff\xfe\x00", "2.npy is not text"),
        (TABLE, lambda content: b"imgs/2 sample_0.png 0\n", "2.npy line 1: 3 fields, at least 4"),
        (TABLE, lambda content: line(2, 0, 2).encode(), "2.npy line 1: label '2' is not allowed"),
        (TABLE, lambda content: b"\n" + line(2, 0, "1.0").encode(), "2.npy line 2: label '1.0'"),
        (TABLE, lambda content: content + line(2, 4).encode(), "list imgs/2/sample_4.png twice"),
        (
            TABLE,
            lambda content: content + line(2, 10).encode() + line(2, 11).encode(),
            r"is not complete: the metadata list 32 images, 2 of them are not there \(the first is "
            r"imgs/2/sample_10.png\)",
        ),
    ],
)
def test_a_fault_is_named_with_its_place(name, change, message, form, tmp_path):
    files = level_files()
    refused(files | {name: change(files[name])}, tmp_path, message, form)


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
@pytest.mark.parametrize("change", [lambda files: files.pop(TABLE), lambda files: files.update({TABLE: b""})])
def test_a_batch_whose_table_is_missing_or_empty_is_refused(change, form, tmp_path):
    files = level_files()
    change(files)
    refused(files, tmp_path, r"not complete: 10 images are of batches .*\(metadata/2.npy\)", form)


def test_an_image_listed_by_two_tables_is_refused(tmp_path):
    refused(
        level_files() | {"metadata/3.npy": line(2, 0).encode()}, tmp_path, "list imgs/2/sample_0.png twice"
    )


@pytest.mark.parametrize("name", ["metadata/all.npy", "metadata/02.npy"])
def test_a_table_that_is_not_named_by_a_batch_of_its_own_is_refused(name, tmp_path):
    refused(level_files() | {name: b""}, tmp_path, "a table is named by its batch, a number that occurs once")


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("part", ["imgs", "metadata"])
def test_a_copy_without_one_of_its_two_parts_is_refused(part, form, tmp_path):
    files = {name: content for name, content in level_files().items() if not name.startswith(part)}
    refused(files, tmp_path, f"has no {part}/ with anything in it", form)


def test_an_image_that_is_twice_in_an_archive_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "s", "w") as archive:
        for name, content in [*level_files().items(), (FIRST, png(pixels_of(2, 0)))]:
            archive.writestr(name, content)
    with pytest.raises(UserError, match="sample_0.png is there twice"):
        prepare(Pathfinder32(source=str(tmp_path / "s")), 1024)


def test_a_truncated_archive_is_refused(tmp_path):
    source = as_tar(level_files(), tmp_path / "s.tar.gz")
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cannot be read as an archive"):
        prepare(Pathfinder32(source=str(source)), 1024)


def test_an_archive_whose_names_lead_out_of_it_is_refused(tmp_path):
    refused(under("../x", level_files()), tmp_path, "leads out of the archive", "tar")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_source_without_pathfinder_is_refused_with_what_is_wanted(form, tmp_path):
    refused({"listops-1000/basic_train.tsv": b""}, tmp_path, f"Wanted: .*pathfinder32/{HARD}", form)


def test_a_source_that_is_no_folder_or_archive_is_refused(tmp_path):
    (tmp_path / "text").write_text("no archive")
    for name, what in (("text", "is neither a folder nor a tar or zip archive"), ("none", "does not exist")):
        with pytest.raises(UserError, match=f"{what}.*Wanted"):
            prepare(Pathfinder32(source=str(tmp_path / name)), 1024)


@pytest.mark.parametrize(
    "name", ["curv_baseline", "curv_contour_length_9", "pathfinder64", f"pathfinder64/{HARD}"]
)
def test_a_folder_that_by_its_name_is_another_level_or_size_is_refused(name, tmp_path):
    place = as_folder(level_files(), tmp_path / name)
    with pytest.raises(UserError, match="is not pathfinder32 of level hard by its name"):
        prepare(Pathfinder32(source=str(place)), 1024)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_same_set_in_two_places_is_refused(form, tmp_path):
    files = under(f"pathfinder32/{HARD}", level_files())
    refused(files | under("lra_release", files), tmp_path, "pathfinder32 is there twice", form)


def test_the_same_empty_image_of_another_level_is_a_fault(tmp_path):
    refused(with_the_known_empty_image(), tmp_path, "imgs/0/sample_172.png has zero bytes; get it anew")
