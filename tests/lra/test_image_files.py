"""CIFAR-10 from every form gives the same images; what is damaged or missing gives a message."""

import io
import tarfile
import zlib

import datasets
import numpy as np
import pytest
from image_samples import (
    IMAGES,
    LABELS,
    binary_batches,
    encoded,
    image_folder,
    oldest_batches,
    python_batches,
    read,
    rows,
    write_files,
    write_parquet,
    write_tar,
    write_zip,
)
from PIL import Image as Picture
from pyarrow import parquet

from lra.errors import UserError
from lra.tasks.image_files import CLASSES, default, located


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def tables(folder):
    write_parquet(folder / "cifar10_train.parquet", "train", ("png", "labels"), struct=False)
    write_parquet(folder / "cifar10_test.parquet", "test", ("image", "label"))
    write_parquet(folder / "other_train.parquet", "test")
    return folder


def hub_copy(folder):
    for part in IMAGES:
        write_parquet(folder / "plain_text" / f"{part}-00000-of-00001.parquet", part)
    return folder


def converted_hub_copy(folder):
    for part in IMAGES:
        write_parquet(folder / "plain_text" / part / "0000.parquet", part)
    return folder


IN_ORDER = {
    "hub copy": hub_copy,
    "converted hub copy": converted_hub_copy,
    "parquet by split": tables,
    "parquet with split": lambda p: write_parquet(p / "all.parquet"),
    "folder with one parquet": lambda p: write_parquet(p / "all.parquet").parent,
    **{
        f"python batches {protocol}": lambda p, protocol=protocol: write_files(p, python_batches(protocol))
        for protocol in range(6)
    },
    "Python 2 batches": lambda p: write_files(p, oldest_batches()),
    "batches without folder": lambda p: write_files(p, python_batches(prefix="")),
    "cifar-10-batches-py": lambda p: write_files(p, python_batches()) / "cifar-10-batches-py",
    "binary batches": lambda p: write_files(p, binary_batches()),
    "python archive": lambda p: write_tar(p / "cifar-10-python.tar.gz", python_batches()),
    "folder with python archive": lambda p: write_tar(p / "cifar-10-python.tar.gz", python_batches()).parent,
    "binary archive": lambda p: write_tar(p / "cifar-10-binary.tar.gz", binary_batches()),
    "zip of batches": lambda p: write_zip(p / "any.zip", python_batches(prefix="x/y/")),
    "folder with zip": lambda p: write_zip(p / "any.zip", binary_batches()).parent,
}
BY_CLASS = {
    "image folder": lambda p: write_files(p, image_folder()),
    "image folder with digits": lambda p: write_files(p, image_folder(named="0123456789")),
    "image tar": lambda p: write_tar(p / "images.tgz", image_folder("./cifar/")),
    "image zip": lambda p: write_zip(p / "images.zip", image_folder("deep/down/")),
}


@pytest.mark.parametrize("form", IN_ORDER)
def test_every_form_with_an_order_gives_the_same_rows(form, tmp_path):
    for part, (images, labels) in read(IN_ORDER[form](tmp_path / "s")).items():
        np.testing.assert_array_equal(images, IMAGES[part])
        np.testing.assert_array_equal(labels, LABELS[part])
        assert images.dtype == np.uint8 and labels.dtype == np.int64


@pytest.mark.parametrize("form", BY_CLASS)
def test_an_image_folder_gives_the_same_rows_class_by_class(form, tmp_path):
    for part, (images, labels) in read(BY_CLASS[form](tmp_path / "s")).items():
        order = np.argsort(LABELS[part], kind="stable")
        np.testing.assert_array_equal(images, IMAGES[part][order])
        np.testing.assert_array_equal(labels, LABELS[part][order])


def test_images_of_a_class_come_by_number(tmp_path):
    files = {
        f"{part}/cat/{i}.png": encoded(np.full((32, 32, 3), i, np.uint8))
        for part in IMAGES
        for i in (10, 9, 2)
    }
    assert read(write_files(tmp_path, files))["train"][0][:, 0, 0, 0].tolist() == [2, 9, 10]


