"""Pathfinder as a task: settings, variants, generated data, resuming, verification and what is shown."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lra.data.batch import Batches, decoding
from lra.data.prepare import prepare
from lra.data.store import prepare_command, store_path
from lra.data.verify import verify
from lra.data.writer import StoreWriter
from lra.errors import UserError
from lra.tasks import pathfinder as module
from lra.tasks import pathfinder_generator
from lra.tasks.pathfinder import Pathfinder32, Pathfinder64, Pathfinder128, Pathfinder256, PathX
from lra.tasks.pathfinder_generator import draw_images

SIZES = (Pathfinder32, Pathfinder64, Pathfinder128, Pathfinder256, PathX)
SMALL = Pathfinder32(num_images=200)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def rewrite(store, part, change):
    """Changes a stored file of the test split; `verify` also notices that its hash differs."""
    path = store.path / f"test.{part}.bin"
    numbers = np.fromfile(path, np.uint8)
    change(numbers)
    numbers.tofile(path)


def failed(task):
    return {finding.what for finding in verify(task, task.default_length) if not finding.ok}


@pytest.mark.parametrize("task", SIZES)
def test_an_image_of_every_size_is_one_document_of_all_its_pixels(task):
    assert task.default_length == task.size**2 and task().stored == "pixels"
    assert (task.documents, task.num_classes, task.vocab_size) == (1, 2, 257)
    task().check_length(task.size**2)


@pytest.mark.parametrize("task", SIZES)
@pytest.mark.parametrize("change", [-1, 1])
def test_no_other_length_is_allowed(task, change):
    with pytest.raises(UserError, match=f"not allowed for {task().name}.*length={task.size**2}"):
        task().check_length(task.size**2 + change)


def test_path_x_shares_the_folder_of_pathfinder128_hard_and_of_no_other_level():
    pathx = PathX(num_images=20)
    assert pathx.folder_name(16384) == Pathfinder128(num_images=20).folder_name(16384)
    assert pathx.variant(16384) == Pathfinder128(num_images=20).variant(16384)
    assert pathx.folder_name(16384) != Pathfinder128(num_images=20, level="easy").folder_name(16384)
    assert "level" not in {f.name for f in dataclasses.fields(PathX)}
    files = PathX(source="x").variant(16384)
    assert files == Pathfinder128(source="y").variant(16384) != pathx.variant(16384)


def test_what_decides_the_bytes_names_the_folder_and_nothing_else_does():
    tasks = (
        Pathfinder32(),
        Pathfinder64(),
        Pathfinder32(level="easy"),
        Pathfinder32(data_seed=1),
        Pathfinder32(num_images=100),
        Pathfinder32(source="a"),
        Pathfinder32(source="a", split="stored"),
        Pathfinder32(source="a", split_seed=7),
        Pathfinder32(source="a", level="easy"),
    )
    names = [task.folder_name(task.default_length) for task in tasks]
    assert len(set(names)) == len(names)
    variants = [json.dumps(task.variant(task.default_length)) for task in tasks]
    assert len(set(variants)) == len(variants)
    assert Pathfinder32(input="continuous", mean=0.1, std=0.2).folder_name(1024) == names[0]
    assert Pathfinder32(source="b").folder_name(1024) == names[5]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (Pathfinder32(), "pathfinder32-hard"),
        (PathX(), "pathfinder128-hard"),
        (Pathfinder64(level="easy", data_seed=3), "pathfinder64-easy-seed3"),
        (
            Pathfinder32(num_images=2000),
            "pathfinder32-hard (not the LRA setting; 2,000 images, not 200,000)",
        ),
        (Pathfinder32(source="x"), "pathfinder32-hard-files"),
        (Pathfinder32(source="x", split_seed=7), "pathfinder32-hard-files-split7"),
        (PathX(source="x", split="stored"), "pathfinder128-hard-files-stored"),
    ],
)
def test_the_name_of_a_variant_says_how_it_differs_from_lra(task, name):
    assert task.variant_name(task.default_length) == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": "test"}, "task.val=test: pathfinder32 has a validation split of its own"),
        ({"mean": 0.4}, "task.mean=0.4 would change nothing with task.input=tokens"),
        ({"std": 0.4}, "task.std=0.4 would change nothing with task.input=tokens"),
        ({"std": 0.0, "input": "continuous"}, "task.std=0.0 is out of range"),
        ({"split": "stored"}, "task.split=stored would change nothing with images that are generated"),
        ({"split_seed": 1}, "task.split_seed=1 would change nothing with images that are generated"),
        ({"source": "x", "data_seed": 1}, "task.data_seed=1 would change nothing .*task.source=x"),
        ({"source": "x", "num_images": 50}, "task.num_images=50 would change nothing .*task.source=x"),
        ({"source": "x", "split": "stored", "split_seed": 1}, "task.split_seed=1 .*task.split=stored"),
        ({"split_seed": 1 << 63, "source": "x"}, "task.split_seed=.* below 2"),
        ({"num_images": 9}, "task.num_images=9 is out of range; it must be at least 10"),
        ({"level": "hart"}, "task.level 'hart'; did you mean 'hard'"),
        ({"input": "patches"}, "task.input 'patches'"),
    ],
)
def test_a_setting_that_is_wrong_or_would_change_nothing_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Pathfinder32(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"input": "continuous", "mean": 0.0, "std": 1.0},
        {"source": "x", "split": "stored"},
        {"source": "x", "split_seed": 1},
        {"data_seed": 1, "num_images": 10, "level": "intermediate"},
    ],
)
def test_settings_that_change_something_are_allowed(settings):
    Pathfinder32(**settings).check()


def test_the_command_of_a_variant_names_its_settings():
    assert prepare_command(Pathfinder32(level="easy", num_images=20), 1024) == (
        "lra data prepare pathfinder32 length=1024 task.num_images=20 task.level=easy"
    )


def test_rows_are_the_generators_images_in_order_train_first():
    store = prepare(SMALL, 1024)
    pixels, labels, _ = draw_images(0, 32, "hard", 0, 200)
    assert [len(store.split(name)) for name in ("train", "val", "test")] == [160, 20, 20]
    stored = np.concatenate([store.split(name).tokens for name in ("train", "val", "test")])
    np.testing.assert_array_equal(stored, pixels.reshape(-1))
    found = np.concatenate([store.split(name).labels for name in ("train", "val", "test")])
    np.testing.assert_array_equal(found, labels)
    assert store.data_origin == "regenerated" and store.manifest["source"] == "generated here"
    assert store.manifest["generator"] == {"name": "pathfinder", "version": 1, "seed": 0}


@pytest.mark.parametrize("count", [10, 11, 19, 23])
def test_every_number_of_images_has_all_three_splits_without_gap_or_overlap(count):
    store = prepare(Pathfinder32(num_images=count), 1024)
    ends = [(first, end) for first, end in Pathfinder32(num_images=count).bounds().values()]
    assert ends[0][0] == 0 and ends[-1][1] == count
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert [len(store.split(name)) for name in ("train", "val", "test")] == [b - a for a, b in ends]


def test_the_number_of_workers_and_the_size_of_blocks_change_no_byte(monkeypatch):
    one = prepare(SMALL, 1024, workers=1).data_hash
    assert prepare(SMALL, 1024, workers=3, force=True).data_hash == one
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * 1024)
    assert prepare(SMALL, 1024, workers=2, force=True).data_hash == one
    assert prepare(SMALL, 1024, workers=5, force=True).data_hash == one


def test_settings_of_the_generator_change_the_images():
    hashes = {
        prepare(task, 1024).data_hash
        for task in (SMALL, *(dataclasses.replace(SMALL, **change) for change in (
            {"data_seed": 1}, {"level": "easy"}, {"level": "intermediate"}
        )))
    }  # fmt: skip
    assert len(hashes) == 4


@pytest.mark.parametrize("stop", [1, 100, 160, 165, 185, 199])
def test_an_interrupted_build_goes_on_where_it_stopped(stop, monkeypatch):
    whole = prepare(SMALL, 1024).data_hash
    monkeypatch.setattr(module, "BLOCK_BYTES", 5 * 1024)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)

    def interrupt(done, total):
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SMALL, 1024, force=True, workers=2, progress=interrupt)
    starts = []
    monkeypatch.setattr(
        pathfinder_generator,
        "draw_images",
        lambda seed, size, level, first, count: (
            starts.append(first) or draw_images(seed, size, level, first, count)
        ),
    )
    store = prepare(SMALL, 1024, force=True, workers=1)
    assert store.data_hash == whole
    assert starts and min(starts) == (stop - 1) // 5 * 5


def test_only_a_few_blocks_are_ahead_of_their_use(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1024)
    drawn, written, lock = [], [], threading.Lock()

    def draw(seed, size, level, first, count):
        with lock:
            drawn.append(first)
        return draw_images(seed, size, level, first, count)

    monkeypatch.setattr(pathfinder_generator, "draw_images", draw)

    class Writer:
        rows_done = staticmethod(lambda split: 0)
        describe = staticmethod(lambda **fields: None)

        def add_rows(self, split, flat, offsets, labels):
            written.extend(labels)
            assert len(drawn) - len(written) <= 3 * 2 + 1

    SMALL.build(Writer(), length=1024, workers=3)
    assert len(written) == 200


def test_progress_counts_up_to_all_images(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 64 * 1024)
    seen = []
    prepare(SMALL, 1024, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 200), (128, 200), (192, 200), (200, 200)]


def test_a_checkpoint_is_made_now_and_then(monkeypatch):
    made = []
    checkpoint = StoreWriter.checkpoint
    monkeypatch.setattr(StoreWriter, "checkpoint", lambda self: made.append(1) or checkpoint(self))
    prepare(SMALL, 1024)
    assert not made
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    prepare(SMALL, 1024, force=True)
    assert made


def test_a_checkpoint_is_made_once_its_seconds_have_passed_since_the_last_one(monkeypatch):
    now, made = [0.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "BLOCK_BYTES", 10 * 1024)
    monkeypatch.setattr(StoreWriter, "checkpoint", lambda self: made.append(now[0]))

    def four_seconds_a_block(done, total):
        now[0] += 4

    prepare(SMALL, 1024, progress=four_seconds_a_block)  # 20 blocks; a checkpoint is due after 10 s
    assert made == [12, 24, 36, 48, 60, 72]


def test_the_plan_says_what_a_build_takes():
    plan = Pathfinder32().plan(1024)
    assert (plan.source, plan.rows) == ("generated here", 200_000)
    assert plan.mib == pytest.approx(200_000 * 1033 / 2**20)
    assert PathX().plan(16384).seconds > plan.seconds
    with pytest.raises(UserError, match="task.source=nowhere does not exist"):
        Pathfinder32(source="nowhere").plan(1024)


def test_verify_is_satisfied_with_a_generated_set():
    prepare(SMALL, 1024)
    assert failed(SMALL) == set()
    what = {finding.what for finding in verify(SMALL, 1024)}
    assert {"val grey levels", "val label balance", "val drawn again", "val image sizes"} <= what


def test_a_generated_image_in_two_splits_is_a_fault(monkeypatch):
    def draw_last_as_first(seed, size, level, first, count):
        pixels, labels, margins = draw_images(seed, size, level, first, count)
        if first + count == 200:
            pixels[-1] = draw_images(seed, size, level, 0, 1)[0][0]
        return pixels, labels, margins

    monkeypatch.setattr(pathfinder_generator, "draw_images", draw_last_as_first)
    prepare(SMALL, 1024)
    assert failed(SMALL) == {"disjoint splits"}


@pytest.mark.parametrize("row", [0, 19])
def test_verify_notices_a_pixel_that_is_not_the_generators(row):
    def change(pixels):
        place = row * 1024 + int(np.flatnonzero(pixels[row * 1024 : (row + 1) * 1024] == 0)[0])
        pixels[place] = 9

    rewrite(prepare(SMALL, 1024), "tokens", change)
    assert "test drawn again" in failed(SMALL)


@pytest.mark.parametrize(("level", "neighbour"), [(255, 254), (0, 1)])
def test_verify_notices_an_image_without_its_full_range(level, neighbour):
    rewrite(prepare(SMALL, 1024), "tokens", lambda pixels: pixels.__setitem__(pixels == level, neighbour))
    finding = next(f for f in verify(SMALL, 1024) if f.what == "test grey levels")
    assert not finding.ok and finding.detail == "20 images are not from 0 to 255"


def test_verify_notices_labels_that_are_no_fair_coin():
    rewrite(prepare(SMALL, 1024), "labels", lambda labels: labels.fill(1))
    assert {"test label balance", "test drawn again"} <= failed(SMALL)


def test_verify_notices_a_wrong_label_alone():
    rewrite(prepare(SMALL, 1024), "labels", lambda labels: labels.__setitem__(0, 1 - labels[0]))
    assert "test drawn again" in failed(SMALL) and "test label balance" not in failed(SMALL)


def test_statistics_are_means_over_images():
    store = prepare(SMALL, 1024)
    counted = SMALL.statistics(store.split("train"))
    images = store.split("train").tokens.reshape(160, 1024).astype(float)
    assert counted["pixel mean"] == round(images.mean(), 3)
    assert counted["pixel std of an image"] == round(images.std(1).mean(), 3)
    shares = counted["pixels of an image"]
    assert shares["0"] == pytest.approx((images == 0).mean())
    assert shares["255"] == pytest.approx((images == 255).mean())


@pytest.mark.parametrize(
    ("task", "shape"),
    [(Pathfinder32, (16, 32)), (Pathfinder64, (32, 64)), (PathX, (32, 64)), (Pathfinder256, (32, 64))],
)
def test_an_image_is_shown_as_lines_of_shades(task, shape):
    size = task.size
    pixels = np.zeros((size, size), np.uint8)
    pixels[-1, -1], pixels[0, 0] = 255, 128
    lines = task().decode(pixels.reshape(-1), []).split("\n")
    assert (len(lines), len(lines[0])) == shape and len({len(line) for line in lines}) == 1
    assert lines[-1][-1] == "@" and lines[0][0] == "*"
    assert set("".join(lines)) == {"@", "*", " "}


def test_inputs_are_ids_or_scaled_values_of_the_same_pixels():
    store = prepare(SMALL, 1024)
    split = store.split("val")
    pixels = split.tokens.reshape(20, 1024)

    def inputs(task):
        task.check()
        batches = Batches(
            split,
            documents=1,
            length=1024,
            padded_length=1024,
            batch_size=4,
            device=torch.device("cpu"),
            packed=False,
            **decoding(task),
        )
        return batches.gather(np.arange(4)).inputs.numpy()

    np.testing.assert_array_equal(inputs(SMALL), pixels[:4].astype(int) + 1)
    values = inputs(dataclasses.replace(SMALL, input="continuous"))
    np.testing.assert_allclose(values[..., 0], (pixels[:4] / 255 - 0.5) / 0.5, atol=1e-6)
    values = inputs(dataclasses.replace(SMALL, input="continuous", mean=0.0, std=1.0))
    np.testing.assert_allclose(values[..., 0], pixels[:4] / 255, atol=1e-6)


def test_the_other_sizes_are_built_and_verified_too():
    for task in (Pathfinder64(level="easy", num_images=10), PathX(num_images=10)):
        store = prepare(task, task.default_length)
        assert set(store.split("test").lengths) == {task.default_length}
        assert failed(task) == set()
    assert store_path(PathX(num_images=10), 16384) == store_path(Pathfinder128(num_images=10), 16384)
