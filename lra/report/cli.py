"""The verbs `lra table` and `lra plot`: parse, call, print."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from lra import records
from lra.arguments import Parser
from lra.errors import UserError, unknown
from lra.report import render
from lra.report.tables import BY, build

BY_SUFFIX = {"": "text", ".txt": "text", ".md": "md", ".csv": "csv", ".tex": "latex"}
BY_SUFFIX |= {".html": "html", ".htm": "html"}


def table_main(argv: list[str]) -> int:
    """Prints records as tables; failed runs are rows of them and no failure of this verb."""
    parser = Parser(
        prog="lra table", description="Records to tables: intervals, ties, published numbers, cost."
    )
    add_runs(parser)
    parser.add_argument("--by", help=f"{' or '.join(BY)} (default: length)")
    parser.add_argument(
        "--format", help=f"{', '.join(render.FORMATS)} (default: by the output's suffix, else text)"
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="also every pair of rows: difference, interval, four paired tests",
    )
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: print)")
    options = parser.parse_args(argv)
    form = options.format or _format_of(options.output)
    if form not in render.FORMATS:
        raise unknown("table format", form, render.FORMATS)
    tables = build(records.load(options.runs or None), options.by, pairs=options.pairs)
    if options.output:
        write_text(options.output, render.render(tables, form))
        print(options.output)
    else:
        sys.stdout.write(render.render(tables, form, width=render.terminal_width()))
    return 0


def _format_of(output: Path | None) -> str:
    suffix = output.suffix.lower() if output else ""
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    raise UserError(
        f"'{output}': no table format has the suffix '{suffix}'; name a file that ends in "
        f"{', '.join(filter(None, BY_SUFFIX))}, or give --format {', '.join(render.FORMATS)}"
    )


def plot_main(argv: list[str]) -> int:
    """Draws one kind of figure and names the files it wrote."""
    from lra.report import figures

    kinds = "\n".join(f"  {kind:<8} {what}" for kind, what in figures.KINDS.items())
    parser = Parser(
        prog="lra plot",
        usage="lra plot [KIND] [RUNS ...] [-o FILE] [--models A,B]",
        description=f"Records to figures. KIND is one of (default: speed)\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_runs(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help=".png, .svg or .pdf (default: KIND.png, accuracy_speed.png for speed)",
    )
    parser.add_argument("--models", help="mechanisms to draw in colour, with commas (cost, curves, lengths)")
    options = parser.parse_args(argv)
    kind, runs = _kind(options.runs, figures.KINDS)
    output = options.output or Path("accuracy_speed.png" if kind == "speed" else f"{kind}.png")
    models = [name for name in (options.models or "").split(",") if name]
    for path in figures.write(kind, records.load(runs or None), output, models):
        print(path)
    return 0


def _kind(given: list[str], kinds: Iterable[str]) -> tuple[str, list[str]]:
    """The kind of figure and the runs; a first word that is no file is a kind, unless it reads as a path."""
    if not given or Path(given[0]).exists():
        return "speed", given
    if given[0] in kinds:
        return given[0], given[1:]
    if any(mark in given[0] for mark in (os.sep, ".")):
        return "speed", given
    raise UserError(f"{unknown('figure', given[0], kinds)}; and no file or folder has this name")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The argument of every verb that reads records."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUNS",
        help="run folders, folders of runs, record.json or .jsonl files (default: $LRA_RUNS, else ./runs)",
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; UserError if that cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write '{path}': {error.strerror}; name a file in an existing folder"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
