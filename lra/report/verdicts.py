"""Ours beside a published number: a verdict only where the data and the number of seeds allow one."""

import re

from lra.report.published import Cell
from lra.report.stats import Summary

TOLERANCE = 1.0  # points of accuracy within which a number counts as reproduced
AGREES = {"original": "reproduced", "regenerated": "consistent"}  # origin of the data -> word for agreement
LEAST_SEEDS = 3
CHANGED = re.compile(r"[a-z][\w.]*=")  # a deviation that is a setting: `train.lr=0.1 (recipe: 0.001)`


def verdict(
    summary: Summary, cell: Cell | None, *, origin: str | None, changed: bool, tolerance: float = TOLERANCE
) -> str:
    """`reproduced`, `consistent`, `higher`, `lower` or `not comparable`; empty where there is nothing to say.

    Agreement is a published value inside our interval or within `tolerance` points of our mean, and takes
    three seeds. `changed`: the run has other settings than the recipe.
    """
    if cell is None or cell.value is None or summary.mean is None:
        return ""
    if origin not in AGREES or changed:
        return "not comparable"
    if summary.low is None or summary.high is None or summary.num_seeds < 2:
        return ""
    ours = 100 * summary.mean
    inside = 100 * summary.low <= cell.value <= 100 * summary.high
    if inside or round(abs(ours - cell.value), 9) <= tolerance:
        return AGREES[origin] if summary.num_seeds >= LEAST_SEEDS else ""
    return "higher" if ours > cell.value else "lower"


def changed(deviations: list[str]) -> bool:
    """Whether a run was given other settings than its recipe's."""
    return any(CHANGED.match(deviation) for deviation in deviations)


def footnote(verdicts: set[str], tolerance: float = TOLERANCE) -> str | None:
    """What the verdicts of a table mean; None if it has none."""
    found = verdicts - {""}
    parts = []
    if found - {"not comparable"}:
        parts.append(
            f"reproduced (regenerated data: consistent): published value inside our interval or within "
            f"{tolerance:.1f} points of our mean, {LEAST_SEEDS} seeds or more; else ours is higher or lower"
        )
    if "not comparable" in found:
        parts.append("not comparable: other data than the paper's, or other settings than the recipe's")
    return f"verdict: {'; '.join(parts)}" if parts else None
