"""The efficiency table of the LRA paper (arXiv 2011.04006, Table 2) beside our own measurements.

The paper: training steps per second and memory of one of 16 TPU v3 chips, byte text, batch 32. Ours: one
device, so that memory is that of the whole batch; both are told relative to explicit softmax.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lra.report.cells import Column, Table, number
from lra.report.groups import FLOORS
from lra.report.published import NAMES
from lra.report.series import Series, measured

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


def tables(facts: dict, members: list[Series]) -> list[Table]:
    """The table of one setting, of which `facts` are the plain numbers; none if it has not what it takes."""
    if facts["task"] != TASK or facts["batch_size"] != BATCH:
        return []
    train = [s for s in members if s.mode == "train" and set(LENGTHS) & set(s.cells)]
    base = next((s for s in train if s.mechanism == BASE and s.own.get("kernel") == "math"), None)
    if base is None:
        return []
    lengths = [n for n in LENGTHS if n in base.cells]
    columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
    for name in ("speed", "memory"):
        columns += [Column(f"{name} {n}", f"{name} {n // 1000}K", left=True) for n in lengths]
    rows, data = [], []
    for series in sorted(train, key=lambda s: (s is not base, s.mechanism in FLOORS, s.label)):
        row = {"mechanism": series.label}
        for length in lengths:
            fused = series.mechanism == BASE and series is not base  # the paper has none
            paper = Printed(None, None) if fused else printed(series.mechanism, length)
            ours = {
                "speed": _inverse(_ratio(series, base, length, "step_ms")),
                "memory": _ratio(series, base, length, "peak_mem_mib"),
            }
            for name, own in ours.items():
                text = own if isinstance(own, str) else number(own)
                row[f"{name} {length}"] = f"{text} / {number(getattr(paper, name))}"
            data.append(
                {"kind": "efficiency", **facts, "mode": "train", "mechanism": series.mechanism}
                | {"label": series.label, "length": length}
                | {f"{k}_over_explicit": v if not isinstance(v, str) else None for k, v in ours.items()}
                | {"published_speed": paper.speed, "published_memory": paper.memory}
            )
        rows.append(row)
    notes = [
        "ours / the paper's, both over explicit softmax at the same length; speed: training steps a second, "
        "more is better; memory: peak, less is better",
        "the paper: arXiv 2011.04006, Table 2, memory of one of 16 TPU v3 chips that share the batch, in "
        "JAX: ratios of another machine and another code, not numbers to reproduce",
    ]
    return [Table(("Efficiency beside the LRA paper",), columns, rows, notes, data, matrix=True)]


def _ratio(series: Series, base: Series, length: int, what: str) -> float | str:
    """Of the costs of a mechanism and of explicit softmax; how a cell ended where there is no number."""
    if ended := _ended(series, length, what):
        return ended
    if ended := _ended(base, length, what):
        return f"- (explicit: {ended})"
    return series.value(length, what)[0] / base.value(length, what)[0]


def _inverse(ratio: float | str) -> float | str:
    return ratio if isinstance(ratio, str) else 1 / ratio


def _ended(series: Series, length: int, what: str) -> str:
    """How a cell without a number ended; empty if it has one."""
    runs = series.cells.get(length, [])
    if any(run["status"] == "ok" and measured(run, what) for run in runs):
        return ""
    return runs[-1]["status"] if runs else "-"


def why_not(runs: list[dict]) -> list[str]:
    """Why measurements that the paper's preset made stand beside no number of the paper."""
    if not any("preset=efficiency" in str(run["command"]) for run in runs):
        return []
    lengths = ", ".join(f"{n:,}" for n in LENGTHS)
    return [
        f"no table beside the LRA paper: it takes training steps of task {TASK}, batch {BATCH}, at lengths "
        f"among {lengths}, explicit softmax (model.kernel=math) among them"
    ]
