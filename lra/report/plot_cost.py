"""Time and memory against length, log-log, with the lengths from which a mechanism beats fused softmax."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lra.report import groups as grouping
from lra.report import measurements
from lra.report.figure import NamedFigure, NoMaterial, log_ticks, tick
from lra.report.groups import Group, Row
from lra.report.growth import ALWAYS, CROSSES, NEVER, WHATS, Crossover, crossovers
from lra.report.plot_lines import Line, Panel, draw, known, light
from lra.report.series import FACTS, Series, Setting, settings
from lra.report.style import FAMILIES, Style, family

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

AGAINST = "softmax"


def cost(
    frame: "pd.DataFrame", looks: dict[str, Style], models: Sequence[str] | None = None
) -> list[NamedFigure]:
    """One figure for each set of conditions, sizes and batch rule: time and memory, training, inference."""
    known(frame, models)
    found = {
        setting: members
        for setting, members in settings(frame).items()
        if any(sum(_value(one, n, "step_ms") is not None for n in one.cells) > 1 for one in members)
    }
    if not found:
        raise NoMaterial(
            "nothing to plot: no mechanism here was measured at two lengths or more; measure some: "
            "lra measure model=softmax,linear length=1024,4096 tokens=16384 mode=train,infer"
        )
    crossings = {(c.setting, c.mode, c.what, c.label): c for c in crossovers(frame, against=AGAINST)}
    figures = []
    for index, (setting, members) in enumerate(found.items(), start=1):
        own = {key[1:]: crossing for key, crossing in crossings.items() if key[0] == setting}
        panels = _panels(setting, members, own, models)
        name = "cost" if index == 1 else f"cost-{index}"
        title = f"Time and memory against length, {setting.batch_text}"
        figures.append(NamedFigure(name, title, draw(panels, looks, _notes(panels))))
    return figures


def _panels(
    setting: Setting, members: list[Series], crossings: dict, models: Sequence[str] | None
) -> list[Panel]:
    modes = sorted({one.mode for one in members}, key=lambda mode: (mode != "train", mode))
    variants: dict[str, list[str]] = defaultdict(list)
    for one in sorted(members, key=lambda one: (not _fused(one), len(one.own), one.label)):
        variants[one.mechanism] += [] if one.label in variants[one.mechanism] else [one.label]
    by_panel = {}
    for what in WHATS:
        for mode in modes:
            lines = [
                _line(one, setting, what, variants[one.mechanism].index(one.label), crossings)
                for one in members
                if one.mode == mode
            ]
            by_panel[what, mode] = [line for line in lines if line is not None]
    by_panel = {key: lines for key, lines in by_panel.items() if lines}
    light([line for lines in by_panel.values() for line in lines], lambda: _telling(by_panel), models)
    panels = []
    for (what, mode), lines in by_panel.items():
        _mark(lines)
        name = {"train": "training step", "infer": "inference"}.get(mode, mode)
        title = f"Time of {name}" if what == "step_ms" else f"Peak memory of {name}"
        unit = "MiB" if what != "step_ms" else "µs per token" if setting.rule[0] == "tokens" else "ms"
        rest = [setting.batch_text, *(_conditions(setting, members) if what == "step_ms" else [])]
        panels.append(Panel(title, rest, lines, "length, tokens", unit, _dress(lines)))
    return panels


def _fused(one: Series) -> bool:
    """Whether a series is the one that others are compared with, or of another mechanism."""
    return one.mechanism != AGAINST or one.own.get("kernel", "fused") == "fused"


def _conditions(setting: Setting, members: list[Series]) -> list[str]:
    """Recipe, sizes, device and how the steps were run, as the tables say them."""
    runs = [run for one in members for cell in one.cells.values() for run in cell]
    facts = dict(zip(FACTS, setting.facts, strict=True)) | {"length": None, "layout": None}
    layouts = grouping.distinct(run["layout"] for run in runs)
    facts["layout"] = layouts[0] if len(layouts) == 1 else None
    return list(measurements.measure_title(Group(facts, [Row("", "", runs)]), "")[1:])


def _value(one: Series, length: int, what: str) -> float | None:
    """Cost at a length; None where it was not measured or memory ran out."""
    value = one.value(length, what)[0]
    return value if math.isfinite(value) else None


def _line(one: Series, setting: Setting, what: str, variant: int, crossings: dict) -> Line | None:
    """A series as a line with what its crossover says; None if it has no value."""
    values = {length: _value(one, length, what) for length in one.lengths()}
    x = [length for length, value in values.items() if value is not None]
    if not x:
        return None
    scale = {n: 1.0 for n in x}
    if what == "step_ms" and setting.rule[0] == "tokens":
        scale = {n: 1e3 / (n * one.cells[n][0]["batch_size"]) for n in x}
    line = Line(one.mechanism, one.label, x, [values[n] * scale[n] for n in x], variant=variant)
    line.strong = one.mechanism == AGAINST and _fused(one)
    statuses = [run["status"] for n in one.lengths() if n > x[-1] for run in one.cells[n]]
    line.ended = next((status for status in statuses if status != "ok"), None)
    crossing = crossings.get((one.mode, what, one.label))
    notes = [_said(crossing)] if crossing is not None else []
    if crossing is not None and crossing.length is not None:
        line.marks.append((crossing.length, math.nan, crossing.low, crossing.high))
    notes += [{"oom": "out of memory"}.get(line.ended, line.ended)] if line.ended else []
    line.note = ", ".join(note for note in notes if note)
    return line


def _said(crossing: Crossover) -> str:
    """`from 2,800`, `from 16,384 to 65,536` where only bounds are known, `always`, `until 900`, `never`."""
    if crossing.state == CROSSES:
        if crossing.length is None:
            return f"from {crossing.low:,.0f} to {crossing.high:,.0f}"
        return f"from {_about(crossing.length, crossing)}"
    if crossing.state == NEVER:
        return f"until {_about(crossing.until, crossing)}" if crossing.until else "never"
    return "always" if crossing.state == ALWAYS else ""


def _about(length: float, crossing: Crossover) -> str:
    """A measured length in full, one between them to two digits."""
    measured = min(crossing.compared, key=lambda n: abs(n - length))
    exact = math.isclose(measured, length, rel_tol=1e-6)
    return f"{measured:,}" if exact else f"{float(f'{length:.2g}'):,.0f}"


def _mark(lines: list[Line]) -> None:
    """Puts the crossovers on the line of fused softmax; without that line there is nothing to mark."""
    base = next((line for line in lines if line.mechanism == AGAINST and line.variant == 0), None)
    for line in lines:
        line.marks = [
            (x, _at(base, x), low, high)
            for x, _, low, high in line.marks
            if base and base.x[0] <= x <= base.x[-1]
        ]


def _at(line: Line, x: float) -> float:
    """The height of a line between its points, straight on log-log axes."""
    import numpy as np

    return float(np.exp(np.interp(math.log(x), np.log(line.x), np.log(line.y))))


def _telling(by_panel: dict[tuple[str, str], list[Line]]) -> set[str]:
    """Softmax, linear, and the fastest and slowest of each family at the first panel's greatest length."""
    lines = next(lines for lines in by_panel.values() if lines)
    labels = {line.label for line in lines if line.mechanism in (AGAINST, "linear")}
    for name in FAMILIES:
        members = [line for line in lines if family(line.mechanism) == name and line.label not in labels]
        members.sort(key=lambda line: (-line.x[-1], line.y[-1], line.label))
        labels |= {line.label for line in members[:1] + members[-1:]}
    return labels


