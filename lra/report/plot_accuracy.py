"""Learning curves, and accuracy by the real length of the test examples: a line per mechanism."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lra.errors import UserError
from lra.report import groups as grouping
from lra.report import stats
from lra.report.figure import NamedFigure, NoMaterial, some, tick
from lra.report.groups import FLOORS, Group, Row
from lra.report.plot_lines import Line, Panel, draw, known, light
from lra.report.style import Style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

METRICS = "metrics.jsonl"
GROUPS = 3  # of learning curves in a figure, two panels each
PANELS = 4  # of length buckets in a figure
BEST = 6  # mechanisms in colour where there are many, with softmax, linear and the floors
GREY_NOTE = "Grey: the other mechanisms; --models a,b,c chooses which are in colour."


def curves(
    frame: "pd.DataFrame", looks: dict[str, Style], models: Sequence[str] | None = None
) -> list[NamedFigure]:
    """Training loss and validation accuracy by step; the mean over seeds and a band from lowest to highest.

    What a run logged lies in its folder and not in its record: UserError if none of the folders is here.
    """
    known(frame, models)
    sets = []
    missing: list[str] = []
    short: list[str] = []  # curves of a single point
    for group in grouping.train_groups(frame, ties=False):
        logs = {}
        for row in group.rows:
            for run in row.ok or row.runs:
                log = _log(run["path"])
                if log is None and run["status"] == "ok":  # others may have ended before they logged
                    missing.append(run["path"])
                elif log is not None:
                    logs[id(run)] = log
        kinds = [_curve_panel(group, logs, short, *kind) for kind in CURVES]
        kinds = [panel for panel in kinds if panel.lines]
        if kinds:
            light([line for panel in kinds for line in panel.lines], lambda g=group: _best(g), models)
            sets.append((group, kinds))
    if not sets and missing:
        raise NoMaterial(
            f"no learning curves: {_count(missing)} without '{METRICS}', the first is '{missing[0]}'; "
            "committed records leave it out: name the folders of the runs, which `lra train` writes "
            "under $LRA_RUNS"
        )
    if not sets and short:
        raise NoMaterial(
            "no learning curves: every run here logged a single point, and a curve takes two; "
            "train for more steps, or evaluate more often: train.eval_every=100"
        )
    if not sets:
        raise NoMaterial(
            "no learning curves: no training run here logged any; "
            "make one: lra train task=listops model=linear"
        )
    figures = []
    for first in range(0, len(sets), GROUPS):
        panels = [panel for _, kinds in sets[first : first + GROUPS] for panel in kinds]
        notes = []
        if any(line.low for panel in panels for line in panel.lines):
            notes.append("Lines: mean over seeds; bands: from the lowest to the highest seed.")
        if missing:
            notes.append(f"Not drawn: {_count(missing)} without '{METRICS}'.")
        if short:
            notes.append(f"Not drawn, a single point each: {some(short)}.")
        if any(line.ended for panel in panels for line in panel.lines):
            notes.append("Crosses: no run of this mechanism ended well; its status stands behind the name.")
        if not all(line.lit for panel in panels for line in panel.lines):
            notes.append(GREY_NOTE)
        figures.append(_named("curves", "Learning curves", figures, draw(panels, looks, notes)))
    return figures


CURVES = (
    ("loss", "training loss, nats", 1.0),
    ("val_accuracy", "validation accuracy, %", 100.0),
)


def _named(kind: str, title: str, before: list[NamedFigure], figure: object) -> NamedFigure:
    number = len(before) + 1
    return NamedFigure(kind if number == 1 else f"{kind}-{number}", title, figure)


def _count(paths: list[str]) -> str:
    return f"{len(paths)} run{'s' if len(paths) != 1 else ''}"


def _log(path: str) -> dict[str, dict[int, float]] | None:
    """Metric -> step -> value, of a run's folder; None where there is no log."""
    file = Path(path) / METRICS
    if not Path(path).is_dir() or not file.is_file():
        return None
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"broken line {number} in '{file}': {error}; delete that line") from error
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and np.isfinite(value):
                found[key][step] = float(value)
    return found


def _curve_panel(group: Group, logs: dict, short: list[str], key: str, ylabel: str, scale: float) -> Panel:
    """Runs and lines of fewer than two points show nothing: they are left out and added to `short`."""
    lines = []
    what = ylabel.split(",")[0]
    for row in group.rows:
        logged = [logs[id(run)][key] for run in row.ok or row.runs if logs.get(id(run), {}).get(key)]
        runs = [log for log in logged if len(log) > 1]
        line = _curve(row, runs, scale) if runs else None
        if line is not None and len(line.x) > 1:
            lines.append(line)
        if len(runs) < len(logged) or (line is not None and len(line.x) < 2):
            short.append(f"{what} of {row.label}")
    _number_variants(lines)
    title, *rest = group.title()
    rest = [part for part in rest if not part.startswith("majority")]
    majority = group.majority if key == "val_accuracy" and lines else None
    if majority is not None:
        low, high = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
        inside = low - 100 * majority < max(high - low, 2.0)  # else it would take half of the panel
        rest = [f"{'dotted' if inside else 'below'}: majority class of the test set {100 * majority:.1f} %"]
        majority = majority if inside else None
    return Panel(title, rest, lines, "step", ylabel, _dress_curve(lines, majority))


