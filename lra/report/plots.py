"""Figures: accuracy against speed, with memory as the area of a marker."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lra.report import groups as grouping
from lra.report.cells import number
from lra.report.figure import (
    FAINT,
    GRID,
    INK,
    LINE_HEIGHT,
    NOTE,
    Heading,
    NamedFigure,
    NoMaterial,
    log_ticks,
    new,
    note_lines,
    short_labels,
    some,
    text_size,
    tick,
    write_heading,
    write_notes,
)
from lra.report.groups import Group, Row
from lra.report.labels import Box, Spot, place_labels
from lra.report.style import Style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 4  # per figure
ALONE, SIDE, CROWDED = (6.37, 3.1), (5.2, 3.1), (10.97, 6.4)  # width and height of a panel's axes, inches
LEFT, RIGHT, BELOW = 0.68, 0.35, 0.62  # inches around a panel's axes
CROWD = 20  # points past which a panel has a figure of its own, and smaller markers
LARGEST, SMALLEST, UNKNOWN = 560.0, 12.0, 32.0  # drawn areas in square points
LARGEST_IN_CROWD = 260.0
BAR = 3.5  # half the width of an error bar with its caps and some air, in points
LEVELS = {"identity": (0, (5, 3)), "majority class": (0, (1, 2))}  # line styles
SPEEDS = {"tokens_per_s": "tokens/s", "examples_per_s": "examples/s"}


@dataclass(frozen=True)
class _Point:
    row: Row
    speed: float
    accuracy: float  # percent, as are `below` and `above`, the arms of the error bar
    below: float
    above: float
    memory: float | None


@dataclass
class _Panel:
    group: Group
    points: list[_Point]
    left_out: list[tuple[str, str]]  # label, reason


def accuracy_speed(frame: "pd.DataFrame", looks: dict[str, Style]) -> list[NamedFigure]:
    """Accuracy against training speed, a panel per task, length and conditions, up to four in a figure.

    NoMaterial if no run has both an accuracy and a speed.
    """
    groups = grouping.train_groups(frame, ties=False)
    speed = max(
        SPEEDS, key=lambda key: sum(row.mean(key) is not None for group in groups for row in group.rows)
    )
    every = [_panel(group, speed) for group in groups]
    panels = [panel for panel in every if panel.points]
    if not panels:
        raise NoMaterial(
            "nothing to plot: no run here has both a test accuracy and a speed; "
            "see `lra table` for what the runs gave, or make one: lra train task=listops model=linear"
        )
    figures = []
    crowded = any(len(panel.points) > CROWD for panel in panels)
    step = 1 if crowded else PANELS
    for first in range(0, len(panels), step):
        name = "speed" if first == 0 else f"speed-{first // step + 1}"
        drawn = _draw(panels[first : first + step], looks, SPEEDS[speed], crowded)
        figures.append(NamedFigure(name, "Accuracy against speed", drawn))
    return figures


def _panel(group: Group, speed: str) -> _Panel:
    points, left_out = [], []
    for row in group.rows:
        summary, at = row.summary, row.mean(speed)
        if summary.mean is None or not at:
            reason = row.state if not row.ok else "no accuracy" if summary.mean is None else "no speed"
            left_out.append((row.label, reason))
            continue
        arms = (summary.mean, summary.mean) if summary.low is None else (summary.low, summary.high)
        accuracy, low, high = (100 * value for value in (summary.mean, *arms))
        points.append(_Point(row, at, accuracy, accuracy - low, high - accuracy, row.mean("peak_mem_mib")))
    return _Panel(group, points, left_out)


def _draw(panels: list[_Panel], looks: dict[str, Style], speed: str, crowded: bool) -> "Figure":
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    width, height = CROWDED if crowded else ALONE if len(panels) == 1 else SIDE
    cell = LEFT + width + RIGHT
    headings = [_heading(panel, width + 0.1) for panel in panels]
    labels = short_labels(
        label
        for panel in panels
        for label in [*(point.row.label for point in panel.points), *(name for name, _ in panel.left_out)]
    )
    notes = note_lines(columns * cell, _notes(panels, labels))
    foot = 0.12 + LINE_HEIGHT * len(notes) + 0.62  # the legend stands above the notes
    top = max(heading.height for heading in headings)
    size = columns * cell, foot + rows * (top + height + BELOW)
    figure = new(*size)
    memories = [point.memory for panel in panels for point in panel.points if point.memory]
    scale = (LARGEST_IN_CROWD if crowded else LARGEST) / max(memories, default=1.0)
    all_axes = []
    for index, (panel, heading) in enumerate(zip(panels, headings, strict=True)):
        row, column = divmod(index, columns)
        left, bottom = column * cell + LEFT, foot + (rows - 1 - row) * (top + height + BELOW) + BELOW
        axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
        write_heading(axes, heading)
        _draw_panel(axes, panel, looks, scale, speed)
        all_axes.append(axes)
    _legend(figure, panels, memories, scale, foot - 0.3)
    write_notes(figure, notes)
    for axes, panel in zip(all_axes, panels, strict=True):
        _label(axes, panel, looks, scale, labels)
    return figure


def _heading(panel: _Panel, width: float) -> Heading:
    title, *rest = panel.group.title()
    return Heading.of(title, [part for part in rest if not part.startswith("majority")], width)


def _notes(panels: list[_Panel], labels: dict[str, str]) -> list[str]:
    bars = "Bars: 95 % interval over seeds and test set"
    if any(point.row.summary.num_seeds == 1 for panel in panels for point in panel.points):
        bars += " (one seed: test set only)"
    left_out = [f"{labels[label]} ({reason})" for panel in panels for label, reason in panel.left_out]
    return [f"{bars}.", *([f"Not drawn: {some(left_out)}."] if left_out else [])]


def _area(point: _Point, scale: float) -> float:
    """The area to draw, in square points."""
    return max(SMALLEST, point.memory * scale) if point.memory else UNKNOWN


def _marker(style: Style, area: float) -> tuple[float, float, float]:
    """What `scatter` calls the size of a marker of some area, and its half width and half height in points.

    Matplotlib's markers of one nominal size differ in area by a factor of two.
    """
    import numpy as np
    from matplotlib.markers import MarkerStyle

    marker = MarkerStyle(style.marker)
    outline = marker.get_path().transformed(marker.get_transform()).to_polygons()[0]
    x, y = outline[:, 0], outline[:, 1]
    unit = 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    side = math.sqrt(area / unit)
    return side**2, side * float(abs(x).max()), side * float(abs(y).max())


def _draw_panel(axes: "Axes", panel: _Panel, looks: dict[str, Style], scale: float, speed: str) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    speeds = [math.log10(point.speed) for point in panel.points]
    span = max(0.6, 1.34 * (max(speeds) - min(speeds)))  # room for names at both ends
    middle = (max(speeds) + min(speeds)) / 2
    # Before the points: from a single one matplotlib takes limits a rounding error apart, and divides by 0.
    axes.set_xlim(10 ** (middle - span / 2), 10 ** (middle + span / 2))
    axes.set_ylim(*_range(panel))
    for point in sorted(panel.points, key=lambda p: -(p.memory or 0)):  # small markers on top of large ones
        style = looks[point.row.mechanism]
        face = to_rgba(style.colour, 0.45) if point.memory else "white"  # what lies below shows through
        axes.scatter(
            point.speed, point.accuracy, _marker(style, _area(point, scale))[0], marker=style.marker,
            facecolor=face, edgecolor=style.colour, linewidth=1.1, zorder=3,
        )  # fmt: skip
        arms = [[point.below], [point.above]]
        layer = 3.5 if point.memory else 2.5  # a hollow marker stays hollow
        axes.errorbar(
            point.speed, point.accuracy, arms, color=style.colour, elinewidth=1, capsize=2.5, zorder=layer
        )
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"training speed, {speed} (log scale)")
    axes.set_ylabel("test accuracy, %")


def _range(panel: _Panel) -> tuple[float, float]:
    """Limits of the accuracy axis; a majority rate that would take half of it stays outside."""
    low = min(point.accuracy - point.below for point in panel.points)
    high = max(point.accuracy + point.above for point in panel.points)
    room = max(high - low, 2.0)
    for value, _ in _levels(panel):
        low, high = (min(low, value), max(high, value)) if low - value < room else (low, high)
    margin = max(0.11 * (high - low), 0.6)
    return low - margin, high + margin


def _levels(panel: _Panel) -> list[tuple[float, str]]:
    """What a mechanism has to beat, in percent, with its name."""
    found = [(p.accuracy, "identity") for p in panel.points if p.row.mechanism == "identity"][:1]
    majority = panel.group.majority
    return found + ([(100 * majority, "majority class")] if majority is not None else [])


def _label(
    axes: "Axes", panel: _Panel, looks: dict[str, Style], scale: float, labels: dict[str, str]
) -> None:
    """Names the points and the levels so that no text covers a marker or another text."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    per_point = figure.dpi / 72
    left, bottom, right, top = axes.get_window_extent(renderer).extents
    frame = Box(left + 4, bottom, right - 4, top)
    obstacles, spots = [], []
    for point in panel.points:
        x, y = axes.transData.transform((point.speed, point.accuracy))
        sizes = _marker(looks[point.row.mechanism], _area(point, scale))[1:]
        half_width, half_height = (size * per_point for size in sizes)
        _, low = axes.transData.transform((point.speed, point.accuracy - point.below))
        _, high = axes.transData.transform((point.speed, point.accuracy + point.above))
        bar = Box(x - BAR * per_point, low - per_point, x + BAR * per_point, high + per_point)
        obstacles += [Box.around(x, y, 2 * half_width, 2 * half_height), bar]
        spots.append(
            Spot(x, y, max(half_width, half_height), *text_size(figure, labels[point.row.label], 8.5))
        )
    obstacles += _label_levels(axes, panel, frame, obstacles, renderer)
    places = place_labels(spots, obstacles, frame, gap=2.5 * per_point)
    invert = axes.transData.inverted().transform
    plate = {"facecolor": "white", "alpha": 0.65, "edgecolor": "none", "pad": 0.3}
    for point, spot, place in zip(panel.points, spots, places, strict=True):
        text = axes.text(
            *invert((place.x, place.y)),
            labels[point.row.label],
            fontsize=8.5,
            color=INK,
            ha="center",
            zorder=5,
        )
        text.set(va="center", bbox=plate)
        if place.distance > 7 * per_point or place.doubtful:
            edge = Box.around(place.x, place.y, spot.width, spot.height).nearest(spot.x, spot.y)
            ends = zip(invert(edge), invert((spot.x, spot.y)), strict=True)
            axes.plot(*ends, color=looks[point.row.mechanism].colour, linewidth=0.7, zorder=4)


