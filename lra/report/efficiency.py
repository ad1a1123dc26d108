"""The efficiency table of the LRA paper (arXiv 2011.04006, Table 2) beside our own measurements.

The paper: training steps per second and memory of one of 16 TPU v3 chips, byte text, batch 32. Ours: one
device, so that memory is that of the whole batch; both are told relative to explicit softmax.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lra.report.published import NAMES

SOURCE, TABLE = "LRA 2021 (Tay et al.)", "Table 2"
TASK, BATCH, LENGTHS, BASE = "text", 32, (1000, 2000, 3000, 4000), "softmax"


@dataclass(frozen=True)
class Printed:
    """What the paper prints of a mechanism at a length, over its Transformer; None where it prints nothing.

    speed: steps per second; memory: peak of a device.
    """

    speed: float | None
    memory: float | None


def printed(mechanism: str, length: int) -> Printed:
    """The ratios of one of our mechanisms, at the lengths of the table."""
    name = NAMES.get(mechanism, mechanism)
    if mechanism == BASE:
        return Printed(1.0, 1.0) if length in LENGTHS else Printed(None, None)
    memory, base = (_values().get((row, "memory_gb", length)) for row in (name, NAMES[BASE]))
    return Printed(
        _values().get((name, "relative_speed", length)), memory / base if memory and base else None
    )


@cache
def _values() -> dict[tuple[str, str, int], float]:
    with (files("lra.report") / "published.csv").open(encoding="utf-8", newline="") as file:
        return {
            (row["mechanism"], row["metric"], int(row["seq_len"])): float(row["value"])
            for row in csv.DictReader(file)
            if row["source"] == SOURCE and row["table"] == TABLE
        }
