"""Image: grey pixels by both rules, the held-out tenth by both rules, and what counts as CIFAR-10."""

import hashlib
import io
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch
from image_samples import python_batches, write_files, write_tar
from PIL import Image as Picture
from pyarrow import parquet

from lra.data.prepare import prepare
from lra.data.store import store_path
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks import image as module
from lra.tasks.image import Image, gray_pil, gray_tf, held_out
from lra.tasks.image_files import CLASSES

RNG = np.random.default_rng(3)
COUNTS = {"train": 43, "test": 10}
IMAGES = {part: RNG.integers(0, 256, (count, 32, 32, 3), np.uint8) for part, count in COUNTS.items()}
LABELS = {part: RNG.integers(0, 10, count) for part, count in COUNTS.items()}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def encoded(image):
    file = io.BytesIO()
    Picture.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write(folder, images=IMAGES, labels=LABELS):
    folder.mkdir()
    for part in images:
        table = pa.table({"img": [encoded(image) for image in images[part]], "label": labels[part]})
        parquet.write_table(table, folder / f"{part}.parquet")
    return str(folder)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source")


def stored(store, name):
    split = store.split(name)
    return np.asarray(split.tokens).reshape(-1, 32, 32), split.labels.tolist()


def assert_rows(store, name, part, rows, rule=gray_pil):
    pixels, labels = stored(store, name)
    np.testing.assert_array_equal(pixels, rule(IMAGES[part][rows]))
    assert labels == LABELS[part][rows].tolist()


def test_gray_pil_is_pillows_conversion():
    colours = np.concatenate([IMAGES["train"].reshape(-1, 3), [[0, 0, 0], [255, 255, 255]]]).astype(np.uint8)
    expected = np.asarray(Picture.fromarray(colours[None]).convert("L"))[0]
    np.testing.assert_array_equal(gray_pil(colours), expected)


@pytest.mark.parametrize(
    ("colour", "pil", "tf"),
    [
        ((0, 0, 0), 0, 0),
        ((255, 255, 255), 255, 255),  # tf: 0.9999 x 255.5 = 255.47
        ((255, 0, 0), 76, 76),  # pil: 76.2; tf: 76.4
        ((0, 255, 0), 150, 149),  # pil: 149.7; tf: 149.98
        ((0, 0, 255), 29, 29),  # both 29.1
        ((1, 1, 1), 1, 1),
        ((100, 150, 200), 141, 141),  # pil: 140.8; tf: 140.74 x 255.5 / 255 = 141.02
        ((90, 60, 30), 66, 65),  # pil: 65.55; tf: 65.541 x 255.5 / 255 = 65.67
        ((10, 20, 30), 18, 18),
    ],
)
def test_gray_values_are_those_computed_by_hand(colour, pil, tf):
    red, green, blue = colour
    exact = (0.2989 * red + 0.5870 * green + 0.1140 * blue) * 255.5 / 255
    assert (
        gray_pil(np.array(colour, np.uint8)) == pil == int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)
    )
    assert gray_tf(np.array(colour, np.uint8)) == tf == int(exact)


def test_the_two_rules_differ_by_at_most_one_level_and_often():
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1)
    difference = gray_pil(colours).astype(int) - gray_tf(colours)
    assert set(np.unique(difference)) == {0, 1} and 0.2 < difference.mean() < 0.3


def test_gray_tf_of_all_colours_is_pinned():
    colours = np.indices((1, 256, 256), np.uint8).reshape(3, -1).T.copy()
    digest = hashlib.sha256()
    for red in range(256):
        colours[:, 0] = red
        digest.update(gray_tf(colours).tobytes())
    assert digest.hexdigest() == "824a76d81dad2c5a2cf1fa0b2c0a5afe7d871ec2970e4fa2809b53ddbecdca93"


def test_each_rule_is_a_variant_with_its_own_pixels(source):
    pil, tf = (prepare(Image(source=source, gray=rule, val="test"), 1024) for rule in ("pil", "tf"))
    assert pil.path != tf.path and "cifar10-gray-tf" in tf.path.name
    assert_rows(pil, "test", "test", slice(None))
    assert_rows(tf, "test", "test", slice(None), gray_tf)