def _label_levels(axes: "Axes", panel: _Panel, frame: Box, markers: list[Box], renderer: Any) -> list[Box]:
    """Draws and names the levels where that covers least; returns what other names should keep clear of."""
    taken: list[Box] = []
    for value, name in _levels(panel):
        below = value < axes.get_ylim()[0]
        text = f"{name} {value:.1f} %" + (" (below)" if below else "")
        width, height = text_size(axes.figure, text, 7.5)
        _, y = axes.transData.transform((axes.get_xlim()[0], value))
        if below:
            y = frame.bottom
        else:
            axes.axhline(value, color=FAINT, linewidth=1, linestyle=LEVELS[name], zorder=1)
        places = [
            Box(x, y + dy - height / 2, x + width, y + dy + height / 2)
            for x in (frame.left, frame.right - width, (frame.left + frame.right - width) / 2)
            for dy in ((0.8 * height,) if below else (0.8 * height, -0.8 * height))
        ]
        best = min(
            places, key=lambda box: sum(box.overlap(m) for m in markers + taken * 2) + 2 * box.outside(frame)
        )
        x, y_text = axes.transData.inverted().transform((best.left, (best.bottom + best.top) / 2))
        axes.text(x, y_text, text, fontsize=7.5, color=NOTE, va="center", zorder=4)
        taken += [best] if below else [best, Box(frame.left, y - 1, frame.right, y + 1)]
    return taken


