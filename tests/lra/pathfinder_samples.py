"""Thirty small images and their tables in LRA's layout, in every form of source that Pathfinder reads."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from lra.data.prepare import prepare
from lra.data.store import store_path
from lra.errors import UserError
from lra.tasks.pathfinder import Pathfinder32

HARD = "curv_contour_length_14"
BATCHES = (10, 9, 2)  # as text 10 comes before 2
PER_BATCH = 10


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


def with_the_known_empty_image():
    files = {name.replace("/2", "/0"): content for name, content in level_files().items()}
    files["metadata/0.npy"] = b"".join(line(0, index).encode() for index in [*range(PER_BATCH), 172])
    return files | {"imgs/0/sample_172.png": b""}
