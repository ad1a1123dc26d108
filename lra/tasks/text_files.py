"""IMDb in every form it comes in: parquet, CSV, the authors' folder or archive, the hub."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lra.data import data_root
from lra.data.archives import is_archive, members
from lra.data.tables import hub, is_hub_id, table
from lra.errors import UserError

HUB_ID = "stanfordnlp/imdb"
ARCHIVE = "aclImdb_v1.tar.gz"

_ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zip")
_SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", *_ARCHIVES)
"""What ends in one of these is meant as a file, not as a hub id."""
_LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}
_FOLDERS = {(part, label) for part in ("train", "test") for label in ("neg", "pos")}

Row = tuple[str, bytes, int]
"""Where it stands in the source (for messages), the text in UTF-8, the label."""
Rows = Callable[[str], Iterator[Row]]
"""From "train" or "test" to its rows, the same ones each time it is called."""


def opened(source: str | None) -> tuple[str, Rows]:
    """A source's name and its rows. Without one: $LRA_DATA/sources/imdb, the archive beside it, the hub."""
    if source is not None:
        return located(source)
    sources = data_root() / "sources"
    for place in (sources / "imdb", sources / ARCHIVE):
        if place.exists():
            return located(str(place))
    return HUB_ID, _hub(HUB_ID)


def located(source: str) -> tuple[str, Rows]:
    """The full name and the rows of a folder, file, archive or hub id; UserError if it is none of them."""
    path = Path(source).expanduser()
    if not path.exists():
        if is_hub_id(source, _SUFFIXES):
            return source, _hub(source)
        raise UserError(f"task.source={source}: there is no such file or folder. {_wanted()}")
    path = path.resolve()
    if path.is_file():
        archive = path.suffix.lower() in _ARCHIVES or is_archive(path)
        return str(path), _reviews(path) if archive else _tables({"": [path]})
    places = (path, path / "aclImdb", *sorted(path.glob("*/aclImdb")))
    copies = [folder for folder in places if (folder / "train" / "pos").is_dir()]
    if len(copies) > 1:
        raise _twice(path, copies[0], copies[1])
    if copies:
        return str(path), _reviews(copies[0])
    for pattern in ("*.parquet", "*.csv"):
        named = {part: re.compile(rf"(imdb[_-])?{part}[-_.]", re.IGNORECASE) for part in ("train", "test")}
        files = {part: sorted(f for f in path.glob(pattern) if named[part].match(f.name)) for part in named}
        if all(files.values()):
            return str(path), _tables(files)
    if (path / ARCHIVE).is_file():
        return str(path), _reviews(path / ARCHIVE)
    if any(path.glob("*/*.parquet")):
        return str(path), _hub(str(path), streaming=True)
    raise UserError(f"{path} holds no IMDb. {_wanted()}")


def _wanted() -> str:
    place = data_root() / "sources" / "imdb"
    return (
        "Wanted: imdb_train.parquet and imdb_test.parquet (or .csv; columns text and label), or the authors' "
        f"archive {ARCHIVE}, or its folder aclImdb, or a copy of the hub's {HUB_ID}. Put it in {place}, "
        "or name the place: lra data prepare text task.source=DIR"
    )


def _row(where: str, text: str | bytes | None, label: Any) -> Row:
    """A checked row."""
    known = _LABELS.get(str(label).lower())
    if known is None:
        raise UserError(f"{where}: label {label!r} is not allowed; labels are 0 (negative) and 1 (positive)")
    if not text:
        raise UserError(f"{where}: the text is empty; every row needs one")
    try:
        if isinstance(text, str):
            return where, text.encode(), known
        text.decode()
    except UnicodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error}); get the file anew") from error
    return where, text, known


def _reviews(path: Path) -> Rows:
    """{train,test}/{neg,pos}/ID_RATING.txt in a folder or an archive: all negatives by id, then all positives
    by id. Held in memory while they are read: 65 MB.
    """
    found: dict[PurePosixPath, bytes] = {}

    def rows(part: str) -> Iterator[Row]:
        if not found:
            for name, text in members(path, _is_review):
                member = PurePosixPath(name)
                first = next(iter(found), member)
                if member.parents[2] != first.parents[2]:
                    raise _twice(path, first.parents[2], member.parents[2])
                if member in found:
                    raise UserError(f"{path}: '{member}' is there twice; get it anew")
                found[member] = text
            if not found:
                raise UserError(f"{path} holds no aclImdb/train/pos. {_wanted()}")
        for label in ("neg", "pos"):
            for member in sorted((m for m in found if m.parts[-3:-1] == (part, label)), key=_by_id):
                yield _row(f"{path.name}: {member}", found[member], label)

    return rows


def _twice(path: Path, one: PurePosixPath, other: PurePosixPath) -> UserError:
    return UserError(f"{path} has IMDb twice, in '{one}' and in '{other}'; leave one, or name one of them")


def _by_id(path: PurePosixPath) -> tuple[float, str]:
    number = path.stem.split("_")[0]
    return (int(number) if number.isdecimal() else math.inf, path.name)


def _is_review(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[-3:-1] in _FOLDERS and path.suffix == ".txt" and not path.name.startswith(".")


def _tables(files: dict[str, list[Path]]) -> Rows:
    """Parquet or CSV files with columns text and label; one file for both splits has a column split as
    well.
    """

    def rows(part: str) -> Iterator[Row]:
        columns = ("text", "label") if part in files else ("text", "label", "split")
        for path in files.get(part) or files[""]:
            for number, values in enumerate(table(path, columns), 1):
                if len(values) == 2 or values[2] == part:
                    yield _row(f"{path.name} row {number}", values[0], values[1])

    return rows


def _hub(name: str, *, streaming: bool = False) -> Rows:
    """A data set on the hub, or a local folder laid out like one."""
    records = hub(name, streaming=streaming, wanted=_wanted())

    def rows(part: str) -> Iterator[Row]:
        for number, record in enumerate(records(part)):
            if "text" not in record or "label" not in record:
                raise UserError(f"'{name}' has columns {', '.join(record)}; it needs text and label")
            yield _row(f"{name} {part} row {number}", record["text"], record["label"])

    return rows
