"""Reading the Pathfinder files of the Long Range Arena: PNG images and one text table for each batch.

Layout of a level: imgs/<batch>/sample_<i>.png and metadata/<batch>.npy. The tables are plain text in spite of
their name: one image a line, fields by blanks, of which field 0 is the folder (imgs/<batch>), 1 the file name
and 3 the label. Levels are curv_baseline (easy), curv_contour_length_9 (intermediate) and
curv_contour_length_14 (hard), in pathfinder<size>/ in lra_release/ or lra_release/lra_release/.

An archive is read once, in whatever order its members come: decoded images wait in a file beside the data set
until every label is known.
"""

import io
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from lra.data.archives import is_archive, members
from lra.errors import UserError
from lra.tasks.base import SPLITS, Progress
from lra.tasks.pathfinder import LRA_IMAGES

FOLDERS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}
ARCHIVE = "lra_release.gz"
INNER = re.compile("lra_release/lra_release/pathfinder128/")
"""Where LRA's archive has the sound copy of pathfinder128."""
KNOWN_EMPTY = (32, "easy", "imgs/0/sample_172.png")
"""LRA released this image with zero bytes; everybody skips it."""

_NAME = re.compile(r"(?:(.*)/)?(imgs/[^/]+/[^/.][^/]*\.png|metadata/[^/.][^/]*\.npy)")
_PNG, _NUMPY = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_LARGEST = 1 << 24
"""Bytes that an image or a table may have; LRA's have less than 100,000."""
_REPORT_EVERY = 1000
_INNER_TAKEN = "the inner one was taken"


def locate(source: Path, size: int, level: str) -> tuple[Path, list[str]]:
    """The level's folder, or the archive to look in, and notes on the choice; UserError if there is neither.

    LRA's archive holds two copies of pathfinder128. The outer one, beside the inner lra_release, is broken:
    a network can learn it by heart but not generalise.
    """
    place = source.expanduser().resolve()
    if is_archive(place):
        return place, []
    if not place.is_dir():
        what = "is neither a folder nor a tar or zip archive" if place.exists() else "does not exist"
        raise UserError(f"task.source={source} {what}. {_wanted(size, level)}")
    inside = Path(f"pathfinder{size}", FOLDERS[level])
    steps = (FOLDERS[level], inside, "lra_release" / inside, Path("lra_release/lra_release") / inside)
    found = [folder for folder in (place, *(place / step for step in steps)) if _is_level(folder)]
    sound = [folder for folder in found if not _is_outer(folder, size)]
    if not found:
        if (place / ARCHIVE).is_file():
            return place / ARCHIVE, []
        raise UserError(f"{place} holds no pathfinder{size} of level {level}. {_wanted(size, level)}")
    if not sound:
        raise _broken_copy(found[0])
    if len(sound) > 1:
        raise _twice(size, sound[0], sound[1])
    if not _fits(sound[0].parts[-2:], size, level):
        raise UserError(
            f"{sound[0]} is not pathfinder{size} of level {level} by its name; name the folder of that, or "
            "choose the task and task.level that it is"
        )
    return sound[0], [_left_out(found[0])] if len(found) > 1 else []


def read(
    source: Path, writer, *, size: int, level: str, split_seed: int | None, progress: Progress | None
) -> None:
    """Hand every image to `writer`: split as S4 does (`split_seed`), or with None in stored order 80:10:10.

    UserError for a damaged, missing, unlisted or doubly listed image, and for labels other than 0 and 1.
    """
    place, notes = locate(source, size, level)
    waiting = writer.folder / "images.waiting"
    try:
        with open(waiting, "w+b") as pixels:
            found = _collect(place, size, level, pixels, progress)
            places, labels = found.rows()
            for split, chosen in _splits(len(labels), split_seed).items():
                _hand_over(writer, split, pixels, places[chosen], labels[chosen], size)
    finally:
        waiting.unlink(missing_ok=True)
    count, notes = len(labels), notes + found.notes
    whole = count == LRA_IMAGES or (found.empty and count == LRA_IMAGES - 1)
    notes.append(
        f"{count:,} images in LRA's layout, as many as it has; told by layout and count only"
        if whole
        else f"{count:,} images; LRA has {LRA_IMAGES:,} of each size and level"
    )
    chosen = any(note.endswith(_INNER_TAKEN) for note in notes)
    doubtful = size == 128 and not chosen and not INNER.search(f"{place}/{found.root}/")
    if doubtful:
        notes.append(
            "outside lra_release/lra_release this may be LRA's known broken copy of pathfinder128; "
            "lra data solve tells whether its labels can be learned"
        )
    name, origin = str(source.expanduser().resolve()), "original" if whole and not doubtful else "stand_in"
    writer.describe(source=name, data_origin=origin, generator=None, notes=notes)