def test_a_jpeg_is_decoded_as_pillow_does(tmp_path):
    files = {f"{part}/ship/1.jpg": encoded(IMAGES[part][0], "JPEG", quality=75) for part in IMAGES}
    expected = np.asarray(Picture.open(io.BytesIO(files["train/ship/1.jpg"])))
    images, labels = read(write_files(tmp_path, files))["train"]
    np.testing.assert_array_equal(images[0], expected)
    assert labels.tolist() == [8] and (expected != IMAGES["train"][0]).any()


def test_a_hub_id_is_loaded_by_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name, streaming):
        asked.append(name)
        return {part: [{"img": Picture.fromarray(x), "label": y} for x, y in rows(part)] for part in IMAGES}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name, chunks = default()
    assert name == "uoft-cs/cifar10"
    seen = [(chunk.part, chunk.images[0].tobytes(), chunk.labels.tolist()) for chunk in chunks()]
    assert seen == [(part, x.tobytes(), [y]) for part in IMAGES for x, y in rows(part)]
    assert asked == ["uoft-cs/cifar10"]


@pytest.mark.parametrize("place", ["cifar10/cifar-10-batches-py", "cifar10", "cifar-10-binary.tar.gz"])
def test_without_a_source_the_data_root_is_looked_at_first(place, root):
    if place.endswith("gz"):
        write_tar(root / "sources" / place, binary_batches())
    else:
        write_files(root / "sources" / place, python_batches(prefix=""))
    name, chunks = default()
    assert name == str((root / "sources" / place.split("/")[0]).resolve())
    assert sum(len(chunk.labels) for chunk in chunks()) == 24


@pytest.mark.parametrize("name", [None, "someone/pictures"])
def test_without_a_network_the_message_names_the_files_and_their_place(name, root, monkeypatch):
    def load_dataset(name, streaming):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chunks = (located(name) if name else default())[1]
    with pytest.raises(UserError, match="no network.*cifar-10-python.tar.gz.*task.source=DIR") as caught:
        next(chunks())
    assert str(root / "sources" / "cifar10") in str(caught.value)


@pytest.mark.parametrize(
    "source", ["/nowhere/cifar10", "cifar.zip", "./cifar10", "a/b/c", "cifar-10-python.tar.gz"]
)
def test_a_place_that_does_not_exist_is_not_taken_for_a_hub_id(source):
    with pytest.raises(UserError, match="there is no such file or folder.*Wanted"):
        located(source)


def test_a_folder_or_archive_without_images_is_refused_with_what_is_wanted(tmp_path):
    (tmp_path / "empty").mkdir()
    write_zip(tmp_path / "other.zip", {"text.txt": b"no"})
    (tmp_path / "text.txt").write_text("no")
    with pytest.raises(
        UserError, match="empty holds no CIFAR-10. Wanted: .*data_batch|empty holds no CIFAR-10"
    ):
        located(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="other.zip holds no CIFAR-10. Wanted"):
        read(tmp_path / "other.zip")
    with pytest.raises(UserError, match="text.txt cannot be read: it is neither a folder nor"):
        read(tmp_path / "text.txt")


def test_a_truncated_archive_is_named(tmp_path):
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", python_batches())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cifar-10-python.tar.gz cannot be read as an archive"):
        read(path)


@pytest.mark.parametrize(
    "files",
    [
        python_batches() | binary_batches(),
        python_batches() | python_batches(prefix="copy/"),
        python_batches() | image_folder(),
        image_folder("a/") | image_folder("b/"),
    ],
)
def test_two_copies_in_one_place_are_refused(files, tmp_path):
    with pytest.raises(
        UserError, match="holds CIFAR-10 more than once: .* in .*, .* in .*; name one of them"
    ):
        read(write_files(tmp_path, files))


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "images.tar", image_folder())
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo("train/cat/1.png")
            member.size = len(encoded(IMAGES["train"][0]))
            archive.addfile(member, io.BytesIO(encoded(IMAGES["train"][0])))
    assert read(path)
    with pytest.raises(UserError, match="twice.tar: train/cat/1.png is there twice"):
        read(tmp_path / "twice.tar")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_split_of_images_is_named(part, tmp_path):
    files = {name: content for name, content in image_folder().items() if not name.startswith(part)}
    with pytest.raises(UserError, match=f"has no {part} images. Wanted"):
        read(write_files(tmp_path, files))
    with pytest.raises(UserError, match=f"has no {part} images. Wanted"):
        read(write_parquet(tmp_path / "all.parquet", {"train": "test", "test": "train"}[part]))


