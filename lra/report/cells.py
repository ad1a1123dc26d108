"""What a table is made of, and how one number reads; a hyphen stands for what is not known."""

from dataclasses import dataclass, field

import numpy as np

from lra.report import published, stats


@dataclass(frozen=True)
class Column:
    """`drop` orders the columns that a narrow terminal leaves out, 1 first; 0 is never left out."""

    key: str
    title: str
    drop: int = 0
    left: bool = False
    wrap: bool = False


@dataclass
class Table:
    """Text for people in `rows`, plain numbers for programs in `data` (empty if another table has them)."""

    title: tuple[str, ...]
    columns: list[Column]
    rows: list[dict[str, str]]
    footnotes: list[str] = field(default_factory=list)
    data: list[dict] = field(default_factory=list)
    matrix: bool = False  # columns of one kind: a narrow terminal continues them below
    keys: int = 1  # how many columns, from the first, say which row it is
    warnings: list[str] = field(default_factory=list)  # what forbids a comparison that the table invites


def accuracy_text(summary: stats.Summary, letters: str) -> str:
    """`34.4 ± 0.3  a`, in percent."""
    if summary.mean is None:
        return "-"
    spread = "" if summary.std is None else f" ± {100 * summary.std:.1f}"
    return f"{100 * summary.mean:.1f}{spread}" + (f"  {letters}" if letters else "")


def interval_text(summary: stats.Summary) -> str:
    """`32.9 - 35.9`, in percent; a mark where it covers only one of the two sources of variance."""
    if summary.low is None or summary.high is None:
        return "-"
    mark = {stats.TEST_ONLY: " †", stats.SEEDS_ONLY: " ‡"}.get(summary.basis, "")
    return f"{100 * summary.low:.1f} - {100 * summary.high:.1f}{mark}"


def published_text(cell: published.Cell | None) -> str:
    """The printed accuracy with its flags: `37.10`, recalled `~37.98`, copied `(36.37)`, or `fail`."""
    if cell is None or (cell.value is None and not cell.failed):
        return ""
    text = "fail" if cell.value is None else f"{cell.value:.2f}"
    text = f"~{text}" if cell.recalled else text
    return f"({text})" if cell.copied else text


def number(value: float | None) -> str:
    """Three digits or more: `4,210`, `51.3`, `4.00`, `0.482`; below a thousandth two: `0.00024`."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.0009995:
        return (
            f"{value:.1e}"
            if abs(value) < 0.0000095
            else np.format_float_positional(value, 2, fractional=False)
        )
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:,.{digits}f}"


def si(value: float | None, space: str = "") -> str:
    """A large number with a prefix: `842`, `12.3k`, `1.24M`."""
    if value is None:
        return "-"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.9995:
            digits = 2 if abs(value) < 9.995 * scale else 1 if abs(value) < 99.95 * scale else 0
            return f"{value / scale:.{digits}f}{space}{prefix}"
    return f"{value:.0f}"


def p_text(value: float | None) -> str:
    """A p-value to two digits: `0.35`, `0.012`, `< 0.001`."""
    if value is None:
        return "-"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"
