"""What measurements say beyond single cells: growth, crossovers, parts of memory, the LRA paper's ratios."""

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from lra.measuring_largest import next_length
from lra.report import efficiency
from lra.report.cells import Column, Table, number
from lra.report.groups import FLOORS, Group, Row, extra_of
from lra.report.growth import (
    ALWAYS,
    CROSSES,
    NEVER,
    UPPER,
    WHATS,
    Crossover,
    Growth,
    crossovers,
    growth,
    modes_of,
)
from lra.report.measurements import measure_title, setting_marks, setting_notes
from lra.report.series import FACTS, Series, Setting, settings

if TYPE_CHECKING:
    import pandas as pd

MEMORY = ("peak_mem_mib", "activations_mib")
PARTS = ("weights", "optimizer", "activations", "data")


def cost_tables(frame: "pd.DataFrame") -> list[Table]:
    """Every such table of a frame of records, in print order."""
    tables: list[Table] = []
    found, grown = settings(frame), growth(frame)
    runs = {setting: [run for one in members for run in runs_in(one)] for setting, members in found.items()}
    marks = _marks(runs)
    silent = {
        id(run) for some in runs.values() for run in some if run["status"] == "ok" and not _has_parts(run)
    }
    references = [crossovers(frame), crossovers(frame, kernel="math")]
    for setting, members in found.items():
        own = _parts_table(setting, members, len(silent))
        own += _growth_table(setting, [one for one in grown if one.setting == setting])
        for compared in references:
            own += _crossover_table(setting, [one for one in compared if one.setting == setting])
        beside = efficiency.tables(_facts(setting), members)
        own += beside
        if own and not beside:
            own[-1].footnotes += efficiency.why_not(runs[setting])
        rows = [Row(one.mechanism, one.label, one.cells[n]) for one in members for n in one.lengths()]
        for table in own:
            table.footnotes += setting_notes(rows)
            (what,) = table.title
            table.title = _title(setting, what, runs[setting], marks[setting])
        tables += own
    return tables


def runs_in(series: Series) -> list[dict]:
    """All runs of a series, the shortest length first."""
    return [run for length in series.lengths() for run in series.cells[length]]


def plain(run: dict) -> dict[str, float | None]:
    """The numbers of a measurement that only its `extra` has, for programs."""
    parts = extra_of(run, "memory_mib") or {}
    keys = ("matrix_share", "copy_share_at_least", "largest_length")
    return {f"{part}_mib": parts.get(part) for part in PARTS} | {key: extra_of(run, key) for key in keys}


def _title(setting: Setting, what: str, runs: list[dict], marks: list[str]) -> tuple[str, ...]:
    facts = dict(zip(FACTS, setting.facts, strict=True)) | {"layout": None}
    *parts, conditions = measure_title(Group(facts, [Row("", "", runs)]), what)
    return (*parts, f"{conditions}, {setting.batch_text}", *marks)


def _marks(runs: dict[Setting, list[dict]]) -> dict[Setting, list[str]]:
    """What tells settings apart whose titles would read the same."""
    alike: dict[tuple, list[Setting]] = defaultdict(list)
    for setting, some in runs.items():
        alike[_title(setting, "", some, [])].append(setting)
    found = {setting: [] for setting in runs}
    for several in (members for members in alike.values() if len(members) > 1):
        facts = [(dict(zip(FACTS, setting.facts, strict=True)), runs[setting]) for setting in several]
        found |= zip(several, setting_marks(facts), strict=True)
    return found


def _facts(setting: Setting) -> dict:
    """What the lines of a table have in common, for programs."""
    kind, size = setting.rule
    facts = dict(zip(FACTS, setting.facts, strict=True))
    return facts | {
        "tokens": size if kind == "tokens" else None,
        "batch_size": size if kind == "batch" else None,
    }


def _in_order(labels: dict[str, str]) -> list[str]:
    """Labels (with their mechanisms) by name, the floors last."""
    return sorted(labels, key=lambda label: (labels[label] in FLOORS, label))


# Growth.


