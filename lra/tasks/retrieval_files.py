"""Pairs of papers: Long Range Arena's tables, or texts beside a list of pairs.

LRA's new_aan_pairs.{train,eval,test}.tsv have no header and five columns separated by tabs: label (a float),
two ids, two texts. Quotes have no meaning. A text is the printed form of Python bytes, as in b'...\\xe2\\n',
so that a row is a line. Lines are read one by one: the tables are large.

The other form is a folder with texts/ID.txt, or one table of texts with columns id and text, and a table of
pairs with columns label, id1, id2 and split, or one such table for each split.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lra.data import data_root
from lra.data.archives import is_archive, pieces
from lra.data.tables import TABLES, column_names, table
from lra.errors import UserError
from lra.tasks.base import SPLITS

LRA_ROWS = {"train": 147_086, "val": 18_090, "test": 17_437}

_LRA_FILES = {
    "new_aan_pairs.train.tsv": "train",
    "new_aan_pairs.eval.tsv": "val",
    "new_aan_pairs.test.tsv": "test",
}
_LRA_FOLDERS = (".", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
_LRA_ARCHIVE = "lra_release.gz"
_LONGEST_LINE = 1 << 26
_LARGEST_TABLE = 64 << 30
"""Bytes of one table in an archive."""
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_SPLITS = {"train": "train", "val": "val", "eval": "val", "validation": "val", "test": "test"}

# What `repr` makes of bytes, and nothing else: double quotes stand around a text with single quotes only.
_ESCAPE = rb"\\(?:[\\'\"nrt]|x[0-9a-fA-F]{2})"
_LITERAL = re.compile(
    rb"b(?:'(?:[ -&(-\[\]-~]++|" + _ESCAPE + rb")*+'|\"(?:[ !#-\[\]-~]++|" + _ESCAPE + rb")*+\")"
)


@dataclass(frozen=True)
class Row:
    """A pair of documents; `where` is its place in the source, for messages."""

    split: str
    where: str
    documents: tuple[bytes, bytes]
    label: int


Cut = Callable[[str, bytes], bytes]
"""From a place and a document to the part of the document that is kept."""
Read = Callable[[Iterable[str], str, Cut], Iterator[Row]]
"""From splits, the kind of text ("literal" or "decoded") and a cut to the rows of these splits."""


@dataclass(frozen=True)
class Source:
    """A place with pairs. `rows` and `num_bytes` (of text) are rough, for planning."""

    name: str
    is_lra: bool
    rows: int
    num_bytes: float
    read: Read


def opened(source: str | None) -> Source:
    """The source that was named, else the first of $LRA_DATA/sources/{aan,lra_release,lra_release.gz}."""
    if source is not None:
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(f"task.source={source}: there is no such file or folder. {_wanted()}")
        return _located(path.resolve())
    for name in ("aan", "lra_release", _LRA_ARCHIVE):
        path = data_root() / "sources" / name
        if path.exists():
            return _located(path.resolve())
    raise UserError(f"there are no pairs of papers, and no place to fetch them from. {_wanted()}")


def _wanted() -> str:
    return (
        f"Wanted: LRA's {', '.join(_LRA_FILES)} (its folder tsv_data, or {_LRA_ARCHIVE} as it is), or a "
        "folder with pairs.tsv (columns split, label, id1, id2) and texts/ID.txt. Put it in "
        f"{data_root() / 'sources' / 'aan'}, or name the place: lra data prepare retrieval task.source=DIR"
    )


def _located(path: Path) -> Source:
    if path.is_file():
        if not is_archive(path):
            raise UserError(f"{path} is neither a folder nor a tar or zip archive. {_wanted()}")
        return _lra_archive(path, path)
    folders = [path / name for name in _LRA_FOLDERS]
    whole = [folder for folder in folders if all((folder / name).is_file() for name in _LRA_FILES)]
    if whole:
        return _lra_folder(path, whole[0])
    for folder in folders:
        lacking = [name for name in _LRA_FILES if not (folder / name).is_file()]
        if len(lacking) < len(_LRA_FILES):
            raise UserError(f"{folder.resolve()} lacks {', '.join(lacking)}. {_wanted()}")
    if (path / _LRA_ARCHIVE).is_file():
        return _lra_archive(path, path / _LRA_ARCHIVE)
    return _pairs_folder(path)


def _lra_folder(path: Path, folder: Path) -> Source:
    def read(splits: Iterable[str], text: str, cut: Cut) -> Iterator[Row]:
        for name, split in _LRA_FILES.items():
            if split in splits:
                with open(folder / name, "rb") as file:
                    lines = iter(lambda file=file: file.readline(_LONGEST_LINE + 1), b"")
                    yield from _lra_rows(split, name, lines, text, cut)

    files = [folder / name for name in _LRA_FILES]
    size = sum(file.stat().st_size for file in files)
    return Source(str(path), True, sum(map(_about_lines, files)), size, read)


def _about_lines(file: Path) -> int:
    """The number of lines, if all are as long as the first ones."""
    with open(file, "rb") as lines:
        sample = lines.read(1 << 20)
    return round(sample.count(b"\n") * file.stat().st_size / max(1, len(sample)))


def _lra_archive(path: Path, archive: Path) -> Source:
    def read(splits: Iterable[str], text: str, cut: Cut) -> Iterator[Row]:
        left = {name: split for name, split in _LRA_FILES.items() if split in splits}
        parts = pieces(
            archive,
            lambda name: PurePosixPath(name).name in left,
            max_member=_LARGEST_TABLE,
            max_total=4 * _LARGEST_TABLE,
        )
        for member, first in parts:
            name = PurePosixPath(member).name
            yield from _lra_rows(left.pop(name), name, _lines(first, parts), text, cut)
            if not left:
                return
        raise UserError(f"{archive} lacks {', '.join(left)}. {_wanted()}")

    return Source(str(path), True, sum(LRA_ROWS.values()), 4 * archive.stat().st_size, read)


def _lines(first: bytes, parts: Iterator[tuple[str, bytes]]) -> Iterator[bytes]:
    """The lines of one member, from its pieces up to the empty one; too long a line comes in part."""
    piece, begun = first, b""
    while piece:
        *lines, begun = (begun + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(begun) > _LONGEST_LINE:
            break
        _, piece = next(parts)
    if begun:
        yield begun


def _lra_rows(split: str, name: str, lines: Iterable[bytes], text: str, cut: Cut) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        where = f"{name} line {number}"
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{where} has more than {_LONGEST_LINE:,} bytes; get the file anew")
        if not line.endswith(b"\n"):
            raise UserError(f"{where}: the file ends in the middle of a line; it is cut off, get it anew")
        columns = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
        if len(columns) != 5:
            raise UserError(
                f"{where}: {len(columns)} columns, not 5 (label, id1, id2, text1, text2, separated by tabs); "
                "get the file anew"
            )
        label = _label(where, columns[0].decode("ascii", "replace"))
        first, second = (_lra_text(f"{where}, text{i + 1}", columns[3 + i], text, cut) for i in range(2))
        yield Row(split, where, (first, second), label)


def _lra_text(where: str, field: bytes, text: str, cut: Cut) -> bytes:
    return _kept(where, field if text == "literal" else decoded(where, field), cut)


def decoded(where: str, field: bytes) -> bytes:
    """The bytes whose printed form is given; UserError if it is not one."""
    if not _LITERAL.fullmatch(field):
        raise UserError(
            f"{where} is not the printed form of Python bytes, b'...': {field[:40]!r}; get the file anew, or "
            "take the fields as they are: task.text=literal"
        )
    # These few escapes mean the same in a string, whose characters are then the bytes.
    return field[2:-1].decode("unicode_escape").encode("latin-1")


def _pairs_folder(path: Path) -> Source:
    texts = _Texts(path)
    found: dict[str, list[Path]] = {}
    for file in _tables_in(path):
        words = _words(file)
        named = [_SPLITS[word] for word in words if word in _SPLITS]
        if "pairs" in words or file.stem.lower() in _SPLITS:
            found.setdefault(named[0] if named else "", []).append(file)
    several = [str(file) for files in found.values() if len(files) > 1 for file in files]
    if several or ("" in found and len(found) > 1):
        names = several or [file.name for files in found.values() for file in files]
        raise UserError(
            f"{path} has more than one list of pairs: {', '.join(names)}; leave one, or one for each split"
        )
    lacking = [] if texts.exist else ["texts"]
    if not found:
        lacking.append("list of pairs")
    elif "" not in found:
        lacking += [f"list of {split} pairs" for split in SPLITS if split not in found]
    if lacking:
        raise UserError(f"{path} has no {' and no '.join(lacking)}. {_wanted()}")
    files = [(split, files[0]) for split, files in found.items()]

    def read(splits: Iterable[str], text: str, cut: Cut) -> Iterator[Row]:
        known: dict[tuple[str, str], bytes] = {}
        lookup = texts.reader(text, cut)
        for fixed, file in files:
            for where, split, label, keys in _pairs(file, fixed, texts.has_kinds):
                if split not in splits:
                    continue
                for key in keys:
                    if key not in known:
                        known[key] = lookup(where, key)
                yield Row(split, where, (known[keys[0]], known[keys[1]]), label)

    rows = sum(1 for _, file in files for _ in table(file, ("label",)))
    return Source(str(path), False, rows, float("inf"), read)


def _words(file: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", file.stem.lower())


def _tables_in(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() in TABLES and file.is_file())


Pair = tuple[str, str, int, tuple[tuple[str, str], tuple[str, str]]]
"""Where it stands, the split, the label, the (kind, id) of both texts."""


def _pairs(file: Path, fixed: str, has_kinds: bool) -> Iterator[Pair]:
    """The rows of a list of pairs; `fixed` is the split of all of them, or "" for a column of splits."""
    names = column_names(file)
    if ("kind" in names) != has_kinds:
        raise UserError(
            f"{file} has {'a' if 'kind' in names else 'no'} column kind and the texts have "
            f"{'one' if has_kinds else 'none'}; both need it or neither"
        )
    columns = ("label", "id1", "id2") + (() if fixed else ("split",)) + (("kind",) if has_kinds else ())
    for number, row in enumerate(table(file, columns), 1):
        where, values = f"{file.name} row {number}", dict(zip(columns, row, strict=True))
        split = fixed or _SPLITS.get(str(values["split"]))
        if split is None:
            raise UserError(
                f"{where}: split {values['split']!r} is not allowed; splits are {', '.join(_SPLITS)}"
            )
        first, second = ((str(values.get("kind", "")), str(values[name])) for name in ("id1", "id2"))
        yield where, split, _label(where, values["label"]), (first, second)


class _Texts:
    """texts/ID.txt, or a table with columns id, text and perhaps kind, in which an id is looked up then."""

    def __init__(self, path: Path) -> None:
        self.folder = path / "texts"
        self.tables = [
            file
            for file in _tables_in(path)
            if {"texts", "papers"} & set(_words(file)) and "pairs" not in _words(file)
        ]
        if len(self.tables) + self.folder.is_dir() > 1:
            names = [file.name for file in self.tables] + ["texts/"] * self.folder.is_dir()
            raise UserError(f"{path} has texts in {' and '.join(names)}; leave one of them")
        self.has_kinds = bool(self.tables) and "kind" in column_names(self.tables[0])

    @property
    def exist(self) -> bool:
        return bool(self.tables) or self.folder.is_dir()

    def reader(self, text: str, cut: Cut) -> Callable[[str, tuple[str, str]], bytes]:
        """From the place where a text is asked for and its (kind, id) to the part of it that is kept."""
        if not self.tables:
            return lambda where, key: self._kept(where, key, self._file(where, key[1]), text, cut)
        rows = self._table()
        return lambda where, key: self._kept(where, key, rows.get(key), text, cut)

    def _kept(self, where: str, key: tuple[str, str], raw: bytes | None, text: str, cut: Cut) -> bytes:
        name = " ".join(filter(None, key))
        if raw is None:
            place = self.tables[0].name if self.tables else "texts/"
            raise UserError(
                f"{where}: there is no text of {name!r} in {place}; add it or leave the pair away"
            )
        if raw == b"":
            raise UserError(f"{where}: the text of {name!r} is empty; every document needs one")
        # Under "literal" a text takes the form that LRA's tables have, so every form of source is equal.
        return _kept(f"{where}, text of {name!r}", repr(raw).encode() if text == "literal" else raw, cut)

    def _file(self, where: str, name: str) -> bytes | None:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{where}: the id {name!r} cannot be the name of a file in texts/")
        file = self.folder / f"{name}.txt"
        place = Path(os.path.realpath(file))
        if not place.is_relative_to(os.path.realpath(self.folder)):
            raise UserError(f"{where}: {file} is a link out of texts/, to {place}; put the file itself there")
        if place.is_file():
            return place.read_bytes()
        if os.path.lexists(file):
            raise UserError(f"{where}: {file} is no regular file; put the text itself there")
        return None

    def _table(self) -> dict[tuple[str, str], bytes]:
        file, found = self.tables[0], {}
        columns = ("id", "text") + (("kind",) if self.has_kinds else ())
        for number, (name, text, *kind) in enumerate(table(file, columns), 1):
            key = (str(kind[0]) if kind else "", str(name))
            if key in found:
                raise UserError(f"{file.name} row {number}: the id {name!r} is there a second time")
            found[key] = text if isinstance(text, bytes) else (text or "").encode()
        return found


def _label(where: str, label: Any) -> int:
    known = _LABELS.get(str(label))
    if known is None:
        raise UserError(f"{where}: label {label!r} is not allowed; labels are 0 and 1 (or 0.0 and 1.0)")
    return known


def _kept(where: str, document: bytes, cut: Cut) -> bytes:
    if not document:
        raise UserError(f"{where} is empty; every document needs a text")
    return cut(where, document)
