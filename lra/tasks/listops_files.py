"""Reading the ListOps files of the Long Range Arena: basic_{train,val,test}.tsv, in a folder, a tar
or a zip.

Tab-separated with the header `Source<TAB>Target`. Source is a fully parenthesised application, as in
`( ( ( [MAX 2 ) 9 ) ] )`; without its parentheses it is the row as it is stored.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lra.data import archives
from lra.errors import UserError
from lra.tasks import listops_generator
from lra.tasks.base import SPLITS, Progress
from lra.tasks.listops import FILES_WANTED, IDS, LRA_LENGTH, LRA_ROWS, SYMBOLS

_FILES = {f"basic_{split}.tsv": split for split in SPLITS}
_FOLDERS = (".", "listops-1000", "lra_release/listops-1000", "lra_release/lra_release/listops-1000")


def read(source: Path, writer, length: int, progress: Progress | None) -> None:
    """Hand every row of the three files to `writer`, after evaluating it.

    UserError names the line that is too long, malformed, or labelled with another value than it has.
    """
    source = source.expanduser().resolve()
    counts = dict.fromkeys(SPLITS, 0)
    for split, name, lines in _tables(source):
        for numbers, rows, labels in _batches(name, lines):
            flat = np.frombuffer(b"".join(rows), np.uint8)
            offsets = np.cumsum([0, *map(len, rows)])
            values = listops_generator.values(flat, offsets)
            for number, row, label, value in zip(numbers, rows, labels, values, strict=True):
                if len(row) > length:
                    raise UserError(
                        f"{name} line {number}: {len(row):,} symbols, more than length={length}; "
                        f"LRA's own files are prepared with length={LRA_LENGTH}"
                    )
                if value != label:
                    fault = f"the value is {value}" if value >= 0 else "this is not a well-formed expression"
                    raise UserError(
                        f"{name} line {number}: the label is {label}, but {fault}; get the file anew"
                    )
            writer.add_rows(split, flat, offsets, np.array(labels))
            counts[split] += len(labels)
            if progress:
                progress(sum(counts.values()), max(sum(LRA_ROWS), sum(counts.values())))
    whole = length == LRA_LENGTH and tuple(counts.values()) == LRA_ROWS
    writer.describe(
        source=str(source),
        data_origin="original" if whole else "stand_in",
        generator=None,
        notes=[] if whole else [f"rows {counts}, length {length}; LRA has {LRA_ROWS} at {LRA_LENGTH}"],
    )


def _tables(path: Path) -> Iterator[tuple[str, str, Iterable[str]]]:
    """(split, file name, lines) of each of LRA's three files in a folder or an archive."""
    for folder in (path / name for name in _FOLDERS):
        if all((folder / name).is_file() for name in _FILES):
            for name, split in _FILES.items():
                with open(folder / name, newline="", encoding="utf-8") as lines:
                    yield split, name, lines
            return
    left = dict(_FILES)
    if path.is_file():
        if not archives.is_archive(path):
            raise UserError(f"{path} cannot be read: it is not a tar or zip archive. {FILES_WANTED}")
        for name, content in archives.members(path, lambda name: Path(name).name in left):
            file = Path(name).name
            yield left.pop(file), file, io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="")
            if not left:  # LRA's release holds the files twice; the first ones do
                return
    raise UserError(f"{path} lacks {', '.join(left)}. {FILES_WANTED}")


def _batches(
    name: str, lines: Iterable[str], size: int = 1000
) -> Iterator[tuple[list[int], list[bytes], list[int]]]:
    """Line numbers, rows as ids and labels of one table, `size` rows at a time."""
    csv.field_size_limit(1 << 26)  # a row of 32,768 symbols is longer than the default allows
    reader = csv.reader(lines, delimiter="\t")
    numbers, rows, labels = [], [], []
    try:
        if next(reader, None) != ["Source", "Target"]:
            raise UserError(f"{name} line 1: the header must be Source<TAB>Target, as in LRA's files")
        for record in reader:
            if len(record) != 2:
                raise UserError(
                    f"{name} line {reader.line_num}: {len(record)} columns, not 2 (Source<TAB>Target)"
                )
            symbols = record[0].replace("(", " ").replace(")", " ").split()
            rows.append(bytes(map(IDS.__getitem__, symbols)))
            labels.append(int(record[1]))
            numbers.append(reader.line_num)
            if len(rows) == size:
                yield numbers, rows, labels
                numbers, rows, labels = [], [], []
    except KeyError as error:
        raise UserError(
            f"{name} line {reader.line_num}: unknown symbol {error}; known: {' '.join(SYMBOLS)}"
        ) from error
    except UserError:
        raise
    except (csv.Error, ValueError) as error:
        raise UserError(f"{name} line {reader.line_num}: cannot be read ({error})") from error
    if rows:
        yield numbers, rows, labels
