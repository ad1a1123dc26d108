"""Twenty-four small images in each form that CIFAR-10 comes in."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
from PIL import Image as Picture
from pyarrow import parquet

from lra.tasks.image_files import BATCHES, CLASSES, located

RNG = np.random.default_rng(0)
LABELS = {"train": np.arange(20)[::-1] % 10, "test": np.array([3, 1, 9, 0])}
IMAGES = {part: RNG.integers(0, 256, (len(each), 32, 32, 3), np.uint8) for part, each in LABELS.items()}


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    Picture.fromarray(image).save(file, form, **options)
    return file.getvalue()


def rows(part):
    return list(zip(IMAGES[part], LABELS[part].tolist(), strict=True))


def batches():
    """(name, planes [4 3072], labels) of the six batches."""
    planes = {part: images.transpose(0, 3, 1, 2).reshape(-1, 3072) for part, images in IMAGES.items()}
    for index, name in enumerate(BATCHES):
        part, first = ("test", 0) if name == "test_batch" else ("train", 4 * index)
        yield name, planes[part][first : first + 4], LABELS[part][first : first + 4].tolist()


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def python_batches(protocol=2, prefix="cifar-10-batches-py/", **changes):
    files = {f"{prefix}batches.meta": b"not looked at", f"{prefix}readme.html": b""}
    for name, planes, labels in batches():
        batch = {
            b"batch_label": name.encode(),
            b"labels": labels,
            b"data": planes,
            b"filenames": [b"x.png"] * 4,
        }
        files[prefix + name] = pickle.dumps(batch, protocol)
    return files | {prefix + name: content for name, content in changes.items()}


def python2_batch(labels, planes):
    """A batch as Python 2 wrote it: str for everything, numpy's module by its old name."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    state = (
        b"(K\x01K" + bytes([len(planes)]) + b"M\x00\x0c\x86cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + len(planes.tobytes()).to_bytes(4, "little") + planes.tobytes() + b"t"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR" + state + b"b"
    )
    return b"\x80\x02}(" + text(b"labels") + b"](" + numbers + b"e" + text(b"data") + array + b"u."


def binary_batches(prefix="cifar-10-batches-bin/"):
    return {
        f"{prefix}{name}.bin": np.column_stack([labels, planes]).astype(np.uint8).tobytes()
        for name, planes, labels in batches()
    }


def image_folder(prefix="", named=CLASSES):
    return {
        f"{prefix}{part}/{named[label]}/{number:04}.png": encoded(image)
        for part in IMAGES
        for number, (image, label) in enumerate(rows(part))
    }


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in reversed(files.items()):  # CIFAR-10's own archive is not in order either
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_parquet(path, part=None, named=("img", "label"), struct=True, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    every = [(encoded(x), y, p) for p in ([part] if part else IMAGES) for x, y in rows(p)]
    columns = {
        named[0]: [{"bytes": x, "path": None} if struct else x for x, _, _ in every],
        named[1]: [y for _, y, _ in every],
        "split": [p for _, _, p in every],
    }
    parquet.write_table(pa.table(columns | changes), path)
    return path


def oldest_batches():
    return {
        f"cifar-10-batches-py/{name}": python2_batch(labels, planes) for name, planes, labels in batches()
    }


def read(source):
    """{part: (images, labels)} in the order of the chunks' places."""
    chunks = sorted(located(str(source))[1](), key=lambda chunk: (chunk.part, chunk.place))
    return {
        part: (
            np.concatenate([chunk.images for chunk in chunks if chunk.part == part]),
            np.concatenate([chunk.labels for chunk in chunks if chunk.part == part]),
        )
        for part in IMAGES
    }