def test_a_class_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        UserError, match="train/frogs/0019.png: label 'frogs' is not allowed; give 0 to 9 or one of"
    ):
        read(write_files(tmp_path, image_folder() | {"train/frogs/0019.png": b""}))


WRONG_PICTURES = {
    "size": (encoded(np.zeros((32, 31, 3), np.uint8)), "31 x 32 pixels"),
    "wide": (encoded(np.zeros((32, 64, 3), np.uint8)), "64 x 32 pixels"),
    "high": (encoded(np.zeros((64, 32, 3), np.uint8)), "32 x 64 pixels"),
    "alpha": (encoded(np.zeros((32, 32, 4), np.uint8)), r"32 x 32 pixels \(RGBA\)"),
    "cut": (encoded(IMAGES["train"][0])[:-200], "cannot be decoded"),
    "other": (b"GIF89a" + bytes(50), "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
}


@pytest.mark.parametrize("fault", WRONG_PICTURES)
def test_a_wrong_picture_is_named_in_a_folder_and_in_a_table(fault, tmp_path):
    content, message = WRONG_PICTURES[fault]
    files = image_folder() | {"train/cat/0006.png": content}
    with pytest.raises(UserError, match=f"train/cat/0006.png: .*{message}"):
        read(write_files(tmp_path / "folder", files))
    pictures = [encoded(x) for part in IMAGES for x, _ in rows(part)]
    pictures[2] = content
    path = write_parquet(tmp_path / "all.parquet", struct=False, img=pictures)
    with pytest.raises(UserError, match=f"all.parquet row 3: .*{message}"):
        read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 100_000])
def test_a_picture_that_claims_to_be_huge_is_not_decoded(side, tmp_path):
    content = bytearray(encoded(IMAGES["train"][0]))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match=r"0006.png: (a picture of 12000 x 12000|.*decompression bomb)"):
        read(write_files(tmp_path, image_folder() | {"train/cat/0006.png": bytes(content)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [0] * 23 + [10]}, "all.parquet row 24: label 10 is not allowed"),
        ({"label": [0] * 23 + [None]}, "row 24: label None is not allowed"),
        ({"split": ["train"] * 23 + ["val"]}, "row 24: split 'val' is not allowed; give train or test"),
        ({"img": [{"bytes": None, "path": "x.png"}] * 24}, "row 1: there is no picture, but NoneType"),
        ({"img": ["x.png"] * 24}, "row 1: there is no picture, but str"),
    ],
)
def test_a_faulty_row_of_a_table_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(write_parquet(tmp_path / "all.parquet", **changes))


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    with pytest.raises(
        UserError, match="no image column; it may be called img, .* It has: photo, label, split"
    ):
        read(write_parquet(tmp_path / "a.parquet", named=("photo", "label")))
    with pytest.raises(UserError, match="no label column; .* It has: img, kind, split"):
        read(write_parquet(tmp_path / "b.parquet", named=("img", "kind")))
    parquet.write_table(
        parquet.read_table(write_parquet(tmp_path / "c.parquet")).drop(["split"]), tmp_path / "d.parquet"
    )
    with pytest.raises(UserError, match="d.parquet has no column split"):
        read(tmp_path / "d.parquet")


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "all.parquet").write_bytes(b"broken")
    with pytest.raises(UserError, match="all.parquet cannot be read as parquet"):
        read(tmp_path / "all.parquet")


def test_class_names_do_as_labels_of_a_table(tmp_path):
    names = [CLASSES[label] for part in IMAGES for label in LABELS[part]]
    assert (
        read(write_parquet(tmp_path / "all.parquet", label=names))["test"][1].tolist()
        == LABELS["test"].tolist()
    )
