"""What measurements say beyond single cells: growth, crossovers, parts of memory, the LRA paper's ratios."""

from typing import TYPE_CHECKING

from lra.report import efficiency
from lra.report.cells import Column, Table, number
from lra.report.groups import FLOORS, data_title, device_title, extra_of, recipe_title
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
from lra.report.series import FACTS, Series, Setting, measured, settings

if TYPE_CHECKING:
    import pandas as pd

MEMORY = ("peak_mem_mib", "activations_mib")
PARTS = ("weights", "optimizer", "activations", "data")


def cost_tables(frame: "pd.DataFrame") -> list[Table]:
    """Every such table of a frame of records, in print order."""
    tables: list[Table] = []
    found, grown = settings(frame), growth(frame)
    references = [crossovers(frame), crossovers(frame, kernel="math")]
    for setting, members in found.items():
        tables += _parts_table(setting, members)
        tables += _growth_table(setting, [one for one in grown if one.setting == setting])
        for compared in references:
            tables += _crossover_table(setting, [one for one in compared if one.setting == setting])
        tables += _efficiency_table(setting, members)
    return tables


def plain(run: dict) -> dict[str, float | None]:
    """The numbers of a measurement that only its `extra` has, for programs."""
    parts = extra_of(run, "memory_mib") or {}
    keys = ("matrix_share", "copy_share_at_least", "largest_length")
    return {f"{part}_mib": parts.get(part) for part in PARTS} | {key: extra_of(run, key) for key in keys}


def _title(setting: Setting, what: str) -> tuple[str, ...]:
    facts = dict(zip(FACTS, setting.facts, strict=False))
    size = [f"d_model {facts['d_model']}"] if facts["d_model"] else []
    size += [f"{facts['num_layers']} layers"] if facts["num_layers"] else []
    conditions = [device_title(facts), facts["precision"], setting.batch_text]
    title = (what, data_title(facts | {"data_variant": None}), recipe_title(facts), ", ".join(size))
    return tuple(part for part in (*title, ", ".join(str(c) for c in conditions if c)) if part)