def _dress(lines: list[Line]) -> Callable[["Axes"], None]:
    lengths = sorted({x for line in lines for x in line.x})

    def dress(axes: "Axes") -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

        axes.set(xscale="log", yscale="log")
        axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
        low, high = (pick(y for line in lines for y in line.y) for pick in (min, max))
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.xaxis.set_major_locator(FixedLocator(_apart(lengths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _length(value)))
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low / 1.3, high * 1.3)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())

    return dress


def _apart(lengths: list[int]) -> list[int]:
    """The lengths that can be written side by side on a log axis, the longest among them."""
    room = math.log(lengths[-1] / lengths[0]) / 9 if len(lengths) > 1 else 0
    kept = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log(kept[-1] / length) >= room:
            kept.append(length)
    return kept


def _length(value: float) -> str:
    """Powers of two as they are spoken of: `512`, `4K`, `64K`; others in full."""
    return f"{value / 1024:g}K" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _notes(panels: list[Panel]) -> list[str]:
    lines = [line for panel in panels for line in panel.lines]
    notes = []
    if any(line.marks or line.note for line in lines):
        notes.append(
            "Rings: from that length on the mechanism is cheaper than fused softmax; the bar is that "
            "length's 95 % interval. Behind a name: the same length, or whether it is cheaper always, never, "
            "or only until some length, among the lengths measured."
        )
    if any(line.ended for line in lines):
        notes.append("Crosses: it could not be measured at the next length, for the reason behind its name.")
    if any(not line.lit for line in lines):
        notes.append("Grey: the other mechanisms measured; --models a,b,c chooses which are in colour.")
    return notes
