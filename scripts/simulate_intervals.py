"""Coverage of the intervals and error of the tie test, by simulation, as Markdown.

usage: python scripts/simulate_intervals.py -o results/tables/simulation.md [--trials 4000]
"""

import argparse
import time
from pathlib import Path

from lra.report import simulation
from lra.report.render import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .md file to write")
    parser.add_argument(
        "--trials", type=int, default=4000, help="per cell of the first table (default: 4000)"
    )
    args = parser.parse_args()
    started = time.monotonic()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render(simulation.tables(args.trials), "md"), encoding="utf-8")
    print(f"{args.output}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
