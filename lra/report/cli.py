"""The verbs `lra table` and `lra plot`: parse, call, print."""

import argparse
import os
import sys
from pathlib import Path

from lra import records
from lra.arguments import Parser
from lra.errors import UserError, unknown
from lra.report import render
from lra.report.tables import BY, build

BY_SUFFIX = {".md": "md", ".csv": "csv"}


def table_main(argv: list[str]) -> int:
    """Prints records as tables; failed runs are rows of them and no failure of this verb."""
    parser = Parser(
        prog="lra table", description="Records to tables: intervals, ties, published numbers, cost."
    )
    _add_runs(parser)
    parser.add_argument("--by", help=f"{' or '.join(BY)} (default: length)")
    parser.add_argument(
        "--format", help=f"{', '.join(render.FORMATS)} (default: by the output's suffix, else text)"
    )
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: print)")
    options = parser.parse_args(argv)
    form = options.format or BY_SUFFIX.get(options.output.suffix.lower() if options.output else "", "text")
    if form not in render.FORMATS:
        raise unknown("table format", form, render.FORMATS)
    tables = build(records.load(options.runs or None), options.by)
    if options.output:
        _write(options.output, render.render(tables, form))
    else:
        sys.stdout.write(render.render(tables, form, width=render.terminal_width()))
    return 0


def plot_main(argv: list[str]) -> int:
    """Draws accuracy against speed and names the files it wrote."""
    parser = Parser(prog="lra plot", description="Accuracy against speed; marker area is peak memory.")
    _add_runs(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("accuracy_speed.png"), help=".png, .svg or .pdf"
    )
    options = parser.parse_args(argv)
    from lra.report.plots import accuracy_speed

    for path in accuracy_speed(records.load(options.runs or None), options.output):
        print(path)
    return 0


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUNS",
        help="run folders, folders of runs, record.json or .jsonl files (default: $LRA_RUNS, else ./runs)",
    )


def _write(path: Path, text: str) -> None:
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