def _legend(
    figure: "Figure", panels: list[_Panel], memories: list[float], scale: float, middle: float
) -> None:
    """What a marker's area means, in a line `middle` inches above the foot of the figure."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for memory in _round_sizes(memories):
        size = 2 * math.sqrt(max(SMALLEST, memory * scale) / math.pi)
        handles.append(
            Line2D([], [], marker="o", linestyle="", markersize=size, color="#9A9A9A", mec="white")
        )
        labels.append(f"{number(memory)} MiB")
    if any(point.memory is None for panel in panels for point in panel.points):
        handles.append(Line2D([], [], marker="o", linestyle="", markersize=6.3, mfc="white", mec="#707070"))
        labels.append("memory not known")
    width, height = figure.get_size_inches()
    if handles:
        figure.text(
            0.15 / width, middle / height, "marker area: peak memory", fontsize=8, color=INK, va="center"
        )
        left = 1.8 / width
        figure.legend(
            handles, labels, loc="center left", bbox_to_anchor=(left, middle / height), ncols=len(labels),
            frameon=False, fontsize=8, handlelength=4, handletextpad=0.3, columnspacing=1.6,
            borderaxespad=0,
        )  # fmt: skip


def _round_sizes(memories: list[float]) -> list[float]:
    """Up to three round numbers of MiB that span the memories."""
    if not memories:
        return []
    steps = [m * 10.0**e for e in range(-1, 8) for m in (1, 2, 5)]
    inside = [s for s in steps if min(memories) * 0.8 <= s <= max(memories)]
    if not inside:
        return [float(f"{max(memories):.1g}")]
    return sorted({inside[0], inside[len(inside) // 2], inside[-1]})