def _growth_table(setting: Setting, found: list[Growth]) -> list[Table]:
    if not found:
        return []
    cells = {(one.label, one.mode, one.what in MEMORY): one for one in found}
    heads = [(mode, memory) for mode in modes_of(found) for memory in (False, True)]
    heads = [head for head in heads if any((one.mode, one.what in MEMORY) == head for one in found)]
    columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
    columns += [Column(f"{mode} {m}", f"{mode} {'memory' if m else 'time'}", left=True) for mode, m in heads]
    rows = []
    for label in _in_order({one.label: one.mechanism for one in found}):
        texts = {f"{mode} {m}": _exponent(cells.get((label, mode, m))) for mode, m in heads}
        rows.append({"mechanism": label} | texts)
    spans = sorted({(one.first, one.last) for one in found})
    span = ", ".join(f"{first:,} to {last:,}" for first, last in spans[:3])
    notes = [
        f"exponent p of cost ~ length^p for one sequence, ± its standard error: 1 is linear, 2 quadratic; "
        f"from the longest {UPPER} lengths ({span}{', ...' if len(spans) > 3 else ''})",
        "memory: peak of activations and workspaces",
    ]
    data = [
        {
            "kind": "growth",
            **_facts(setting),
            "mode": one.mode,
            "mechanism": one.mechanism,
            "label": one.label,
        }
        | {"what": one.what, "exponent": one.exponent, "standard_error": one.error}
        | {"first_length": one.first, "last_length": one.last}
        for one in found
    ]
    return [Table(("Growth with length",), columns, rows, notes, data, matrix=True)]


def _exponent(found: Growth | None) -> str:
    if found is None:
        return "-"
    return f"{found.exponent:.2f}" + (f" ± {found.error:.2f}" if found.error is not None else "")


# Crossovers.


def _crossover_table(setting: Setting, found: list[Crossover]) -> list[Table]:
    if not any(len(one.compared) > 1 for one in found):
        return []
    cells = {(one.label, one.mode, one.what): one for one in found}
    heads = [(mode, what) for mode in modes_of(found) for what in WHATS]
    columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
    for mode, what in heads:
        columns.append(Column(f"{mode} {what}", f"{mode} {_cost(what)}", left=True))
    rows = []
    usual = {head: _usual([one for one in found if (one.mode, one.what) == head]) for head in heads}
    for label in _in_order({one.label: one.mechanism for one in found}):
        texts = {
            f"{mode} {what}": crossover_text(cells.get((label, mode, what)), usual[mode, what])
            for mode, what in heads
        }
        rows.append({"mechanism": label} | texts)
    ranges = [f"{mode} {_cost(what)} {_range_text(usual[mode, what])}" for mode, what in heads]
    fused = found[0].against == "softmax"
    base = "fused softmax" if fused else "explicit softmax"
    notes = [
        f"from which length on a mechanism costs less than {base} and stays so, interpolated on log-log "
        "axes, with a 95 % interval from the spread of both timings and the interpolation; lengths compared: "
        f"{', '.join(ranges)}, unless the cell says otherwise"
    ]
    if any(one.crossings > 1 for one in found):
        notes.append("*: the order changes more than once; the last change is told")
    if any(one.state == CROSSES and one.length is None for one in found):
        notes.append("between: softmax ran out of memory at the second length")
    keys = ("mode", "mechanism", "label", "what", "against", "state")
    numbers = ("length", "low", "high", "until", "crossings")
    data = [
        {"kind": "crossover", **_facts(setting)}
        | {key: getattr(one, key) for key in keys}
        | {f"crossover_{key}": getattr(one, key) for key in numbers}
        | {"first_length": min(one.compared, default=None), "last_length": max(one.compared, default=None)}
        | {"range_ended": one.ended or None}
        for one in found
    ]
    return [Table((f"Cheaper than {base} from",), columns, rows, notes, data, matrix=True)]


def crossover_text(found: Crossover | None, usual: tuple[str, str] | None = None) -> str:
    """`2,300 (1,900 - 2,700)`, `always`, `never`, `only up to 3,100`, or `-` where nothing was compared; with
    the range where it is not that of most cells of the column.
    """
    if found is None or len(found.compared) < 2:
        return "-"
    told = usual is None or _range(found)[0] == usual[0] or (found.state == NEVER and found.ended)
    apart = "" if told else f"; of {_range(found)[0]}"
    return _answer(found) + (" *" if found.crossings > 1 else "") + apart


def _answer(found: Crossover) -> str:
    until, high, low, length = (_length(x, found) for x in (found.until, found.high, found.low, found.length))
    if found.state == ALWAYS:
        return "always" + (f" (or from {high})" if found.high else "")
    if found.state == NEVER:
        ended = f"not up to {found.compared[-1]:,}; {found.ended} beyond" if found.ended else "never"
        return (f"only up to {until}" if found.until else ended) + (f" (or from {low})" if found.low else "")
    if found.state != CROSSES or found.low is None or found.high is None:
        return "unknown"
    return f"between {low} and {high}" if found.length is None else f"{length} ({low} - {high})"


