"""Numbers printed in papers, looked up by our names for papers, tasks and mechanisms.

`published.csv` holds one printed cell per row: source, table, mechanism, task, metric, seq_len, value,
note, where_seen. An empty value whose note starts with FAIL was reported as not learned; a missing row was
not reported. Rows with where_seen `recalled` were written from memory, and some rows a paper took over from
an earlier one, so that its recipe never ran them: both are flagged wherever a user sees them.
"""

import csv
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from lra.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cell:
    """One printed accuracy, in percent; None with `failed` where the paper reports that it did not learn."""

    value: float | None
    failed: bool
    recalled: bool
    copied: bool  # taken over by the paper from an earlier one
    mechanism: str  # as the paper names it
    source: str
    table: str
    note: str


@dataclass(frozen=True)
class _Paper:
    source: str
    table: str
    names: dict[str, str] = field(
        default_factory=dict
    )  # our mechanism -> the paper's, where it is not the usual one
    ran: tuple[str, ...] | None = None  # the rows its authors ran, if they took over others


PAPERS = {
    "lra2021": _Paper("LRA 2021 (Tay et al.)", "Table 1"),
    "nystromformer2021": _Paper("Nystromformer 2021 (Xiong et al.)", "LRA table (PyTorch re-run)"),
    "skyformer2021": _Paper("Skyformer 2021 (Chen et al.)", "Table 1", {"softmax": "Self-Attention"}),
    "luna2021": _Paper("Luna 2021 (Ma et al.)", "LRA table", {"softmax": "Transformer (re-run)"}),
    "mega2023": _Paper(
        "Mega 2023 (Ma et al.)",
        "Table 2",
        {"softmax": "Transformer (re-run)", "s4": "S4-v2 (re-run)"},
        ran=("Transformer (re-run)", "S4-v2 (re-run)", "Mega", "Mega-chunk"),
    ),
    "s4_2022": _Paper(
        "S4 2022 (Gu et al.)", "Table 4", {"s4": "S4 (S4-LegS, updated)"}, ran=("S4 (S4-LegS, updated)",)
    ),
}

NAMES = {
    "softmax": "Transformer",
    "bigbird": "BigBird",
    "cosformer": "cosFormer",
    "flash_quad": "FLASH",
    "fnet": "FNet",
    "h_transformer": "H-Transformer-1D",
    "hedgehog": "Hedgehog",
    "informer": "Informer",
    "kernelized": "Kernelized Attention",
    "las": "LaS",
    "linear": "Linear Transformer",
    "linformer": "Linformer",
    "local": "Local Attention",
    "long_short": "Transformer-LS (best)",
    "longformer": "Longformer",
    "luna": "Luna-256",
    "mega": "Mega",
    "mega_chunk": "Mega-chunk",
    "nystrom": "Nystromformer",
    "performer": "Performer",
    "reformer": "Reformer",
    "sinkhorn": "Sinkhorn Transformer",
    "skyformer": "Skyformer",
    "sparse": "Sparse Transformer",
    "synthesizer": "Synthesizer",
}

TASKS = {"pathfinder32": "pathfinder"}

# Lengths at which the papers ran each task: a shorter variant of ours has no published counterpart.
LENGTHS = {
    "listops": (2000, 2048),
    "text": (4000, 4096),
    "retrieval": (4000, 4096),
    "image": (1024,),
    "pathfinder32": (1024,),
    "pathx": (16384,),
}


def published(paper: str | None, task: str, mechanism: str) -> float | None:
    """The accuracy in percent that `paper` prints; None if it prints none (`lookup` also tells why)."""
    cell = lookup(paper, task, mechanism)
    return None if cell is None else cell.value


def lookup(paper: str | None, task: str, mechanism: str, *, length: int | None = None) -> Cell | None:
    """The printed cell with its flags; None if not reported, or not at this `length`.

    `mechanism` is one of our names or the paper's own spelling. A recipe `X_released` is another reading of
    the same paper `X` and has the same published numbers. Task `avg` is the paper's own average.
    """
    known = PAPERS.get((paper or "").removesuffix("_released"))
    if known is None or (length is not None and length not in LENGTHS.get(task, (length,))):
        return None
    name = known.names.get(mechanism) or NAMES.get(mechanism, mechanism)
    cell = _cells().get((known.source, known.table, name.lower(), TASKS.get(task, task)))
    if cell is None or known.ran is None:
        return cell
    return replace(cell, copied=cell.mechanism not in known.ran)


def facts() -> "pd.DataFrame":
    """Every printed number that ships, one row each: accuracies, and times and memory of efficiency tables.

    The columns of `published.csv`, and `recalled`: True where nobody has read the number in its source.
    """
    import pandas as pd

    with (files("lra.report") / "published.csv").open(encoding="utf-8", newline="") as file:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    frame["value"] = pd.to_numeric(frame["value"].where(frame["value"] != ""), errors="coerce")
    frame["recalled"] = frame["where_seen"] == "recalled"
    return frame


@cache
def _cells() -> dict[tuple[str, str, str, str], Cell]:
    path = files("lra.report") / "published.csv"
    cells = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] != "accuracy":
                continue
            try:
                value = float(row["value"]) if row["value"] else None
            except ValueError as error:
                raise UserError(
                    f"'{path}': {row['source']}, {row['mechanism']}: {error}; reinstall lra"
                ) from error
            cells[row["source"], row["table"], row["mechanism"].lower(), row["task"]] = Cell(
                value=value,
                failed=value is None and row["note"].startswith("FAIL"),
                recalled=row["where_seen"] == "recalled",
                copied=False,
                mechanism=row["mechanism"],
                source=row["source"],
                table=row["table"],
                note=row["note"],
            )
    return cells
