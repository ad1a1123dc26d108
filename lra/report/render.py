"""Tables as text for a terminal, as GitHub Markdown, CSV, LaTeX or HTML."""

import csv
import io
import os
import re
import shutil
import sys

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lra.errors import unknown
from lra.report import markup
from lra.report.cells import Column, Table

FORMATS = ("text", "md", "csv", "latex", "html")
GAP = 2  # columns between columns
P_VALUE = re.compile(r"(^|_)p(_|$)")  # the keys of p-values in a table's data
NARROW = 16  # narrowest useful width of a column whose words may wrap


def render(tables: list[Table], form: str = "text", *, width: int | None = None) -> str:
    """All tables in one of `FORMATS`; `width` (text only) limits the line, None is as wide as it takes."""
    if form == "text":
        return "\n".join(_text(table, width) for table in tables)
    if form == "md":
        return "\n".join(_markdown(table) for table in tables)
    if form == "csv":
        return _csv(tables)
    if form == "latex":
        return markup.latex(tables)
    if form == "html":
        return markup.html_document(tables)
    raise unknown("table format", form, FORMATS)


def terminal_width() -> int | None:
    """The width to keep to: the terminal's or $COLUMNS; None where output goes to a file or a pipe."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


# Text.


def _text(table: Table, width: int | None) -> str:
    lines = _flow(table.title, "   ", width)
    footnotes = [*(f"warning: {text}" for text in table.warnings), *table.footnotes]
    if table.matrix:
        for block in _blocks(table, width):
            lines += _grid(table, block, width)
    else:
        columns, left_out = _fit(table, width)
        lines += _grid(table, columns, width)
        if left_out:
            titles = ", ".join(column.title for column in left_out)
            footnotes.append(f"not shown at this width: {titles} (widen the terminal, or use --format md)")
    for note in footnotes:
        lines += [f" {line}" for line in _flow(tuple(note.split(" ")), " ", width and width - 1)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _flow(parts: tuple[str, ...], gap: str, width: int | None) -> list[str]:
    """Parts on as few lines as they fit on; broken only between parts."""
    lines = [parts[0]]
    for part in parts[1:]:
        joined = lines[-1] + gap + part
        if width is None or cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines


def _needs(table: Table, column: Column) -> int:
    """Width at which no cell of a column wraps."""
    return max(cell_len(text) for text in (column.title, *(row[column.key] for row in table.rows)))


def _least(table: Table, column: Column) -> int:
    """Width at which no word of a column is broken."""
    if not column.wrap:
        return _needs(table, column)
    words = [word for row in table.rows for word in row[column.key].split()]
    longest = max((cell_len(word) for word in [column.title, *words]), default=0)
    return min(_needs(table, column), max(NARROW, longest))


def _total(widths: list[int]) -> int:
    return 1 + sum(widths) + GAP * (len(widths) - 1)


def _fit(table: Table, width: int | None) -> tuple[list[Column], list[Column]]:
    """The columns that fit, and those left out, least important first."""
    columns, left_out = list(table.columns), []
    while width is not None and _total([_least(table, c) for c in columns]) > width:
        droppable = [c for c in columns if c.drop]
        if not droppable:
            break
        left_out.append(min(droppable, key=lambda c: c.drop))
        columns.remove(left_out[-1])
    return columns, left_out


def _blocks(table: Table, width: int | None) -> list[list[Column]]:
    """A matrix in pieces that fit, each with the first column."""
    first, *rest = table.columns
    blocks = [[first]]
    for column in rest:
        wider = [*blocks[-1], column]
        if width is not None and len(wider) > 2 and _total([_least(table, c) for c in wider]) > width:
            blocks.append([first, column])
        else:
            blocks[-1] = wider
    return blocks


def _grid(table: Table, columns: list[Column], width: int | None) -> list[str]:
    widths = {column.key: _needs(table, column) for column in columns}
    if width is not None:  # the words of the wrapped columns give way, the note first
        for column in reversed([c for c in columns if c.wrap]):
            excess = _total(list(widths.values())) - width
            if excess > 0:
                widths[column.key] = max(_least(table, column), widths[column.key] - excess)
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for column in columns:
        grid.add_column(
            Text(column.title),
            justify="left" if column.left else "right",
            width=widths[column.key],
            no_wrap=not column.wrap,
        )
    for row in table.rows:
        grid.add_row(*(Text(row[column.key]) for column in columns))
    out = io.StringIO()
    total = _total(list(widths.values())) + GAP
    Console(file=out, width=total, color_system=None, legacy_windows=False).print(grid)
    return [f" {line}" for line in out.getvalue().splitlines()]


# Files.


def _markdown(table: Table) -> str:
    lines = [f"### {_escape(' · '.join(table.title))}", ""]
    lines.append("| " + " | ".join(_escape(column.title) for column in table.columns) + " |")
    lines.append("|" + "|".join(":--" if column.left else "--:" for column in table.columns) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(_escape(row[column.key]) for column in table.columns) + " |")
    lines.append("")
    below = [f"- **Warning:** {_escape(text)}" for text in table.warnings]
    below += [f"- {_escape(note)}" for note in table.footnotes]
    return "\n".join(lines + below + [""] * bool(below))


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: no table cell, strike-through or emphasis starts in it."""
    for mark in "\\|~*<":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _csv(tables: list[Table]) -> str:
    rows = [row for table in tables for row in table.data]
    out = io.StringIO()
    names = dict.fromkeys(key for row in rows for key in row)  # kinds of rows differ in what they have
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _plain(key, value) for key, value in row.items()})
    return out.getvalue()


def _plain(key: str, value: object) -> object:
    """Six digits: of a p-value the first ones, of other numbers those behind the point."""
    if not isinstance(value, float):
        return value
    if value.is_integer():
        return int(value)
    return float(f"{value:.6g}") if P_VALUE.search(key) else round(value, 6)
