"""Rows of the tables that data sets come in: parquet, CSV, TSV, and data sets of the hub.

Everything is read in pieces and only once, so a table may be larger than the memory.
"""

import contextlib
import csv
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lra.errors import UserError

log = logging.getLogger(__name__)

TABLES = (".parquet", ".csv", ".tsv")


def table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple]:
    """The named columns of a parquet, CSV or TSV file, told apart by the suffix."""
    return parquet(path, columns) if path.suffix.lower() == ".parquet" else csv_rows(path, columns)


def column_names(path: Path) -> list[str]:
    """The columns that a parquet, CSV or TSV file has."""
    if path.suffix.lower() == ".parquet":
        with _parquet_file(path) as file:
            return file.schema_arrow.names
    with open(path, newline="", encoding="utf-8-sig") as lines:
        return _header(path, lines)


def parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple]:
    """The named columns, row after row; UserError for a broken file or a missing column."""
    import pyarrow

    with _parquet_file(path) as file:
        require_columns(path, columns, file.schema_arrow.names)
        try:
            for batch in file.iter_batches(1000, columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise _broken(path, "parquet", error) from error


def csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple]:
    """The named columns of a file with a header, row after row; a `.tsv` is separated by tabs, all else by
    commas.

    A field that a short row lacks is None.
    """
    csv.field_size_limit(1 << 26)
    with open(path, newline="", encoding="utf-8-sig") as lines:
        header = _header(path, lines)
        require_columns(path, columns, header)
        places = [header.index(name) for name in columns]
        try:
            for record in _reader(path, lines):
                if record:
                    yield tuple(record[place] if place < len(record) else None for place in places)
        except (csv.Error, UnicodeDecodeError) as error:
            raise _broken(path, "CSV in UTF-8", error) from error


def require_columns(path: Path, columns: tuple[str, ...], found: Iterable[str]) -> None:
    """UserError that names the columns which are missing and those there are."""
    missing = [name for name in columns if name not in found]
    if missing:
        hint = "; one file for all splits needs it, else give a folder with a file for each split"
        raise UserError(
            f"{path} has no column {', '.join(missing)}{hint if 'split' in missing else ''}; "
            f"it has: {', '.join(found) or 'none'}"
        )


def is_hub_id(source: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a source that is no place on the disk may be on the hub: `name` or `owner/name`, without the
    suffix of a file.
    """
    named = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    return named is not None and Path(source).suffix.lower() not in suffixes


def hub(name: str, *, streaming: bool = False, wanted: str) -> Callable[[str], Iterator[dict[str, Any]]]:
    """From a split's name to its records, for a data set on the hub.

    `streaming` reads a local folder laid out like one, so that no second copy is made. `wanted` says, for
    messages, which files would do and where to put them.
    """
    loaded: dict[str, Any] = {}

    def records(split: str) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            if not loaded:
                if not streaming:
                    log.warning("asking the hub for %s", name)
                with _quiet("huggingface_hub", "datasets"):
                    loaded.update(datasets.load_dataset(name, streaming=streaming))
            if split not in loaded:
                raise UserError(f"'{name}' has no split '{split}'; it has: {', '.join(loaded)}")
            yield from loaded[split]
        except UserError:
            raise
        except Exception as error:
            # The network, the hub and each file format have exceptions of their own, without a common base.
            reason = _first_line(error)
            place = "its files cannot be read" if streaming else "it is not here, and the hub cannot give it"
            raise UserError(f"'{name}': {place} ({reason}). {wanted}") from error

    return records


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep libraries from logging each of their attempts; what they raise says enough."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parquet_file(path: Path):
    import pyarrow
    from pyarrow import parquet as reader

    try:
        return reader.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(path, "parquet", error) from error


def _reader(path: Path, lines: Iterable[str]):
    return csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def _header(path: Path, lines: Iterable[str]) -> list[str]:
    try:
        return next(_reader(path, lines), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise _broken(path, "CSV in UTF-8", error) from error


def _broken(path: Path, form: str, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as {form} ({_first_line(error)}); get it anew")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
