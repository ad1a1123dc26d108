"""LRA's Pathfinder files: every nesting and archive gives the same rows, every fault its own message."""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lra.data.prepare import prepare
from lra.data.store import store_path
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks import pathfinder_files as module
from lra.tasks.pathfinder import Pathfinder32, Pathfinder64, PathX

HARD = "curv_contour_length_14"
BATCHES = (10, 9, 2)  # as text 10 comes before 2
PER_BATCH = 10


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def pixels_of(batch, index, size=32):
    return np.random.default_rng([batch, index]).integers(0, 256, (size, size)).astype(np.uint8)


def label_of(batch, index):
    return (batch + index) * 7 % 3 % 2


def png(pixels, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def line(batch, index, label=None):
    label = label_of(batch, index) if label is None else label
    return f"imgs/{batch} sample_{index}.png {index} {label} 1.0 14 4 2 0.5 1 1\n"


def level_files(size=32):
    """{name within the level: content} in LRA's layout. Each table lists its images in falling order."""
    files = {}
    for batch in BATCHES:
        for index in range(PER_BATCH):
            files[f"imgs/{batch}/sample_{index}.png"] = png(pixels_of(batch, index, size))
        lines = [line(batch, index) for index in reversed(range(PER_BATCH))]
        files[f"metadata/{batch}.npy"] = "".join(lines).encode()
    return files


ROWS = [(batch, index) for batch in sorted(BATCHES) for index in reversed(range(PER_BATCH))]
"""(batch, index) of all images in stored order."""


def under(prefix, files):
    return {f"{prefix}/{name}": content for name, content in files.items()}


def as_folder(files, place):
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def as_tar(files, place, mode="w:gz"):
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


def as_zip(files, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return place


FORMS = {
    "folder": as_folder,
    "tar.gz": as_tar,
    "tar": lambda files, place: as_tar(files, place, "w"),
    "zip": as_zip,
}
NESTINGS = ("", HARD, f"pathfinder32/{HARD}", f"lra_release/pathfinder32/{HARD}")
NESTINGS += (f"lra_release/lra_release/pathfinder32/{HARD}",)


def released(files, prefix="lra_release/lra_release"):
    """A release around one level's files: other sizes and levels with broken contents, and other tasks."""
    other = {"imgs/2/sample_0.png": b"", "metadata/2.npy": b"\x93NUMPY"}
    return {
        **under(f"{prefix}/pathfinder64/{HARD}", other),
        **under(f"{prefix}/pathfinder32/curv_baseline", other),
        **under(f"{prefix}/pathfinder32/{HARD}", files),
        **under(f"{prefix}/pathfinder32/curv_contour_length_9", other),
        f"{prefix}/tsv_data/new_aan_pairs.train.tsv": b"text",
        "lra_release/listops-1000/basic_train.tsv": b"text",
    }


def stored(store, name):
    split = store.split(name)
    return [
        (split.tokens.reshape(len(split), -1)[i].tobytes(), int(split.labels[i])) for i in range(len(split))
    ]


def expected(rows):
    return [(pixels_of(*row).tobytes(), label_of(*row)) for row in rows]


def refused(files, tmp_path, message, form="zip", task=Pathfinder32):
    source = FORMS[form](files, tmp_path / f"source {form}")
    with pytest.raises(UserError, match=message):
        prepare(task(source=str(source)), task.default_length)
    assert not store_path(task(source=str(source)), task.default_length).exists()
    assert not list((tmp_path / "data").glob(".*partial*"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_and_form_gives_the_same_bytes(nesting, form, tmp_path):
    files = level_files()
    source = FORMS[form](under(nesting, files) if nesting else files, tmp_path / "source")
    store = prepare(Pathfinder32(source=str(source), split="stored"), 1024)
    assert stored(store, "train") == expected(ROWS[:24])
    assert stored(store, "val") == expected(ROWS[24:27])
    assert stored(store, "test") == expected(ROWS[27:])
    assert store.manifest["source"] == str(source)
    assert sorted(path.name for path in store.path.iterdir() if "images" in path.name) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_release_is_searched_for_the_size_and_level(form, tmp_path):
    source = FORMS[form](released(level_files()), tmp_path / "source")
    store = prepare(Pathfinder32(source=str(source), split="stored"), 1024)
    assert stored(store, "test") == expected(ROWS[27:])


def test_the_folders_within_a_release_can_be_named_themselves(tmp_path):
    place = as_folder(released(level_files()), tmp_path)
    inner = place / "lra_release" / "lra_release"
    for source in (place / "lra_release", inner, inner / "pathfinder32", inner / "pathfinder32" / HARD):
        store = prepare(Pathfinder32(source=str(source)), 1024, force=True)
        assert sum(store.manifest["splits"][name]["rows"] for name in ("train", "val", "test")) == 30


def test_a_folder_with_lras_archive_is_read_from_it(tmp_path):
    as_tar(released(level_files()), tmp_path / "sources" / "lra_release.gz")
    store = prepare(Pathfinder32(source=str(tmp_path / "sources"), split="stored"), 1024)
    assert stored(store, "test") == expected(ROWS[27:])


def test_members_of_an_archive_may_come_in_any_order(tmp_path):
    files = list(level_files().items())
    hashes = set()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(files))
        source = as_tar(dict(files[i] for i in order), tmp_path / "source.tar", "w")
        hashes.add(prepare(Pathfinder32(source=str(source)), 1024, force=True).data_hash)
    assert len(hashes) == 1


def test_the_random_split_is_that_of_torchs_random_split_seeded_with_42(tmp_path):
    source = as_zip(level_files(), tmp_path / "source")
    store = prepare(Pathfinder32(source=str(source)), 1024)
    parts = torch.utils.data.random_split(ROWS, [24, 3, 3], torch.Generator().manual_seed(42))
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        assert stored(store, name) == expected(part)
    other = prepare(Pathfinder32(source=str(source), split_seed=1), 1024)
    assert other.path != store.path
    parts = torch.utils.data.random_split(ROWS, [24, 3, 3], torch.Generator().manual_seed(1))
    assert stored(other, "val") == expected(parts[1])


@pytest.mark.parametrize(("count", "train"), [(10, 8), (19, 17), (29, 25)])
def test_the_random_splits_sizes_are_s4s(count, train):
    sizes = [len(rows) for rows in module._splits(count, 42).values()]
    assert sizes == [train, int(0.1 * count), int(0.1 * count)]
    assert sorted(np.concatenate(list(module._splits(count, 42).values()))) == list(range(count))


def test_the_stored_split_is_80_10_10_in_order():
    assert {name: rows.tolist() for name, rows in module._splits(15, None).items()} == {
        "train": list(range(12)),
        "val": [12],
        "test": [13, 14],
    }


def test_a_set_from_files_passes_verification_and_is_not_compared_with_the_generator(tmp_path):
    task = Pathfinder32(source=str(as_zip(level_files(), tmp_path / "source")))
    prepare(task, 1024)
    findings = verify(task, 1024)
    assert all(finding.ok for finding in findings)
    assert not [finding for finding in findings if "drawn again" in finding.what]


def test_fewer_images_than_lras_are_a_stand_in(tmp_path):
    store = prepare(Pathfinder32(source=str(as_zip(level_files(), tmp_path / "s"))), 1024)
    assert store.data_origin == "stand_in"
    assert store.manifest["notes"] == ["30 images; LRA has 200,000 of each size and level"]


def test_as_many_images_as_lras_are_taken_for_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LRA_IMAGES", 30)
    store = prepare(Pathfinder32(source=str(as_zip(level_files(), tmp_path / "s"))), 1024)
    assert store.data_origin == "original"
    assert store.manifest["notes"] == [
        "30 images in LRA's layout, as many as it has; told by layout and count only"
    ]


def with_the_known_empty_image():
    files = {name.replace("/2", "/0"): content for name, content in level_files().items()}
    files["metadata/0.npy"] = b"".join(line(0, index).encode() for index in [*range(PER_BATCH), 172])
    return files | {"imgs/0/sample_172.png": b""}


def test_lras_one_empty_image_is_left_out_and_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LRA_IMAGES", 31)
    task = Pathfinder32(source=str(as_zip(with_the_known_empty_image(), tmp_path / "s")), level="easy")
    store = prepare(task, 1024)
    assert sum(store.manifest["splits"][name]["rows"] for name in ("train", "val", "test")) == 30
    assert store.data_origin == "original"
    assert "imgs/0/sample_172.png has zero bytes, as in LRA's release" in store.manifest["notes"][0]


def test_one_image_too_few_is_no_original_without_the_known_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LRA_IMAGES", 31)
    store = prepare(Pathfinder32(source=str(as_zip(level_files(), tmp_path / "s")), level="easy"), 1024)
    assert store.data_origin == "stand_in"


def test_the_same_empty_image_of_another_level_is_a_fault(tmp_path):
    refused(with_the_known_empty_image(), tmp_path, "imgs/0/sample_172.png has zero bytes; get it anew")


def test_images_that_no_table_lists_are_left_out_and_noted(tmp_path):
    files = level_files() | {"imgs/2/sample_99.png": png(pixels_of(2, 99))}
    store = prepare(Pathfinder32(source=str(as_zip(files, tmp_path / "s"))), 1024)
    assert "1 images that no metadata list are left out" in store.manifest["notes"]
    assert sum(store.manifest["splits"][name]["rows"] for name in ("train", "val", "test")) == 30


def test_hidden_files_are_passed_over(tmp_path):
    files = level_files() | {"metadata/._2.npy": b"\x00\x05", "imgs/2/._sample_0.png": b"\x00\x05"}
    store = prepare(Pathfinder32(source=str(as_zip(files, tmp_path / "s")), split="stored"), 1024)
    assert stored(store, "test") == expected(ROWS[27:])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_an_image_of_any_8_bit_mode_is_read_as_grey(mode, tmp_path):
    pixels = pixels_of(2, 0)
    files = level_files() | {"imgs/2/sample_0.png": png_of_mode(pixels, mode)}
    source = as_zip(files, tmp_path / "s")
    store = prepare(Pathfinder32(source=str(source), split="stored"), 1024)
    assert stored(store, "train")[9] == (pixels.tobytes(), label_of(2, 0))


def png_of_mode(pixels, mode):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "PNG")
    return out.getvalue()


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
        (FIRST, lambda content: png(pixels_of(2, 0, 64)), "sample_0.png has 64 x 64 pixels, not 32 x 32"),
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


# Of pathfinder128 LRA's archive has two copies, of which the outer one is broken.

INNER, OUTER = f"lra_release/lra_release/pathfinder128/{HARD}", f"lra_release/pathfinder128/{HARD}"


@pytest.fixture(scope="module")
def good():
    return level_files(128)


@pytest.fixture(scope="module")
def broken(good):
    """The same images under other labels."""
    return {
        name: content if name.endswith("png") else content.replace(b" 1 1.0", b" 0 1.0")
        for name, content in good.items()
    }


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
@pytest.mark.parametrize("inner_first", [True, False])
def test_of_both_copies_the_inner_one_is_taken_and_the_other_noted(form, inner_first, good, broken, tmp_path):
    copies = [under(INNER, good), under(OUTER, broken)]
    files = {k: v for copy in (copies if inner_first else copies[::-1]) for k, v in copy.items()}
    store = prepare(PathX(source=str(FORMS[form](files, tmp_path / "source")), split="stored"), 16384)
    assert store.split("train").labels.tolist() == [label_of(*row) for row in ROWS[:24]]
    notes = " ".join(store.manifest["notes"])
    assert f"{OUTER} was left alone: it is LRA's known broken copy" in notes


def test_both_copies_may_be_mixed_in_an_archive(good, broken, tmp_path):
    mixed = {}
    for name in good:
        mixed |= {f"{OUTER}/{name}": broken[name], f"{INNER}/{name}": good[name]}
    store = prepare(PathX(source=str(as_tar(mixed, tmp_path / "s")), split="stored"), 16384)
    assert store.split("train").labels.tolist() == [label_of(*row) for row in ROWS[:24]]
    assert stored(store, "test")[0][0] == pixels_of(*ROWS[27], 128).tobytes()


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
@pytest.mark.parametrize("strip", [0, 1])
def test_the_outer_copy_alone_beside_the_inner_release_is_refused(form, strip, broken, tmp_path):
    files = under(OUTER, broken) | {"lra_release/lra_release/listops-1000/basic_train.tsv": b"text"}
    files = {"/".join(name.split("/")[strip:]): content for name, content in files.items()}
    refused(files, tmp_path, "is the outer pathfinder128 .* a broken copy", form, PathX)


@pytest.mark.parametrize("depth", ["pathfinder128", f"pathfinder128/{HARD}"])
def test_the_outer_copy_is_refused_also_when_it_is_named_itself(depth, good, broken, tmp_path):
    place = as_folder(under(INNER, good) | under(OUTER, broken), tmp_path)
    with pytest.raises(UserError, match="is the outer pathfinder128"):
        prepare(PathX(source=str(place / "lra_release" / depth)), 16384)
    inner = place / "lra_release" / "lra_release" / depth
    assert prepare(PathX(source=str(inner)), 16384).data_origin == "stand_in"


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("prefix", ["", "lra_release/"])
def test_a_single_pathfinder128_without_an_inner_release_is_taken(prefix, form, good, tmp_path):
    files = under(f"{prefix}pathfinder128/{HARD}", good)
    store = prepare(PathX(source=str(FORMS[form](files, tmp_path / "s"))), 16384)
    assert store.manifest["notes"] == ["30 images; LRA has 200,000 of each size and level"]


def test_a_pathfinder128_beside_a_whole_unpacked_release_is_not_taken_for_the_broken_one(good, tmp_path):
    files = under(f"pathfinder128/{HARD}", good) | {
        "lra_release/lra_release/listops-1000/basic_train.tsv": b""
    }
    for form in ("folder", "tar"):
        store = prepare(PathX(source=str(FORMS[form](files, tmp_path / form))), 16384, force=True)
        assert sum(store.manifest["splits"][name]["rows"] for name in ("train", "val", "test")) == 30


def test_progress_counts_images(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_REPORT_EVERY", 10)
    seen = []
    source = as_zip(level_files(), tmp_path / "s")
    prepare(Pathfinder32(source=str(source)), 1024, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (30, 200_000) and {done for done, _ in seen} >= {10, 20, 30}


def test_rows_reach_the_writer_a_mib_at_a_time(tmp_path):
    sizes = []
    source = as_zip(level_files(), tmp_path / "s")
    with open(tmp_path / "waiting", "w+b") as waiting:
        found = module._collect(source, 32, "hard", waiting, None)
        places, labels = found.rows()

        class Writer:
            def add_rows(self, split, flat, offsets, labels):
                sizes.append(len(flat))

        module._hand_over(Writer(), "train", waiting, np.tile(places, 100), np.tile(labels, 100), 32)
    assert sum(sizes) == 3000 * 1024 and max(sizes) <= 1 << 20


def test_the_plan_of_files_allows_for_the_images_that_wait(tmp_path):
    source = as_zip(level_files(), tmp_path / "s")
    plan = Pathfinder32(source=str(source)).plan(1024)
    assert plan.rows == 200_000 and plan.mib > 2 * 200_000 * 1024 / 2**20
    with pytest.raises(UserError, match="holds no pathfinder64"):
        Pathfinder64(source=str(as_folder(under("pathfinder32", level_files()), tmp_path / "f"))).plan(4096)
