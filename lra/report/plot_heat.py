"""Mechanisms by tasks as a heat map, each task's colours from its majority class to its best mechanism."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lra.report import groups as grouping
from lra.report import published
from lra.report.cells import published_text
from lra.report.figure import (
    INK,
    LINE_HEIGHT,
    NOTE,
    SMALL,
    TITLE,
    NamedFigure,
    NoMaterial,
    fit,
    new,
    note_lines,
    short_labels,
    text_size,
    write_notes,
)
from lra.report.groups import CONDITIONS, FLOORS, TASK_TITLES, Group, Row

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "cividis"  # from dark to light without a turn: survives grey printing, and all colour deficiencies
CELL = (1.12, 0.25)  # inches
TALL = 0.36  # inches, a row where some cell has a published number below its own
LEAST_WIDTH, SCALE = 4.6, 1.6  # inches, of the figure and of the strip that explains the colours
NAMES = 8.5  # points


@dataclass(frozen=True)
class _Cell:
    text: str
    share: float | None  # of the way from the majority class to the best; None is not coloured
    below: str  # the published number
    failed: bool


def heat(frame: "pd.DataFrame") -> list[NamedFigure]:
    """A figure for each recipe, precision, selection and device; what failed shows its status."""
    bundles: dict[tuple, list[Group]] = defaultdict(list)
    for group in grouping.train_groups(frame, ties=False):
        if any(row.summary.mean is not None for row in group.rows):
            bundles[tuple(str(group.facts[key]) for key in CONDITIONS)].append(group)
    if not bundles:
        raise NoMaterial(
            "nothing to plot: no run here has a test accuracy; see `lra table` for what the runs gave, "
            "or make one: lra train task=listops model=linear"
        )
    figures = []
    for index, bundle in enumerate(bundles.values(), start=1):
        name = "heat" if index == 1 else f"heat-{index}"
        figures.append(NamedFigure(name, "Accuracy of mechanisms by task", _draw(bundle)))
    return figures


def _order(bundle: list[Group]) -> list[tuple[str, str]]:
    """(label, mechanism), as in the tables: most tasks first, then the best mean; floors last."""
    means: dict[tuple[str, str], list[float]] = defaultdict(list)
    for group in bundle:
        for row in group.rows:
            means[row.label, row.mechanism] += [] if row.summary.mean is None else [row.summary.mean]

    def order(key: tuple[str, str]) -> tuple:
        return (key[1] in FLOORS, -len(means[key]), -sum(means[key]) / max(len(means[key]), 1), key)

    return sorted(means, key=order)


def _cells(group: Group) -> dict[str, _Cell]:
    best = max(row.summary.mean for row in group.rows if row.summary.mean is not None)
    return {row.label: _cell(group, row, best) for row in group.rows}


def _cell(group: Group, row: Row, best: float) -> _Cell:
    facts = group.facts
    paper = published.lookup(facts["paper"], facts["task"], row.mechanism, length=facts["length"])
    below, mean = published_text(paper), row.summary.mean
    if mean is None:
        return _Cell("no test" if row.ok else row.state, None, below, not row.ok)
    share = None
    if group.majority is not None:
        span = best - group.majority
        share = min(max((mean - group.majority) / span, 0.0), 1.0) if span > 0 else 0.0
    return _Cell(f"{100 * mean:.1f}", share, below, False)


def _heading(group: Group, bundle: list[Group]) -> str:
    facts = group.facts
    name = TASK_TITLES.get(facts["task"], facts["task"])
    lines = [name, f"{facts['length']:,}" if facts["length"] is not None else ""]
    alike = [g for g in bundle if (g.facts["task"], g.facts["length"]) == (facts["task"], facts["length"])]
    if len(alike) > 1:
        lines.append(str(facts["data_hash"])[:6])
    majority = group.majority
    lines.append("majority ?" if majority is None else f"majority {100 * majority:.1f}")
    return "\n".join(line for line in lines if line)


def _draw(bundle: list[Group]) -> "Figure":
    import matplotlib
    from matplotlib.patches import Rectangle

    rows = _order(bundle)
    columns = [_cells(group) for group in bundle]
    headings = [_heading(group, bundle) for group in bundle]
    with_paper = any(cell.below for cells in columns for cell in cells.values())
    heights = [
        TALL if any(cells[label].below for cells in columns if label in cells) else CELL[1]
        for label, _ in rows
    ]
    edges = [sum(heights[:index]) for index in range(len(rows) + 1)]  # inches below the first row's top
    ruler = new(1, 1)
    shown = short_labels(label for label, _ in rows)
    left = 0.3 + max(text_size(ruler, label, NAMES)[0] for label in shown.values()) / ruler.dpi
    width = max(left + CELL[0] * len(bundle) + 0.25, left + SCALE + 0.6, LEAST_WIDTH)
    rest = fit([part for part in bundle[0].title()[1:] if not part.startswith("majority")], width - 0.3)
    notes = note_lines(width, _notes(columns, with_paper))
    foot = 0.12 + LINE_HEIGHT * len(notes) + 0.62
    top = 0.34 + 0.14 * len(rest) + 0.16 * (max(text.count("\n") for text in headings) + 1) + 0.2
    size = width, foot + edges[-1] + top
    figure = new(*size)
    axes = figure.add_axes(
        (left / size[0], foot / size[1], CELL[0] * len(bundle) / size[0], edges[-1] / size[1])
    )
    axes.set(xlim=(0, len(bundle)), ylim=(edges[-1], 0))
    colours = matplotlib.colormaps[MAP]
    for x, cells in enumerate(columns):
        for y, (label, _) in enumerate(rows):
            cell = cells.get(label)
            share = None if cell is None else cell.share
            face = "#F4F4F4" if cell is None else "white" if share is None else colours(share)
            hatch = "////" if cell is not None and cell.failed else None
            axes.add_patch(
                Rectangle(
                    (x, edges[y]), 1, heights[y], facecolor=face, hatch=hatch, linewidth=1,
                    edgecolor="#D5D5D5" if hatch else "white",
                )
            )  # fmt: skip
            if cell is not None:
                _write(axes, x + 0.5, edges[y], heights[y], cell, _readable(face))
    axes.set_xticks([x + 0.5 for x in range(len(bundle))], headings, fontsize=8, linespacing=1.15)
    middles = [edge + height / 2 for edge, height in zip(edges, heights, strict=False)]
    axes.set_yticks(middles, [shown[label] for label, _ in rows], fontsize=NAMES)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    across, up = 0.15 / size[0], 1 / size[1]
    figure.text(across, 1 - 0.26 * up, "Accuracy by task, %", fontsize=TITLE, fontweight="bold", color=INK)
    for index, line in enumerate(rest):
        figure.text(across, 1 - (0.44 + 0.14 * index) * up, line, fontsize=SMALL, color=NOTE)
    _scale(figure, left, foot, colours)
    write_notes(figure, notes)
    return figure


def _write(axes: "Axes", x: float, top: float, height: float, cell: _Cell, colour: str) -> None:
    plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.2} if cell.failed else None
    style = {"ha": "center", "va": "center_baseline", "color": colour, "bbox": plate}
    size = SMALL if cell.failed else 9
    axes.text(x, top + height * (0.36 if cell.below else 0.52), cell.text, fontsize=size, **style)
    if cell.below:
        axes.text(x, top + 0.78 * height, cell.below, fontsize=6.5, **style)


def _readable(face: object) -> str:
    """Black or white, whichever stands out more on a colour (WCAG's relative luminance)."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(face)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _scale(figure: "Figure", left: float, foot: float, colours: object) -> None:
    """What the colours mean, below the map."""
    import numpy as np

    width, height = figure.get_size_inches()
    bottom = foot - 0.40
    axes = figure.add_axes((left / width, bottom / height, SCALE / width, 0.13 / height))
    axes.imshow(np.linspace(0, 1, 128)[None], aspect="auto", cmap=colours, extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 1], ["majority class", "best of the task"], fontsize=7.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _notes(columns: list[dict[str, _Cell]], with_paper: bool) -> list[str]:
    cells = [cell for column in columns for cell in column.values()]
    notes = []
    if with_paper:
        notes.append(
            "Small: the recipe's published number; ~ recalled, not looked up; in brackets: taken over by the "
            "paper from an earlier one."
        )
    if any(cell.failed for cell in cells):
        notes.append("Hatched: no run ended well; its status.")
    if any(cell.share is None and not cell.failed for cell in cells):
        notes.append("White: no majority rate on record, or not tested.")
    return notes