class _Level:
    """What one level's folder holds; its pixels are in a file, in the order in which they came."""

    def __init__(self, root: str, size: int, level: str, pixels: BinaryIO) -> None:
        self.root, self.size, self.level, self.pixels = root, size, level, pixels
        self.images: dict[str, int] = {}  # name: how many came before it
        self.tables: dict[int, list[tuple[str, int]]] = {}  # batch: (name of the image, label) of each line
        self.empty = False  # whether the known empty image was there, and empty
        self.notes: list[str] = []
        pixels.seek(0)
        pixels.truncate()

    def take(self, where: str, name: str, content: bytes) -> None:
        """One image or table; `where` names it in messages."""
        if name.startswith("metadata/"):
            batch = name.removeprefix("metadata/").removesuffix(".npy")
            if not batch.isdecimal() or int(batch) in self.tables:
                raise UserError(f"{where}: a table is named by its batch, a number that occurs once")
            self.tables[int(batch)] = list(_lines(where, content))
        elif not content and (self.size, self.level, name) == KNOWN_EMPTY:
            self.empty = True
            self.notes.append(f"{name} has zero bytes, as in LRA's release, and is left out")
        else:
            if name in self.images:
                raise UserError(f"{where} is there twice; get the archive anew")
            self.pixels.write(_decode(where, content, self.size))
            self.images[name] = len(self.images)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each image's pixels are, and its label: by batch number, then as the tables list them."""
        listed = [line for batch in sorted(self.tables) for line in self.tables[batch]]
        for part, held in (("metadata", listed), ("imgs", self.images)):
            if not held:
                raise UserError(f"{self.root} has no {part}/ with anything in it; get the folder anew")
        often, times = Counter(name for name, _ in listed).most_common(1)[0]
        if times > 1:
            raise UserError(f"{self.root}: the metadata list {often} twice; get the folder anew")
        if self.empty:
            listed = [line for line in listed if line[0] != KNOWN_EMPTY[2]]
        missing = [name for name, _ in listed if name not in self.images]
        if missing:
            raise UserError(
                f"{self.root} is not complete: the metadata list {len(listed):,} images, {len(missing):,} of "
                f"them are not there (the first is {missing[0]}); get the folder anew"
            )
        extra = self.images.keys() - {name for name, _ in listed}
        tables = {name: f"metadata/{name.split('/')[1]}.npy" for name in extra if not self._has_table(name)}
        if tables:
            raise UserError(
                f"{self.root} is not complete: {len(tables):,} images are of batches whose table is "
                f"missing or empty ({', '.join(sorted(set(tables.values()))[:3])}); get the folder anew"
            )
        if extra:
            self.notes.append(f"{len(extra):,} images that no metadata list are left out")
        return (
            np.array([self.images[name] for name, _ in listed], np.int64),
            np.array([label for _, label in listed], np.uint8),
        )

    def _has_table(self, name: str) -> bool:
        """Whether the table of an image's batch lists any images."""
        batch = name.split("/")[1]
        return batch.isdecimal() and bool(self.tables.get(int(batch)))


def _collect(place: Path, size: int, level: str, pixels: BinaryIO, progress: Progress | None) -> _Level:
    """Everything of this size and level in a folder or an archive."""
    found: _Level | None = None
    skipped: str | None = None  # the outer of two copies
    releases: set[str] = set()  # every folder that has an lra_release in it, as "" or "/name/name"

    def wanted(name: str) -> bool:
        parts = ["", *name.split("/")]
        releases.update("/".join(parts[:i]) for i, part in enumerate(parts[:-1]) if part == "lra_release")
        match = _NAME.fullmatch(name)
        return match is not None and _fits((match[1] or "").split("/"), size, level)

    for name, content in members(place, wanted, max_member=_LARGEST):
        root, within = _NAME.fullmatch(name).groups()
        root = root or ""
        if found is None or root != found.root:
            inner = None if found is None else _inner_copy(found.root, root, size)
            if found is not None and inner is None:
                raise _twice(size, found.root, root)
            skipped = None if found is None else root if inner == found.root else found.root
            if root == skipped:
                continue
            found = _Level(root, size, level, pixels)
        found.take(f"{place}: {name}", within, content)
        if progress and len(found.images) % _REPORT_EVERY == 0:
            progress(len(found.images), max(LRA_IMAGES, len(found.images)))
    if found is None:
        raise UserError(f"{place} holds no pathfinder{size} of level {level}. {_wanted(size, level)}")
    above, named, _ = f"/{found.root}".rpartition("/pathfinder128/")
    if size == 128 and named and above in releases and f"{above}/lra_release" not in releases:
        raise _broken_copy(f"{place}: {found.root}")
    if progress:
        progress(len(found.images), max(LRA_IMAGES, len(found.images)))
    if skipped is not None:
        found.notes.append(_left_out(f"{place}: {skipped}"))
    found.root = f"{place}: {found.root}" if found.root else str(place)
    return found


