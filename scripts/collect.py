"""Curated records for results/: one line per run, without what only the machine that made them knows.

usage: python scripts/collect.py RUNS... -o results/NAME.jsonl
"""

import argparse
import json
from pathlib import Path

from lra import records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .jsonl file to write")
    args = parser.parse_args()
    folders = sorted({Path(path) for path in records.load(args.runs).path})
    found = [records.read(folder).to_dict() | {"host": None} for folder in folders]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in found))
    print(f"{args.output}: {len(found)} records")


if __name__ == "__main__":
    main()
