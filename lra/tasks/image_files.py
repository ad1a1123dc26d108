"""Reading CIFAR-10 in any of the forms it is passed around in, as chunks of RGB images.

Forms: the authors' batches for Python (pickles, opened without running anything they name) or as binary
records, parquet files with PNG or JPEG bytes (also a local copy of the hub's data set), and a folder
{train,test}/CLASS/NNNN.png; batches and image folders in a tar or zip too. Only a few chunks are held.

Rows of batches come in the order 1 to 5, of tables as they stand, of an image folder class by class, each by
number.
"""

import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lra.data import archives, data_root, tables
from lra.errors import UserError
from lra.tasks.image_batches import unpickled

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB_ID = "uoft-cs/cifar10"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
PARTS = ("train", "test")
SIDE = 32
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

_SUFFIXES = (".parquet", ".csv", ".tar", ".gz", ".tgz", ".zip", ".bin", ".png", ".jpg")
"""What ends in one of these is meant as a file, not as a hub id."""
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image", "png", "jpeg"), ("label", "labels")
_BATCH = re.compile(r"(?P<root>(?:.*/)?)(?P<batch>data_batch_[1-5]|test_batch)(?P<binary>\.bin)?")
_PICTURE = re.compile(
    r"(?P<root>(?:.*/)?)(?P<part>train|test)/(?P<label>[^/]+)/(?P<file>[^./][^/]*)\.(?:png|jpe?g)", re.I
)
_RECORD = 1 + 3 * SIDE * SIDE
_LARGEST_MEMBER = 1 << 28  # a batch has 31 MB


@dataclass(frozen=True)
class Chunk:
    """Some rows of one part, "train" or "test": images [n 32 32 3] uint8, labels [n] int64.

    `place` sorts the chunks of a part: an archive may give them in another order.
    """

    part: str
    place: tuple
    images: np.ndarray
    labels: np.ndarray
    jpeg: bool = False  # whether a picture came as JPEG, which does not keep the pixels


Chunks = Callable[[], Iterator[Chunk]]


def default() -> tuple[str, Chunks]:
    """The source's name and its chunks where none is named: the data root, else the hub."""
    sources = data_root() / "sources"
    for place in (sources / "cifar10", *(sources / name for name in ARCHIVES)):
        if place.exists():
            return located(str(place))
    return HUB_ID, _complete(HUB_ID, _hub, HUB_ID)


def located(source: str) -> tuple[str, Chunks]:
    """The full name and the chunks of a folder, file, archive or hub id; UserError if it is none of them."""
    path = Path(source).expanduser()
    if not path.exists():
        if tables.is_hub_id(source, _SUFFIXES):
            return source, _complete(source, _hub, source)
        raise UserError(f"task.source={source}: there is no such file or folder. {wanted()}")
    path = path.resolve()
    name = str(path)
    if path.is_file():
        return name, _complete(name, _table_of_both if path.suffix.lower() == ".parquet" else _members, path)
    if all((files := _parquet_files(path)).values()):
        return name, _complete(name, _tables, files)
    if next(archives.members(path, _is_wanted, max_member=_LARGEST_MEMBER), None) is not None:
        return name, _complete(name, _members, path)
    for archive in (path / each for each in ARCHIVES):
        if archive.is_file():
            return name, _complete(name, _members, archive)
    match [file for file in sorted(path.iterdir()) if file.suffix == ".parquet" or archives.is_archive(file)]:
        case [only]:
            return located(str(only))
    raise UserError(f"{path} holds no CIFAR-10. {wanted()}")


def wanted() -> str:
    """What to get and where to put it."""
    sources = data_root() / "sources"
    return (
        f"Wanted: the authors' archive {' or '.join(ARCHIVES)}, or its folder cifar-10-batches-py or "
        "cifar-10-batches-bin; or parquet files with train and test in their names (columns img and label), "
        f"as in a copy of the hub's {HUB_ID}; or images as train/CLASS/NNNN.png and test/CLASS/NNNN.png. "
        f"Put it in {sources / 'cifar10'}, or name the place: lra data prepare image task.source=DIR"
    )


def _complete(name: str, read: Callable[..., Iterator[Chunk]], *arguments: Any) -> Chunks:
    """The chunks that `read` gives, and a UserError at the end if a part had none."""

    def chunks() -> Iterator[Chunk]:
        seen = set()
        for chunk in read(*arguments):
            seen.add(chunk.part)
            yield chunk
        if missing := [part for part in PARTS if part not in seen]:
            raise UserError(f"{name} has no {' and no '.join(missing)} images. {wanted()}")

    return chunks


def _is_wanted(name: str) -> bool:
    return bool(_BATCH.fullmatch(name) or _PICTURE.fullmatch(name))


