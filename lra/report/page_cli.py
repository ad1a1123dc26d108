"""The verb `lra report`: parse, call, name the file."""

import os
import tempfile
from pathlib import Path

from lra import records
from lra.arguments import Parser
from lra.errors import UserError
from lra.report.cli import add_runs, write_text
from lra.report.page import TITLE, page

SUFFIXES = (".html", ".htm")


def report_main(argv: list[str]) -> int:
    """Writes one page of tables, figures and runs; failed runs are rows of it and no failure of this verb."""
    parser = Parser(
        prog="lra report",
        description="One page for a browser, in one file: tables to sort and filter, figures, and every run "
        "with its settings, its environment and the command that repeats it.",
    )
    add_runs(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument("--title", default=TITLE, help="heading of the page")
    options = parser.parse_args(argv)
    check_output(options.output)
    write_text(options.output, page(records.load(options.runs or None), title=options.title))
    print(options.output)
    return 0


def check_output(path: Path) -> None:
    """UserError for a page that could not be written, before the minutes that a large one can take."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"'{path}': the page is HTML; name a file that ends in {' or '.join(SUFFIXES)} (lra plot draws "
            "figures, lra table writes tables of other formats)"
        )
    if path.is_dir():
        raise UserError(f"cannot write '{path}': it is a folder; name a file")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"cannot write '{path}': there is no folder '{folder}'; name an existing folder")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write '{path}': no file can be made in '{folder}' ({os.strerror(error.errno)}); "
            "name a folder that you may write to"
        ) from error