def test_the_held_out_tenth_is_that_of_random_split(source):
    rows = torch.arange(43)
    generator = torch.Generator().manual_seed(42)
    train, val = torch.utils.data.random_split(rows, (38, 5), generator=generator)
    store = prepare(Image(source=source), 1024)
    assert_rows(store, "train", "train", train.indices)
    assert_rows(store, "val", "train", val.indices)
    assert_rows(store, "test", "test", slice(None))


def test_the_held_out_rows_of_cifar10_are_pinned():
    rows = held_out(50_000, "random", 42)
    assert len(rows["train"]) == 45_000 and len(rows["val"]) == 5_000
    assert np.array_equal(np.sort(np.concatenate([rows["train"], rows["val"]])), np.arange(50_000))
    digest = hashlib.sha256(np.sort(rows["val"]).astype("<i4").tobytes()).hexdigest()
    assert digest == "b5c85ed3bceb88d8dcd8a9c25aeda91fb7ade4e716077c5184d9697c40988f53"


def test_the_seed_decides_which_rows_are_held_out(source):
    first, second = prepare(Image(source=source), 1024), prepare(Image(source=source, data_seed=7), 1024)
    assert first.path != second.path and "seed7" in second.data_variant
    assert_rows(second, "val", "train", held_out(43, "random", 7)["val"])
    assert stored(first, "val")[1] != stored(second, "val")[1]


def test_the_last_tenth_is_held_out_in_the_order_of_the_source(source):
    store = prepare(Image(source=source, split="stored"), 1024)
    assert_rows(store, "train", "train", slice(0, 38))
    assert_rows(store, "val", "train", slice(38, None))
    rows = held_out(50_000, "stored", 42)
    assert rows["train"].tolist() == list(range(45_000)) and rows["val"][0] == 45_000


def test_the_last_tenth_of_a_source_that_is_sorted_by_class_is_refused(tmp_path):
    source = write(tmp_path / "s", labels={part: np.sort(labels) for part, labels in LABELS.items()})
    with pytest.raises(UserError, match="rows class by class, so task.split=stored would hold out one class"):
        prepare(Image(source=source, split="stored"), 1024)
    assert prepare(Image(source=source), 1024).split("val").labels.max() < 10


def test_a_source_of_one_class_has_no_order_of_classes_to_refuse(tmp_path):
    source = write(tmp_path / "s", labels={part: np.full_like(labels, 3) for part, labels in LABELS.items()})
    assert len(prepare(Image(source=source, split="stored"), 1024).split("val")) == 5


def test_validation_on_the_test_split_trains_on_all_rows_and_says_so(source):
    store = prepare(Image(source=source, val="test"), 1024)
    assert_rows(store, "train", "train", slice(None))
    assert stored(store, "val")[1] == stored(store, "test")[1] == LABELS["test"].tolist()
    assert "validation is the test split" in store.data_variant


@pytest.mark.parametrize(("val", "rows"), [("heldout", 60_000), ("test", 70_000)])
def test_the_plan_counts_the_test_split_twice_where_it_is_validation_too(source, val, rows):
    plan = Image(source=source, val=val).plan(1024)
    assert (plan.source, plan.rows) == (source, rows)
    assert plan.mib == pytest.approx(rows * 1033 / 2**20)


@pytest.mark.parametrize("val", ["heldout", "test"])
def test_a_prepared_variant_passes_verification(source, val):
    prepare(Image(source=source, val=val), 1024)
    findings = verify(Image(source=source, val=val), 1024)
    assert [finding for finding in findings if not finding.ok] == []
    assert "train image sizes" in {finding.what for finding in findings}


def test_an_archive_in_another_order_gives_the_same_store_as_its_folder(tmp_path):
    folder = write_files(tmp_path / "folder", python_batches())
    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", python_batches())
    store = prepare(Image(source=str(folder)), 1024)
    assert prepare(Image(source=str(archive)), 1024, force=True).data_hash == store.data_hash