def _cost(what: str) -> str:
    return "time" if what == WHATS[0] else "memory"


def _usual(found: list[Crossover]) -> tuple[str, str]:
    """The range of most cells of a column."""
    known = Counter(_range(one) for one in found if one.compared)
    return known.most_common(1)[0][0] if known else ("none", "")


def _range_text(found: tuple[str, str]) -> str:
    return found[0] + (f" ({found[1]} beyond)" if found[1] else "")


def _range(found: Crossover) -> tuple[str, str]:
    """The lengths compared, and why no longer ones."""
    first, last = found.compared[0], found.compared[-1]
    return f"{first:,} to {last:,}" if first < last else f"{first:,}", found.ended


def _length(value: float | None, found: Crossover) -> str:
    """A measured length in full, one between them to three digits: `4,096`, `2,350`."""
    if value is None:
        return "-"
    near = min(found.compared, key=lambda n: abs(n - value))
    return f"{near if math.isclose(near, value, rel_tol=1e-6) else float(f'{value:.3g}'):,.0f}"


# Parts of memory, and shares of what the device can do.

SHARES = [
    Column("mechanism", "mechanism", left=True, wrap=True),
    Column("mode", "mode", left=True),
    Column("length", "length"),
    *[Column(part, part, drop=place) for part, place in zip(PARTS, (2, 3, 4, 1), strict=True)],
    Column("matrix_share", "matrix %", drop=6),
    Column("copy_share_at_least", "copy % >=", drop=5),
    Column("largest_length", "longest that fits"),
]
SPARSE = ("matrix_share", "copy_share_at_least", "largest_length")  # left out where no row has them


def _parts_table(setting: Setting, members: list[Series], silent: int) -> list[Table]:
    rows, rates = [], []
    for series in sorted(members, key=lambda s: (s.mode != "train", s.mechanism in FLOORS, s.label)):
        for length in series.lengths():
            run = series.cells[length][-1]
            numbers = plain(run)
            if all(value is None for value in numbers.values()):
                continue
            rates.append((extra_of(run, "copy_bytes_per_s"), extra_of(run, "matrix_flops_per_s")))
            rows.append(
                {"mechanism": series.label, "mode": series.mode, "length": f"{length:,}"}
                | {part: _mib(numbers[f"{part}_mib"]) for part in PARTS}
                | {key: _percent(numbers[key]) for key in ("matrix_share", "copy_share_at_least")}
                | {"largest_length": _largest(run)}
            )
    if not rows:
        return []
    told = [c for c in SHARES if c.key not in SPARSE or any(row[c.key] not in ("", "-") for row in rows)]
    notes = _notes(rates)
    if any(row["largest_length"].startswith(">=") for row in rows):
        notes.append(">=: no longer length was tried in the time for it, or the device is a CPU")
    if silent:
        notes.append(f"not told here: {silent} measurements whose records have no parts of memory")
    return [Table(("Peak memory in parts (MiB), shares of the device",), told, rows, notes)]


def _has_parts(run: dict) -> bool:
    return isinstance(extra_of(run, "memory_mib"), dict)


def _notes(rates: list[tuple]) -> list[str]:
    notes = ["peak = weights + optimizer (gradients, moments) + activations (with workspaces), without data"]
    known = [(copy, matrix) for copy, matrix in rates if copy and matrix]
    if known:
        copies, products = zip(*known, strict=True)
        notes.append(
            f"matrix: share of {_span(products, 1e12)} TFLOP/s, a large product in the run's precision; "
            f"copy: of {_span(copies, 1e9)} GB/s, a large copy, read and written; measured in these runs"
        )
        notes.append(
            "copy is a lower bound, from the bytes that must move: weights, gradients and moments in the "
            "update, and what is live at the peak, written and read; no counter tells the true traffic"
        )
    return notes


def _span(values: tuple[float, ...], unit: float) -> str:
    low, high = (number(pick(values) / unit) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _mib(value: float | None) -> str:
    return "0" if value == 0 else number(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _largest(run: dict) -> str:
    if run["status"] != "oom":
        return ""
    largest, shortest = extra_of(run, "largest_length"), extra_of(run, "shortest_oom_length")
    if largest is None:
        return "-"
    ended_early = shortest is not None and shortest > next_length(largest)
    return ">= " * ended_early + f"{largest:,}"