def _curve(row: Row, runs: list[dict[int, float]], scale: float) -> Line:
    """Over the steps that all runs reached; between its own logged steps a run is taken as straight."""
    first, last = max(min(run) for run in runs), min(max(run) for run in runs)
    steps = sorted({step for run in runs for step in run if first <= step <= last}) or [last]
    values = scale * np.stack([np.interp(steps, sorted(run), [run[s] for s in sorted(run)]) for run in runs])
    line = Line(row.mechanism, row.label, [float(s) for s in steps], values.mean(0).tolist())
    if len(runs) > 1:
        line.low, line.high = values.min(0).tolist(), values.max(0).tolist()
    if not row.ok:
        line.ended = line.note = row.state
    return line


def _number_variants(lines: list[Line]) -> None:
    seen: dict[str, int] = defaultdict(int)
    for line in lines:
        line.variant = seen[line.mechanism]
        seen[line.mechanism] += 1


def _dress_curve(lines: list[Line], majority: float | None) -> Callable[["Axes"], None]:
    def dress(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        last = max((line.x[-1] for line in lines), default=1)
        axes.set_xlim(0, last * 1.02)
        values = [y for line in lines for y in (line.y + line.low + line.high if line.lit else line.y)]
        if majority is not None:
            axes.axhline(100 * majority, color="#8A8A8A", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            values.append(100 * majority)
        _limits(axes, values)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))

    return dress


def _limits(axes: "Axes", values: list[float]) -> None:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)


def _best(group: Group) -> set[str]:
    """The best rows of a group, softmax, linear and the floors; rows stand best first."""
    ranked = [row for row in group.rows if row.mechanism not in FLOORS]
    usual = [row for row in group.rows if row.mechanism in ("softmax", "linear", *FLOORS)]
    return {row.label for row in ranked[:BEST] + usual}


def lengths(
    frame: "pd.DataFrame", looks: dict[str, Style], models: Sequence[str] | None = None
) -> list[NamedFigure]:
    """Test accuracy for each quarter of the test examples by real length, with its interval."""
    known(frame, models)
    panels = []
    for group in grouping.train_groups(frame, ties=False):
        panel = _length_panel(group)
        if panel is not None:
            light(panel.lines, lambda g=group: _best(g), models)
            lit = [line for line in panel.lines if line.lit]
            for place, line in enumerate(lit):  # side by side within half of their bucket
                line.x = [x + 0.5 * ((place + 0.5) / len(lit) - 0.5) for x in line.x]
            panels.append(panel)
    if not panels:
        raise NoMaterial(
            "no accuracy by length: no run here ended well on a task whose examples differ in length "
            "(ListOps, Text, Retrieval); make one: lra train task=listops model=linear"
        )
    figures = []
    for first in range(0, len(panels), PANELS):
        some = panels[first : first + PANELS]
        notes = [
            "Bars: 95 % interval over seeds and the test examples of the bucket (one seed: Wilson's, of the "
            "examples alone). Marks stand side by side only so that they can be told apart."
        ]
        if not all(line.lit for panel in some for line in panel.lines):
            notes.append(GREY_NOTE)
        figures.append(
            _named("lengths", "Accuracy by length of the test examples", figures, draw(some, looks, notes))
        )
    return figures


def _length_panel(group: Group) -> Panel | None:
    """A panel of the rows that agree on the buckets, which the test set decides; None without any."""
    tables = {}
    for row in group.rows:
        found = [run["accuracy_by_length"] for run in row.ok if isinstance(run["accuracy_by_length"], dict)]
        if found and all(list(table) == list(found[0]) for table in found):
            tables[row.label] = row, found
    if not tables:
        return None
    names = max((tuple(found[0]) for _, found in tables.values()), key=len)
    tables = {label: cell for label, cell in tables.items() if tuple(cell[1][0]) == names}
    lines = []
    for row, found in tables.values():
        summaries = [
            stats.summarise([table[name]["accuracy"] for table in found], found[0][name]["num"])
            for name in names
        ]
        line = Line(
            row.mechanism,
            row.label,
            [float(index) for index in range(len(names))],
            [100 * summary.mean for summary in summaries],
        )
        line.low = [100 * (s.mean if s.low is None else s.low) for s in summaries]
        line.high = [100 * (s.mean if s.high is None else s.high) for s in summaries]
        lines.append(line)
    _number_variants(lines)
    counts = [next(iter(tables.values()))[1][0][name]["num"] for name in names]
    title, *rest = group.title()

    def dress(axes: "Axes") -> None:
        axes.set_xlim(-0.4, len(names) - 0.6)
        texts = [f"{name.replace('-', '–')}\n{count:,}" for name, count in zip(names, counts, strict=True)]
        axes.set_xticks(range(len(names)), texts, fontsize=8)
        axes.grid(False, axis="x")
        _limits(axes, [y for line in lines for y in (line.y + line.low + line.high if line.lit else line.y)])

    xlabel = "real length in tokens, and number of test examples"
    return Panel(title, rest, lines, xlabel, "test accuracy, %", dress, bars=True)