def test_pixels_are_stored_raw_whatever_the_input(source):
    tokens = prepare(Image(source=source), 1024)
    assert tokens.vocab == [] and tokens.vocab_size == 257 and tokens.split("train").tokens.dtype == np.uint8
    assert stored(tokens, "train")[0].min() < 5
    continuous = Image(source=source, input="continuous", mean=0.5, std=0.25)
    assert store_path(continuous, 1024) == tokens.path
    assert continuous.scaling == (127.5, 63.75) and continuous.input == "continuous"


def test_the_default_scaling_is_that_of_s4():
    assert Image().input == "tokens"
    assert Image(input="continuous").scaling == pytest.approx((122.6, 61.0), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mean": 0.5},
            "task.mean=0.5 would change nothing with task.input=tokens; set task.mean=0.48",
        ),
        ({"std": 0.5}, "task.std=0.5 would change nothing with task.input=tokens"),
        ({"val": "test", "split": "stored"}, "task.split=stored would change nothing with task.val=test"),
        ({"val": "test", "data_seed": 1}, "task.data_seed=1 would change nothing with task.val=test"),
        ({"split": "stored", "data_seed": 1}, "task.data_seed=1 would change nothing with task.split=stored"),
        ({"gray": "pill"}, "unknown task.gray 'pill'; did you mean 'pil'"),
        ({"split": "first"}, "unknown task.split 'first'"),
        ({"input": "pixels"}, "unknown task.input 'pixels'"),
        ({"input": "continuous", "std": 0.0}, "task.std=0.0 is out of range"),
        ({"input": "continuous", "mean": float("nan")}, "not a finite number"),
        ({"data_seed": 1 << 63}, "out of range"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Image(**settings).check()


@pytest.mark.parametrize("length", [1, 1023, 1025, 4096])
def test_the_length_is_fixed(length):
    with pytest.raises(UserError, match=f"length={length} is not allowed for image; .* length=1024"):
        Image().check_length(length)
    Image().check_length(1024)


def test_overrides_name_what_differs_from_the_defaults():
    assert Image().overrides(1024) == ["length=1024"]
    assert Image(data_seed=0, gray="tf").overrides(1024) == [
        "length=1024",
        "task.data_seed=0",
        "task.gray=tf",
    ]


def test_variants_are_pinned():
    assert Image().variant(1024) == {
        "task": "image", "reader": 1, "gray": "pil", "val": "heldout", "held_out": 0.1, "split": "random",
        "data_seed": 42,
    }  # fmt: skip
    assert Image(split="stored", gray="tf").variant(1024) == {
        "task": "image", "reader": 1, "gray": "tf", "val": "heldout", "held_out": 0.1, "split": "stored",
    }  # fmt: skip
    assert Image(val="test").variant(1024) == {"task": "image", "reader": 1, "gray": "pil", "val": "test"}
    names = [
        Image(**each).variant_name(1024) for each in ({}, {"split": "stored", "gray": "tf"}, {"data_seed": 1})
    ]
    assert names == ["cifar10-gray", "cifar10-gray-tf-stored", "cifar10-gray-seed1"]


def test_the_input_and_its_scaling_are_no_part_of_the_variant():
    for each in fields(Image):
        if each.name in ("input", "mean", "std", "source"):
            assert each.name not in Image().variant(1024)


def test_an_image_is_shown_in_shades():
    picture = np.zeros((32, 32), np.uint8)
    picture[0], picture[1, 0] = 255, 128
    lines = Image().decode(picture.reshape(-1), []).split("\n")
    assert [len(line) for line in lines] == [64] * 32
    assert lines[0] == "@" * 64 and lines[1] == "++" + " " * 62 and lines[2] == " " * 64
    assert Image().class_names() == list(CLASSES) and len(CLASSES) == Image.num_classes


def test_statistics_give_mean_and_deviation_of_the_pixels(source):
    split = prepare(Image(source=source, val="test"), 1024).split("train")
    pixels = gray_pil(IMAGES["train"]).astype(float)
    counted = Image().statistics(split)
    assert counted == {"pixel mean": round(pixels.mean(), 3), "pixel std": round(pixels.std(), 3)}


def balanced(count):
    return RNG.permutation(np.repeat(np.arange(10), count))


@pytest.fixture
def small_cifar10(monkeypatch):
    """CIFAR-10 with 40 and 10 rows, of which two images each are known."""
    labels = {"train": balanced(4), "test": balanced(1)}
    images = {part: IMAGES[part][: len(each)] for part, each in labels.items()}
    monkeypatch.setattr(module, "ROWS", {"train": 40, "test": 10})
    known, order = {}, {}
    for part, each in labels.items():
        order[part] = hashlib.sha256(bytes(each.tolist())).hexdigest()
        known[part] = {
            hashlib.blake2b(bytes([each[i]]) + images[part][i].tobytes(), digest_size=8).hexdigest()
            for i in (1, 7)
        }
    monkeypatch.setattr(module, "_LABELS", order)
    monkeypatch.setattr(module, "_KNOWN", known)
    return images, labels


def origin(source, **settings):
    manifest = prepare(Image(source=source, **settings), 1024, force=True).manifest
    return manifest["data_origin"], " ".join(manifest["notes"])


@pytest.mark.parametrize("gray", ["pil", "tf"])
def test_only_the_known_images_with_the_right_counts_are_original(tmp_path, small_cifar10, gray):
    images, labels = small_cifar10
    kind, notes = origin(write(tmp_path / "a", images, labels), gray=gray)
    assert kind == "original" and "all of 4 known images" in notes and "in the order of CIFAR-10" in notes
    shuffled = {part: RNG.permutation(len(each)) for part, each in labels.items()}
    source = write(
        tmp_path / "b",
        {p: images[p][i] for p, i in shuffled.items()},
        {p: labels[p][i] for p, i in shuffled.items()},
    )
    kind, notes = origin(source, gray=gray)
    assert kind == "original" and "in another order" in notes


def test_one_pixel_off_makes_it_a_lossy_copy(tmp_path, small_cifar10):
    images, labels = small_cifar10
    images = {part: each.copy() for part, each in images.items()}
    images["train"][7, 31, 31, 2] ^= 1
    kind, notes = origin(write(tmp_path / "a", images, labels))
    assert kind == "lossy_copy" and "3 of 4 known images" in notes


def test_a_known_image_counts_only_in_its_own_part(tmp_path, small_cifar10):
    images, labels = small_cifar10
    images = {part: each.copy() for part, each in images.items()}
    place = int(np.flatnonzero(labels["test"] == labels["train"][1])[0])
    images["train"][1], images["test"][place] = images["test"][place].copy(), images["train"][1].copy()
    kind, notes = origin(write(tmp_path / "a", images, labels))
    assert kind == "lossy_copy" and "of 4 known images" in notes


def test_other_counts_make_it_a_stand_in(tmp_path, small_cifar10):
    images, labels = small_cifar10
    kind, notes = origin(write(tmp_path / "a", images, labels | {"test": np.array([0, *range(1, 9), 0])}))
    assert kind == "stand_in" and "not CIFAR-10" in notes
    fewer = {part: each[:-1] for part, each in images.items()}
    kind, _ = origin(write(tmp_path / "b", fewer, {part: each[:-1] for part, each in labels.items()}))
    assert kind == "stand_in"


def test_the_known_images_are_distinct_and_of_both_parts():
    known = {part: len(digests) for part, digests in module._KNOWN.items()}
    assert known == {"train": 48, "test": 16}
    assert not module._KNOWN["train"] & module._KNOWN["test"]
    assert {len(digest) for digests in module._KNOWN.values() for digest in digests} == {16}


def test_a_fault_in_the_source_leaves_nothing_behind(tmp_path):
    source = write(tmp_path / "s", labels=LABELS | {"test": [0] * 9 + [11]})
    with pytest.raises(UserError, match="test.parquet row 10: label 11"):
        prepare(Image(source=source), 1024)
    assert not store_path(Image(), 1024).exists()


def test_progress_counts_rows_and_never_exceeds_the_total(source, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "REPORT_EVERY", 10)
    monkeypatch.setattr(module, "ROWS", {"train": 20, "test": 10})
    prepare(Image(source=source), 1024, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 30), (20, 30), (30, 30), (40, 40), (50, 50)]
