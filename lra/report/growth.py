"""How cost grows with length, and from which length on one mechanism is cheaper than another.

All costs are those of one sequence: the cost of a batch over its rows. With constant tokens a batch that is
the cost of a token times the length, so that an exponent of 1 means linear and 2 quadratic under either rule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lra.report.series import Series, Setting, settings

if TYPE_CHECKING:
    import pandas as pd

WHATS = ("step_ms", "peak_mem_mib")
GROWING = ("step_ms", "activations_mib")
UPPER = 3  # lengths, the longest ones, from which growth is read
DRAWS = 2000
LEVEL = 0.95
EDGE = 0.03  # share of draws at either bound of the interpolation: more than the tail that an interval drops
CROSSES, ALWAYS, NEVER, UNKNOWN = "crosses", "always cheaper", "never cheaper", "unknown"


@dataclass(frozen=True)
class Growth:
    """The exponent p of cost ~ length^p between two lengths, and its standard error (None: not known).

    what: `step_ms` or `activations_mib`: of peak memory the part of weights and optimizer state does not grow
    with the rows of a batch, so that nothing is told where records have no parts.
    """

    setting: Setting
    mechanism: str
    label: str
    mode: str
    what: str
    exponent: float
    error: float | None
    first: int
    last: int


@dataclass(frozen=True)
class Crossover:
    """From which length on a mechanism is cheaper than another in `what` and `mode`, and stays so.

    state: `crosses` at `length`, with a 95 % interval cut off at the lengths compared; None for the length
    where memory of the other ran out in between, so that only `low` and `high` are known. `always cheaper`
    and `never cheaper` are said of the lengths compared; there `high` or `low` is where the timing spread
    would have it cross instead, else None. `unknown`: fewer than two lengths, or a spread from always to
    never. `crossings` counts changes of order; `until` is the length up to which a mechanism was cheaper
    that is so no longer at the end. `ended`: why nothing was compared at the lengths beyond, as
    `softmax: oom`.
    """

    mechanism: str
    label: str
    mode: str
    what: str
    against: str
    state: str
    length: float | None = None
    low: float | None = None
    high: float | None = None
    crossings: int = 0
    until: float | None = None
    compared: tuple[int, ...] = ()
    ended: str = ""
    setting: Setting | None = None


def growth(frame: "pd.DataFrame") -> list[Growth]:
    """The exponents of every mechanism and mode that was measured at two lengths or more."""
    found = []
    for setting, members in settings(frame).items():
        for series in members:
            for what in GROWING:
                found += _growth(setting, series, what)
    return found


def _growth(setting: Setting, series: Series, what: str) -> list[Growth]:
    points = [(n, *series.value(n, what)) for n in series.lengths()]
    points = [point for point in points if math.isfinite(point[1])][-UPPER:]
    if len(points) < 2:
        return []
    lengths, values, spreads = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    rows = np.array([_rows(series, n) for n in lengths])
    exponent, error = slope(np.log(lengths), np.log(values / rows), spreads)
    names = (series.mechanism, series.label, series.mode, what)
    return [Growth(setting, *names, exponent, error, int(lengths[0]), int(lengths[-1]))]


def _rows(series: Series, length: float) -> float:
    return float(series.cells[int(length)][0]["batch_size"])


def slope(x: np.ndarray, y: np.ndarray, spreads: np.ndarray) -> tuple[float, float | None]:
    """Least-squares slope of y over x [n] and its standard error, n >= 2.

    The error is the larger of what the spread of each y makes of it and, from three points on, of what the
    distances to the line make of it; None where neither says anything.
    """
    centred = x - x.mean()
    weights = centred / (centred**2).sum()
    found = float(weights @ y)
    of_spread = float((weights**2 * spreads**2).sum())
    of_fit = 0.0
    if len(x) > 2:
        rest = y - y.mean() - found * centred
        of_fit = float(rest @ rest) / (len(x) - 2) / float((centred**2).sum())
    known = len(x) > 2 or spreads.any()
    return found, math.sqrt(max(of_spread, of_fit)) if known else None


def crossovers(frame: "pd.DataFrame", against: str = "softmax", *, kernel: str = "fused") -> list[Crossover]:
    """Every mechanism against one, in each setting, mode and cost; `kernel` picks which softmax.

    Costs are compared at the same length and batch size, and interpolated between lengths on log-log axes.
    The interval joins the spread of both timings with what the interpolation leaves open: of a curve that
    bends one way, the part between two lengths lies between their chord and the neighbouring chords
    continued; without such neighbours it may lie anywhere between the two. Out of memory is dearer than
    anything; where both ran out, and in time where the other one did, nothing is compared, and the range
    ends.
    """
    found = []
    for setting, members in settings(frame).items():
        for base in members:
            if base.mechanism != against or base.own.get("kernel", "fused") != kernel:
                continue
            name = against if kernel == "fused" else f"{against} (kernel={kernel})"
            for series in members:
                if series.mode == base.mode and series is not base:
                    found += [_crossover(setting, series, base, name, what) for what in WHATS]
    return found


def _crossover(setting: Setting, series: Series, base: Series, against: str, what: str) -> Crossover:
    points, ended = [], ""
    for length in sorted(set(series.cells) & set(base.cells)):
        (ours, our_spread), (theirs, their_spread) = series.value(length, what), base.value(length, what)
        known = not (math.isnan(ours) or math.isnan(theirs)) and _rows(series, length) == _rows(base, length)
        if not known or (math.isinf(theirs) and (math.isinf(ours) or what == "step_ms")):
            ended = f"{base.mechanism}: oom" if math.isinf(theirs) else ended
            continue
        ratio = math.inf if math.isinf(ours) else -math.inf if math.isinf(theirs) else math.log(ours / theirs)
        points.append((length, ratio, math.hypot(our_spread, their_spread)))
    names = (series.mechanism, series.label, series.mode, what, against)
    rest = {"compared": tuple(length for length, *_ in points), "ended": ended, "setting": setting}
    if len(points) < 2:
        return Crossover(*names, UNKNOWN, **rest)
    lengths, ratios, spreads = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    return Crossover(*names, **where(lengths, ratios, spreads), **rest)


def where(lengths: np.ndarray, ratios: np.ndarray, spreads: np.ndarray, *, seed: int = 0) -> dict:
    """`state`, `length`, `low`, `high`, `crossings` and `until` of log cost ratios at lengths, all [n].

    Below 0 is cheaper. Seeded draws of the ratios give the interval.
    """
    x = np.log(lengths)
    cheaper = ratios < 0
    point = float(_roots(x, ratios[None], np.array([0.5]), chord=True)[0])
    generator = np.random.default_rng(seed)
    drawn = ratios + spreads * generator.standard_normal((DRAWS, len(x)))
    shares = np.clip(generator.uniform(-EDGE, 1 + EDGE, DRAWS), 0, 1)
    roots = np.sort(_roots(x, drawn, shares))
    tail = int((1 - LEVEL) / 2 * DRAWS)
    # Where the whole gap is open, the point is the chord's and may lie in the tail of the draws.
    low, high = min(float(roots[tail]), point), max(float(roots[-1 - tail]), point)
    found = {"crossings": int((cheaper[1:] != cheaper[:-1]).sum()), "until": _until(x, ratios)}
    if low == -math.inf and high == math.inf:
        return found | {"state": UNKNOWN}
    if point == -math.inf:
        return found | {"state": ALWAYS, "high": None if high == -math.inf else _clipped(high, lengths)}
    if point == math.inf:
        return found | {"state": NEVER, "low": None if low == math.inf else _clipped(low, lengths)}
    last = int(np.flatnonzero(~cheaper)[-1])
    exact = np.isfinite(ratios[last : last + 2]).all()
    found |= {"low": _clipped(low, lengths), "high": _clipped(high, lengths), "state": CROSSES}
    if exact:
        return found | {"length": math.exp(point)}
    return found | {
        "low": min(found["low"], float(lengths[last])),
        "high": max(found["high"], float(lengths[last + 1])),
    }


def _clipped(root: float, lengths: np.ndarray) -> float:
    """exp(root), cut off at the lengths compared; one of these where it is as good as that."""
    length = min(max(math.exp(root), float(lengths[0])), float(lengths[-1]))
    near = float(min(lengths, key=lambda n: abs(n - length)))
    return near if math.isclose(near, length, rel_tol=1e-9) else length


def _until(x: np.ndarray, ratios: np.ndarray) -> float | None:
    """Up to which length the cost was lower, if it is not so at the end."""
    if ratios[-1] < 0 or not (ratios < 0).any():
        return None
    i = int(np.flatnonzero(ratios < 0)[-1])
    if not np.isfinite(ratios[i : i + 2]).all():
        return math.exp(float(x[i]))
    return math.exp(float(x[i] + (x[i + 1] - x[i]) * ratios[i] / (ratios[i] - ratios[i + 1])))


def _roots(x: np.ndarray, ratios: np.ndarray, shares: np.ndarray, *, chord: bool = False) -> np.ndarray:
    """The last change from dearer to cheaper in each row of `ratios` [draws n], as log length [draws].

    -inf: cheaper throughout; inf: not cheaper at the end. `shares` [draws] in [0, 1] say where between the
    bounds of the interpolation the change is. The bounds are the whole gap where one of its ends is infinite,
    or no neighbouring chord falls; there `chord` takes the straight line instead, if both ends are finite.
    """
    draws, n = ratios.shape
    dearer = ratios >= 0
    last = np.where(dearer.any(axis=1), n - 1 - np.argmax(dearer[:, ::-1], axis=1), -1)
    roots = np.where(last < 0, -math.inf, math.inf)
    inside = np.flatnonzero((last >= 0) & (last < n - 1))
    rows, i = ratios[inside], last[inside]
    picked = np.arange(len(inside))
    left, right = x[i], x[i + 1]
    before, after = rows[picked, i], rows[picked, i + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        straight = left + (right - left) * before / (before - after)
        bounds, bounded = [straight], np.zeros(len(inside), dtype=bool)
        for first, allowed in ((i - 1, i >= 1), (i + 1, i + 2 < n)):
            a, b = np.clip(first, 0, n - 2), np.clip(first + 1, 1, n - 1)
            rise = (rows[picked, b] - rows[picked, a]) / (x[b] - x[a])
            line = x[a] - rows[picked, a] / rise  # where the neighbouring chord, continued, is zero
            usable = allowed & np.isfinite(line) & (rise < 0)
            bounds.append(np.where(usable, np.clip(line, left, right), straight))
            bounded |= usable
        low, high = np.min(bounds, axis=0), np.max(bounds, axis=0)
    open_gap = ~(np.isfinite(before) & np.isfinite(after))
    free = open_gap if chord else open_gap | ~bounded  # without neighbours both bounds are the chord
    low, high = np.where(free, left, low), np.where(free, right, high)
    roots[inside] = low + shares[inside] * (high - low)
    return roots


def modes_of(found: Sequence[Growth | Crossover]) -> list[str]:
    """The modes in print order."""
    seen = {one.mode for one in found}
    return [mode for mode in ("train", "infer") if mode in seen] + sorted(seen - {"train", "infer"})