def _members(path: Path) -> Iterator[Chunk]:
    """Batches or single images in a folder or archive."""
    names, copies, batches = set(), set(), {}
    for name, content in archives.members(path, _is_wanted, max_member=_LARGEST_MEMBER):
        where = f"{path}: {name}"
        if name in names:
            raise UserError(f"{where} is there twice; get the archive anew")
        names.add(name)
        batch, picture = _BATCH.fullmatch(name), _PICTURE.fullmatch(name)
        form = "images" if picture else "binary batches" if batch["binary"] else "batches for Python"
        copies.add(f"{form} in {(batch or picture)['root'] or 'its top folder'}")
        if len(copies) > 1:
            raise UserError(
                f"{path} holds CIFAR-10 more than once: {', '.join(sorted(copies))}; name one of them as "
                "task.source"
            )
        if picture:
            number = picture["file"]
            label, image = _label(picture["label"].lower(), where), _decoded(content, where)
            order = (int(number), name) if number.isdecimal() else (math.inf, name)
            part, jpeg = picture["part"].lower(), _is_jpeg(content)
            yield Chunk(part, (label, *order), image[None], np.array([label]), jpeg)
            continue
        pixels, labels = (_records if batch["binary"] else unpickled)(content, where)
        batches[batch["batch"]] = len(labels)
        _check_labels(labels, where)
        if len(labels) != next(iter(batches.values())):
            raise UserError(
                f"{path}: batches must have equally many rows (CIFAR-10's have 10,000), but these have "
                f"{batches}; get it anew"
            )
        images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        yield Chunk("test" if batch["batch"] == "test_batch" else "train", (batch["batch"],), images, labels)
    if not copies:
        raise UserError(f"{path} holds no CIFAR-10. {wanted()}")
    if batches and (missing := [name for name in BATCHES if name not in batches]):
        raise UserError(f"{path} lacks {', '.join(missing)}. {wanted()}")


def _records(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A binary batch, records of a label byte and the pixels: [n 3072] uint8 and [n]."""
    if not content or len(content) % _RECORD:
        raise UserError(
            f"{where} has {len(content):,} bytes, not a multiple of {_RECORD:,} (a label and 32 x 32 RGB "
            "pixels); it is cut off, get it anew"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _check_labels(labels: np.ndarray, where: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if len(wrong):
        raise UserError(
            f"{where} row {wrong[0] + 1}: label {labels[wrong[0]]} is not allowed; labels are 0 to 9. "
            "Get the file anew"
        )


def _parquet_files(folder: Path) -> dict[str, list[Path]]:
    """The parquet files in or below a folder by the part in their names (plain_text/train-00000.parquet)."""
    found: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in sorted(folder.rglob("*.parquet")):
        words = re.split(r"[^a-z]+", path.relative_to(folder).as_posix().lower())
        for part in PARTS:
            if part in words:
                found[part].append(path)
    named = {part: [path for path in paths if "cifar" in path.name.lower()] for part, paths in found.items()}
    return named if all(named.values()) else found  # cifar10_train.parquet may lie beside other data


def _tables(files: dict[str, list[Path]]) -> Iterator[Chunk]:
    for part, paths in files.items():
        for shard, path in enumerate(paths):
            rows = tables.parquet(path, _columns(path, tables.column_names(path)))
            for number, (value, label) in enumerate(rows, 1):
                yield _row(part, (shard, number), value, label, f"{path} row {number}")


def _table_of_both(path: Path) -> Iterator[Chunk]:
    """One parquet file with a column `split`."""
    rows = tables.parquet(path, (*_columns(path, tables.column_names(path)), "split"))
    for number, (value, label, part) in enumerate(rows, 1):
        if part not in PARTS:
            raise UserError(f"{path} row {number}: split {part!r} is not allowed; give train or test")
        yield _row(part, (number,), value, label, f"{path} row {number}")


def _hub(name: str) -> Iterator[Chunk]:
    records = tables.hub(name, wanted=wanted())
    for part in PARTS:
        for number, record in enumerate(records(part), 1):
            image, label = _columns(name, record)
            yield _row(part, (number,), record[image], record[label], f"{name} {part} row {number}")


def _columns(where: str | Path, found: Iterable[str]) -> tuple[str, str]:
    """The names of the image and the label column."""
    found = list(found)
    chosen = []
    for kind, names in (("image", _IMAGE_COLUMNS), ("label", _LABEL_COLUMNS)):
        column = next((name for name in names if name in found), None)
        if column is None:
            raise UserError(
                f"{where} has no {kind} column; it may be called {', '.join(names)}. It has: "
                f"{', '.join(found) or 'none'}"
            )
        chosen.append(column)
    return chosen[0], chosen[1]


def _row(part: str, place: tuple, value: Any, label: Any, where: str) -> Chunk:
    image = _decoded(value, where)[None]
    return Chunk(part, place, image, np.array([_label(label, where)]), _is_jpeg(value))


def _is_jpeg(value: Any) -> bool:
    """Whether a picture that was decoded before is a JPEG."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value.startswith(b"\xff\xd8") if isinstance(value, bytes) else value.format == "JPEG"


def _label(value: Any, where: str) -> int:
    """0 to 9 from a class's number or name."""
    text = str(value)
    if text in CLASSES:
        return CLASSES.index(text)
    if text in map(str, range(len(CLASSES))):
        return int(text)
    raise UserError(f"{where}: label {value!r} is not allowed; give 0 to 9 or one of {', '.join(CLASSES)}")


def _decoded(value: Any, where: str) -> np.ndarray:
    """[32 32 3] uint8 from the bytes of a PNG or JPEG file, or from a picture that is open already.

    The size is looked at before the pixels are decoded.
    """
    from PIL import Image

    if isinstance(value, dict):  # the hub's way of storing a picture
        value = value.get("bytes")
    try:
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value), formats=("PNG", "JPEG"))
        if not isinstance(value, Image.Image):
            raise UserError(f"{where}: there is no picture, but {type(value).__name__}; get it anew")
        if value.size != (SIDE, SIDE) or value.mode not in ("RGB", "L", "P"):
            width, height = value.size
            raise UserError(
                f"{where}: a picture of {width} x {height} pixels ({value.mode}), not 32 x 32 in RGB; get "
                "the pictures in their own size"
            )
        return np.asarray(value.convert("RGB"))
    except UserError:
        raise
    except (*_UNDECODABLE, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: the picture cannot be decoded ({reason}); get it anew") from error


_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow raises for damaged files."""
