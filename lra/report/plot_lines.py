"""Panels of lines with their names at the ends: what cost, learning curves and length buckets have in common.

Names stand in a column to the right of a panel, each beside the end of its line or joined to it by a thin
one. Past `MANY` lines a panel is unreadable in colour: some are lit, the rest are grey, and of those only
the ones for whose name the column has room are named.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lra.errors import unknown
from lra.report import figure as pages
from lra.report.figure import FAINT, GRID, INK
from lra.report.labels import stack
from lra.report.style import FAILURE, Style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 12
NAME_SIZE = 8  # points
ROW = 0.16  # inches from one name to the next
LEADER, SWATCH = 0.22, 0.24  # inches from the panel to the swatch of a name, and from there to its text
PLOT_WIDTH, PLOT_HEIGHT = 3.9, 3.3  # inches, of one panel's axes
LEFT, BOTTOM = 0.72, 0.62  # inches beside and below one panel's axes
APART = 0.3  # inches between what stands over or beside one panel and the next
GREY = "#B8B8B8"


@dataclass
class Line:
    """One mechanism in one panel; `low` and `high` bound a band or bars, `ended` says why it stops early."""

    mechanism: str
    label: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    variant: int = 0
    ended: str | None = None
    note: str = ""  # behind the label
    lit: bool = True
    strong: bool = False  # what the others are compared with
    marks: list[tuple[float, float, float | None, float | None]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.label + (f"  {self.note}" if self.note else "")


@dataclass
class Panel:
    """What one pair of axes shows; `dress` sets scales, ticks and limits before the names are placed."""

    title: str
    rest: Sequence[str]
    lines: list[Line]
    xlabel: str
    ylabel: str
    dress: Callable[["Axes"], None]
    bars: bool = False  # else a band


def known(frame: "pd.DataFrame", models: Sequence[str] | None) -> None:
    """Raises UserError for a name among `models` that no record has."""
    names = {str(name) for name in frame["model"].dropna()}
    for name in models or ():
        if name not in names:
            raise unknown("mechanism in these records", name, names)


def light(lines: Iterable[Line], telling: Callable[[], set[str]], models: Sequence[str] | None) -> None:
    """Lights the lines of `models`, or all of up to `MANY`, or of more the labels that `telling` names."""
    lines = list(lines)
    if models:
        for line in lines:
            line.lit = line.mechanism in models
        return
    if len({line.label for line in lines}) > MANY:
        labels = telling()
        for line in lines:
            line.lit = line.label in labels


def draw(
    panels: Sequence[Panel], looks: dict[str, Style], notes: Sequence[str], *, columns: int = 2
) -> "Figure":
    """A figure of panels in rows of `columns`; as wide as the names need and as high as they stack."""
    labels = pages.short_labels(line.label for panel in panels for line in panel.lines)
    for line in (line for panel in panels for line in panel.lines):
        line.label = labels[line.label]
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    ruler = pages.new(1, 1)
    texts = [line.text for panel in panels for line in panel.lines if line.lit]
    longest = max((pages.text_size(ruler, text, NAME_SIZE)[0] / ruler.dpi for text in texts), default=0.5)
    names = LEADER + SWATCH / 2 + longest + 0.12
    count = max(sum(line.lit for line in panel.lines) for panel in panels)
    cell = LEFT + PLOT_WIDTH + names + APART
    headings = [pages.Heading.of(panel.title, panel.rest, cell - LEFT - APART) for panel in panels]
    top = max(heading.height for heading in headings)
    height = max(PLOT_HEIGHT, ROW * (count + 1))
    lines = pages.note_lines(columns * cell, notes)
    foot = 0.12 + pages.LINE_HEIGHT * len(lines)
    size = columns * cell, foot + rows * (top + height + BOTTOM)
    figure = pages.new(*size)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left, bottom = column * cell + LEFT, foot + (rows - 1 - row) * (top + height + BOTTOM) + BOTTOM
        box = (left / size[0], bottom / size[1], PLOT_WIDTH / size[0], height / size[1])
        _draw_panel(figure.add_axes(box), panel, headings[index], looks)
    pages.write_notes(figure, lines)
    return figure


def _draw_panel(axes: "Axes", panel: Panel, heading: pages.Heading, looks: dict[str, Style]) -> None:
    pages.write_heading(axes, heading)
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    lit = [line for line in panel.lines if line.lit]
    for line in panel.lines:
        if not line.lit:
            axes.plot(line.x, line.y, color=GREY, linewidth=0.7, zorder=1.5)
            if line.ended:
                axes.plot(line.x[-1:], line.y[-1:], FAILURE, color=GREY, markersize=4, zorder=1.5)
    for index, line in enumerate(lit):
        _draw_line(axes, line, looks[line.mechanism].variant(line.variant), index, panel.bars)
    panel.dress(axes)
    _name_ends(axes, panel.lines, looks)


def _draw_line(axes: "Axes", line: Line, style: Style, index: int, bars: bool) -> None:
    face = "white" if line.variant else style.colour
    every = max(1, math.ceil(len(line.x) / 6))
    axes.plot(
        line.x, line.y, color=style.colour, linewidth=2.6 if line.strong else 1.4,
        dashes=style.dash or (None, None), marker=style.marker, markersize=4.2, markerfacecolor=face,
        markeredgewidth=0.9, markevery=(index % every, every), zorder=3,
    )  # fmt: skip
    if line.low and bars:
        arms = [
            [max(0.0, y - low) for y, low in zip(line.y, line.low, strict=True)],
            [max(0.0, high - y) for y, high in zip(line.y, line.high, strict=True)],
        ]
        axes.errorbar(line.x, line.y, arms, fmt="none", ecolor=style.colour, elinewidth=0.9, capsize=2)
    elif line.low:
        axes.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.15, linewidth=0, zorder=2)
    for x, y, low, high in line.marks:
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=style.colour, linewidth=3, alpha=0.35, zorder=3.5)
        axes.plot(
            [x], [y], "o", markersize=8.5, markerfacecolor="none", markeredgecolor=style.colour,
            markeredgewidth=1.4, zorder=4,
        )  # fmt: skip
    if line.ended:
        axes.plot(
            line.x[-1:], line.y[-1:], FAILURE, markersize=9, markerfacecolor=style.colour,
            markeredgecolor="white", markeredgewidth=0.8, zorder=4,
        )  # fmt: skip


def _name_ends(axes: "Axes", lines: list[Line], looks: dict[str, Style]) -> None:
    """Names in the column beside the axes; all places are fractions of the axes, true at any resolution."""
    figure = axes.figure
    width, height = (
        size * inches for size, inches in zip(axes.get_position().size, figure.get_size_inches(), strict=True)
    )
    row = ROW / height
    # From a log scale's transform come floats that differ in the last digit by machine: four are enough.
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [tuple(round(float(v), 4) for v in to_axes.transform((line.x[-1], line.y[-1]))) for line in lines]
    wanted = [min(max(y, 0.0), 1.0) for _, y in ends]
    low, high = -0.5 * row, 1 + 0.5 * row
    lit = [i for i, line in enumerate(lines) if line.lit]
    places = dict(zip(lit, stack([wanted[i] for i in lit], row, low, high), strict=True))
    for index, line in enumerate(lines):  # a grey name only where it stands at its line and near no other
        if not line.lit and all(abs(wanted[index] - place) >= row for place in places.values()):
            places[index] = wanted[index]
    x_swatch, x_text = 1 + LEADER / width, 1 + (LEADER + SWATCH / 2) / width
    for index, place in places.items():
        line = lines[index]
        style = looks[line.mechanism].variant(line.variant)
        end_x, end_y = ends[index]
        colour = style.colour if line.lit else GREY
        early = end_x < max(x for x, _ in ends) - 0.2
        axes.plot(
            [end_x, x_swatch], [end_y, place], color=colour, linewidth=0.6, alpha=0.8, clip_on=False,
            zorder=1.8, linestyle=(0, (1, 2.5)) if early else "-", transform=axes.transAxes,
            scalex=False, scaley=False,
        )  # fmt: skip
        if line.lit:
            axes.plot(
                [x_swatch], [place], style.marker, color=style.colour, markersize=4.6, clip_on=False,
                markerfacecolor="white" if line.variant else style.colour, transform=axes.transAxes,
                markeredgewidth=0.9, scalex=False, scaley=False,
            )  # fmt: skip
        axes.text(
            x_text, place, line.text if line.lit else line.label, fontsize=NAME_SIZE, va="center_baseline",
            color=INK if line.lit else FAINT, transform=axes.transAxes,
            fontweight="bold" if line.strong else "normal",
        )  # fmt: skip