def _fits(parts: Sequence[str], size: int, level: str) -> bool:
    """Whether a folder may hold this size and level: false if its name says that it is another."""
    for part in parts[-2:]:
        if re.fullmatch(r"pathfinder\d+", part) and part != f"pathfinder{size}":
            return False
        if part in FOLDERS.values() and part != FOLDERS[level]:
            return False
    return True


def _is_level(folder: Path) -> bool:
    return (folder / "imgs").is_dir() or (folder / "metadata").is_dir()


def _is_outer(folder: Path, size: int) -> bool:
    """Whether this is a level of the pathfinder128 that stands beside the inner lra_release."""
    release = folder.parent.parent / "lra_release"
    named = size == 128 and folder.parent.name == "pathfinder128"
    return named and release.is_dir() and not (release / "lra_release").is_dir()


def _inner_copy(one: str, other: str, size: int) -> str | None:
    """Which of two places in an archive is the inner pathfinder128, if they are LRA's two copies."""
    for outer, inner in ((one, other), (other, one)):
        head, slash, tail = outer.rpartition("pathfinder128/")
        if size == 128 and slash and inner == f"{head}lra_release/{slash}{tail}":
            return inner
    return None


def _lines(where: str, content: bytes) -> Iterator[tuple[str, int]]:
    """(name of the image, label) of each line of a table."""
    if content.startswith(_NUMPY):
        raise UserError(
            f"{where} is a NumPy file, which may have to be unpickled, and unpickling can run any program; "
            "LRA's own tables are plain text. Get LRA's files, or write this one as text"
        )
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not text ({error}); get it anew") from error
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 4:
            raise UserError(
                f"{where} line {number}: {len(fields)} fields, at least 4 are needed; get it anew"
            )
        if fields[3] not in ("0", "1"):
            raise UserError(f"{where} line {number}: label {fields[3]!r} is not allowed; labels are 0 and 1")
        yield f"{fields[0]}/{fields[1]}", int(fields[3])


def _decode(where: str, content: bytes, size: int) -> bytes:
    """An image's grey values, row by row. The size is known before anything is unpacked."""
    if not content:
        raise UserError(f"{where} has zero bytes; get it anew")
    if not content.startswith(_PNG) or len(content) < 24:
        raise UserError(f"{where} is not a PNG image; get it anew")
    width, height = struct.unpack(">II", content[16:24])
    if (width, height) != (size, size):
        raise UserError(f"{where} has {width} x {height} pixels, not {size} x {size}; name the right folder")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise UserError(f"{where} has pixels of mode {image.mode}, not 8 bits; get it anew")
            return image.convert("L").tobytes()
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{where} cannot be read as a PNG image ({error}); get it anew") from error


def _splits(count: int, seed: int | None) -> dict[str, np.ndarray]:
    """Row numbers of each split."""
    if seed is None:
        ends = [0, count * 8 // 10, count * 9 // 10, count]
        order = np.arange(count)
    else:
        import torch

        tenth = int(0.1 * count)
        ends = [0, count - 2 * tenth, count - tenth, count]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return {split: order[ends[i] : ends[i + 1]] for i, split in enumerate(SPLITS)}


def _hand_over(
    writer, split: str, pixels: BinaryIO, places: np.ndarray, labels: np.ndarray, size: int
) -> None:
    """The rows of a split, about a MiB at a time; only that much of the waiting images is ever held."""
    pixels.flush()
    length = size * size
    step = max(1, (1 << 20) // length)
    for start in range(0, len(places), step):
        chosen = places[start : start + step].tolist()
        flat = b"".join(os.pread(pixels.fileno(), length, place * length) for place in chosen)
        writer.add_rows(
            split,
            np.frombuffer(flat, np.uint8),
            np.arange(len(chosen) + 1) * length,
            labels[start : start + step],
        )


def _wanted(size: int, level: str) -> str:
    return (
        f"Wanted: LRA's files, pathfinder{size}/{FOLDERS[level]} with imgs/ and metadata/, or a folder or "
        f"archive that has it ({ARCHIVE}); without task.source= the images are generated"
    )


def _twice(size: int, one: Path | str, other: Path | str) -> UserError:
    return UserError(f"pathfinder{size} is there twice, in '{one}' and in '{other}'; name one of them")


def _left_out(outer: Path | str) -> str:
    return f"{outer} was left alone: it is LRA's known broken copy of pathfinder128; {_INNER_TAKEN}"


def _broken_copy(outer: Path | str) -> UserError:
    return UserError(
        f"{outer} is the outer pathfinder128 of LRA's archive, a broken copy that teaches nothing; "
        "take the one in lra_release/lra_release, or leave task.source= away to generate the images"
    )
