"""LRA's Pathfinder files: every nesting and archive gives the same rows, and which of two copies is taken."""

import io

import numpy as np
import pytest
import torch
from pathfinder_samples import (
    FORMS,
    HARD,
    NESTINGS,
    ROWS,
    as_folder,
    as_tar,
    as_zip,
    expected,
    label_of,
    level_files,
    pixels_of,
    png,
    refused,
    released,
    stored,
    under,
    with_the_known_empty_image,
)
from PIL import Image

from lra.data.prepare import prepare
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks import pathfinder_files as module
from lra.tasks.pathfinder import Pathfinder32, Pathfinder64, PathX


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


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


def test_an_image_that_the_files_repeat_is_counted_and_no_fault(tmp_path):
    files = level_files()
    files["imgs/10/sample_0.png"] = files["imgs/2/sample_0.png"]  # rows of test and of train
    task = Pathfinder32(source=str(as_zip(files, tmp_path / "source")), split="stored")
    store = prepare(task, 1024)
    assert store.manifest["duplicates"]["between"] == {"train val": 0, "train test": 1, "val test": 0}
    assert all(finding.ok for finding in verify(task, 1024))


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


def test_nothing_of_the_copy_that_is_left_alone_stays_on_the_disk(good, broken, tmp_path):
    larger = broken | {"imgs/2/sample_99.png": broken["imgs/2/sample_0.png"]}
    source = as_tar(under(OUTER, larger) | under(INNER, good), tmp_path / "source")
    with open(tmp_path / "waiting", "w+b") as waiting:
        module._collect(source, 128, "hard", waiting, None)
    assert (tmp_path / "waiting").stat().st_size == 30 * 128 * 128


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
def test_a_single_pathfinder128_is_taken_and_not_trusted(prefix, form, good, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LRA_IMAGES", 30)
    files = under(f"{prefix}pathfinder128/{HARD}", good)
    store = prepare(PathX(source=str(FORMS[form](files, tmp_path / "s"))), 16384)
    assert (
        store.data_origin == "stand_in"
        and "this may be LRA's known broken copy" in store.manifest["notes"][1]
    )


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("places", [(INNER,), (f"lra_release/pathfinder128/{HARD}", f"pathfinder128/{HARD}")])
def test_the_inner_pathfinder128_is_trusted_alone_or_beside_the_outer_one(
    places, form, good, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "LRA_IMAGES", 30)
    files = {name: content for place in places for name, content in under(place, good).items()}
    store = prepare(PathX(source=str(FORMS[form](files, tmp_path / "s"))), 16384)
    assert store.data_origin == "original" and "may be" not in " ".join(store.manifest["notes"])


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