def _facts(setting: Setting) -> dict:
    """What the lines of a table have in common, for programs."""
    kind, size = setting.rule
    facts = dict(zip(FACTS, setting.facts, strict=False))
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
    whole = " of activations and workspaces" if any(one.what == MEMORY[1] for one in found) else ""
    notes = [
        f"exponent p of cost ~ length^p for one sequence, ± its standard error: 1 is linear, 2 quadratic; "
        f"from the longest {UPPER} lengths ({span}{', ...' if len(spans) > 3 else ''})",
        f"memory: peak{whole}",
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
    return [Table(_title(setting, "Growth with length"), columns, rows, notes, data, matrix=True)]


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
        columns.append(
            Column(f"{mode} {what}", f"{mode} {'time' if what == WHATS[0] else 'memory'}", left=True)
        )
    rows = []
    for label in _in_order({one.label: one.mechanism for one in found}):
        texts = {f"{mode} {what}": crossover_text(cells.get((label, mode, what))) for mode, what in heads}
        rows.append({"mechanism": label} | texts)
    lengths = sorted({length for one in found for length in one.compared})
    span = f"{lengths[0]:,} to {lengths[-1]:,}"
    fused = found[0].against == "softmax"
    base = "fused softmax" if fused else "explicit softmax"
    notes = [
        f"from which length on a mechanism costs less than {base} and stays so, interpolated on log-log "
        "axes, with a 95 % interval from the spread of both timings and the interpolation; lengths compared: "
        + span
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
        for one in found
    ]
    return [Table(_title(setting, f"Cheaper than {base} from"), columns, rows, notes, data, matrix=True)]


def crossover_text(found: Crossover | None) -> str:
    """`2,300 (1,900 - 2,700)`, `always`, `never`, `only up to 3,100`, or `-` where nothing was compared."""
    if found is None:
        return "-"
    mark = " *" if found.crossings > 1 else ""
    if found.state == ALWAYS:
        return "always" + (f" (or from {_length(found.high)})" if found.high else "")
    if found.state == NEVER:
        text = f"only up to {_length(found.until)}" if found.until else "never"
        return text + (f" (or from {_length(found.low)})" if found.low else "") + mark
    if found.state != CROSSES or found.low is None or found.high is None:
        return "unknown"
    if found.length is None:
        return f"between {_length(found.low)} and {_length(found.high)}{mark}"
    return f"{_length(found.length)} ({_length(found.low)} - {_length(found.high)}){mark}"


def _length(value: float | None) -> str:
    """Two digits and a bit: `180`, `2,350`."""
    return "-" if value is None else f"{float(f'{value:.3g}'):,.0f}"


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


def _parts_table(setting: Setting, members: list[Series]) -> list[Table]:
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
    title = _title(setting, "Peak memory in parts (MiB), shares of the device")
    return [Table(title, told, rows, _notes(rates))]


def _notes(rates: list[tuple]) -> list[str]:
    notes = ["peak = weights + optimizer (gradients, moments) + activations (with workspaces), without data"]
    known = [(copy, matrix) for copy, matrix in rates if copy and matrix]
    if known:
        copies, products = zip(*known, strict=True)
        notes.append(
            f"matrix: share of {_range(products, 1e12)} TFLOP/s, a large product in the run's precision; "
            f"copy: of {_range(copies, 1e9)} GB/s, a large copy, read and written; measured in these runs"
        )
        notes.append(
            "copy is a lower bound, from the bytes that must move: weights, gradients and moments in the "
            "update, and what is live at the peak, written and read; no counter tells the true traffic"
        )
    return notes


def _range(values: tuple[float, ...], unit: float) -> str:
    low, high = (number(pick(values) / unit) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _mib(value: float | None) -> str:
    return "0" if value == 0 else number(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _largest(run: dict) -> str:
    if run["status"] != "oom":
        return ""
    largest = extra_of(run, "largest_length")
    return "-" if largest is None else f"{largest:,}"


# The LRA paper's efficiency table.


def _efficiency_table(setting: Setting, members: list[Series]) -> list[Table]:
    if _facts(setting)["task"] != efficiency.TASK or setting.rule != ("batch", efficiency.BATCH):
        return []
    train = [s for s in members if s.mode == "train" and set(efficiency.LENGTHS) & set(s.cells)]
    base = next((s for s in train if s.mechanism == efficiency.BASE and s.own.get("kernel") == "math"), None)
    if base is None:
        return []
    lengths = [n for n in efficiency.LENGTHS if n in base.cells]
    columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
    for name in ("speed", "memory"):
        columns += [Column(f"{name} {n}", f"{name} {n // 1000}K", left=True) for n in lengths]
    rows, data = [], []
    for series in sorted(train, key=lambda s: (s is not base, s.mechanism in FLOORS, s.label)):
        row = {"mechanism": series.label}
        for length in lengths:
            fused = series.mechanism == efficiency.BASE and series is not base  # the paper has none
            paper = efficiency.Printed(None, None) if fused else efficiency.printed(series.mechanism, length)
            ours = {
                "speed": _ratio(base, series, length, "step_ms"),
                "memory": _ratio(series, base, length, "peak_mem_mib"),
            }
            for name, own in ours.items():
                text = own if isinstance(own, str) else number(own)
                row[f"{name} {length}"] = f"{text} / {number(getattr(paper, name))}"
            data.append(
                {"kind": "efficiency", **_facts(setting), "mode": "train", "mechanism": series.mechanism}
                | {"label": series.label, "length": length}
                | {f"{k}_over_explicit": v if not isinstance(v, str) else None for k, v in ours.items()}
                | {"published_speed": paper.speed, "published_memory": paper.memory}
            )
        rows.append(row)
    notes = [
        "ours / the paper's, both over explicit softmax at the same length; speed: training steps a second, "
        "more is better; memory: peak, less is better",
        "the paper: arXiv 2011.04006, Table 2, memory of one of 16 TPU v3 chips that share the batch, in "
        "JAX: ratios of another machine and another code, not numbers to reproduce",
    ]
    title = _title(setting, "Efficiency beside the LRA paper")
    return [Table(title, columns, rows, notes, data, matrix=True)]


def _ratio(above: Series, below: Series, length: int, what: str) -> float | str:
    """One cost over another; how a cell ended where there is no number."""
    for series in (above, below):
        runs = series.cells.get(length, [])
        if not any(run["status"] == "ok" and measured(run, what) for run in runs):
            return runs[-1]["status"] if runs else "-"
    return above.value(length, what)[0] / below.value(length, what)[0]
