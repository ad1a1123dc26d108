"""The verb `lra report`: parse, call, name the file."""

from pathlib import Path

from lra import records
from lra.arguments import Parser
from lra.report.cli import add_runs, write_text
from lra.report.page import TITLE, page


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
    write_text(options.output, page(records.load(options.runs or None), title=options.title))
    print(options.output)
    return 0
