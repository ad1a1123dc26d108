"""Records to tables: what stands in which cell; how a table looks is the matter of `render`."""

from collections import defaultdict
from typing import TYPE_CHECKING

from lra.errors import UserError, unknown
from lra.report import cautions, cost_tables, matrices, measurements, published, stats, verdicts
from lra.report import groups as grouping
from lra.report.cells import Column, Table, accuracy_text, interval_text, number, published_text, si
from lra.report.groups import FLOORS, Group, Row, distinct, extra_of, value_text
from lra.report.pairs import pair_table

if TYPE_CHECKING:
    import pandas as pd

BY = ("length", "task")
REASON_WIDTH = 90

COST = [
    Column("params", "params", drop=3),
    Column("flops_per_step", "FLOPs/step", drop=2),
    Column("state_size", "state", drop=1),
    Column("step_ms", "step ms", drop=6),
    Column("tokens_per_s", "tokens/s", drop=4),
    Column("peak_mem_mib", "peak MiB", drop=5),
]

RANKED = [
    Column("mechanism", "mechanism", left=True, wrap=True),
    Column("n", "n"),
    Column("accuracy", "accuracy ± std", left=True),
    Column("ci95", "95 %", drop=9, left=True),
    Column("published", "published", drop=8),
    Column("verdict", "verdict", drop=7, left=True),
    *COST,
    Column("note", "note", left=True, wrap=True),
]

MEASURED = [
    Column("mechanism", "mechanism", left=True, wrap=True),
    Column("mode", "mode", left=True),
    Column("length", "length"),
    Column("batch_size", "batch", drop=4),
    Column("step_ms", "step ms"),
    Column("tokens_per_s", "tokens/s", drop=5),
    Column("peak_mem_mib", "peak MiB", drop=6),
    Column("params", "params", drop=3),
    Column("flops_per_step", "FLOPs/step", drop=2),
    Column("state_size", "state", drop=1),
    Column("status", "status", left=True),
    Column("note", "note", left=True, wrap=True),
]
SPARSE = ("published", "verdict", "flops_per_step", "state_size", "note")  # left out where no row has them


def build(frame: "pd.DataFrame", by: str | None = None, *, pairs: bool = False) -> list[Table]:
    """Every table of a frame of records (`records.load`), in print order.

    `by="task"`: one matrix of accuracies, mechanisms by tasks, per recipe and device. Else one section per
    task, length and conditions, and matrices by length for what was run at several lengths. `pairs` adds
    every pair of rows of each task and length. Measurements follow.
    """
    if by is not None and by not in BY:
        raise unknown("way to arrange tables", by, BY)
    if frame.empty:
        raise UserError("no records to make a table of; name run folders, or make a run first")
    found = grouping.train_groups(frame)
    compared = [pair_table(group) if pairs else None for group in found]
    if by == "task":
        tables = matrices.task_matrices(found, _section_data) + [table for table in compared if table]
    else:
        tables = []
        for group, elsewhere, beside in zip(found, cautions.elsewhere(found), compared, strict=True):
            tables.append(section(group))
            tables[-1].warnings[:0] = elsewhere
            tables += [beside] if beside else []
        tables += matrices.length_matrices(found)
    measured = measurements.measure_groups(frame)
    for group, elsewhere in zip(measured, cautions.elsewhere(measured), strict=True):
        first = measure_section(group)
        first.warnings[:0] = elsewhere
        tables += [first, *matrices.measure_matrices(group)]
    return tables + (cost_tables.cost_tables(frame) if measured else [])


# Training runs.


def section(group: Group) -> Table:
    """One ranked table: mechanisms by accuracy, floors at the bottom."""
    cells = [_published(group, row) for row in group.rows]
    rows = [
        {
            "mechanism": row.label,
            "n": str(row.summary.num_seeds),
            "accuracy": accuracy_text(row.summary, row.letters) if row.ok else row.state,
            "ci95": interval_text(row.summary),
            "published": published_text(cell),
            "verdict": _verdict(group, row, cell),
            **_cost(row),
            "note": "; ".join(notes(group, row)),
        }
        for row, cell in zip(group.rows, cells, strict=True)
    ]
    warnings = cautions.unequal_settings(group) + cautions.heavier(group.rows)
    below = footnotes(group, cells) + _state_footnote(rows)
    return Table(group.title(), _filled(RANKED, rows), rows, below, _section_data(group), warnings=warnings)


def _filled(columns: list[Column], rows: list[dict[str, str]]) -> list[Column]:
    """The columns, without those that would say nothing."""
    return [c for c in columns if c.key not in SPARSE or any(row[c.key] not in ("", "-") for row in rows)]


def _cost(row: Row) -> dict[str, str]:
    return {
        "params": si(row.mean("num_params"), " "),
        "flops_per_step": si(row.mean("flops_per_step"), " "),
        "state_size": si(row.mean("state_size"), " "),
        "step_ms": number(row.mean("step_ms")),
        "tokens_per_s": si(row.mean("tokens_per_s")),
        "peak_mem_mib": number(row.mean("peak_mem_mib")),
    }


def _state_footnote(rows: list[dict[str, str]]) -> list[str]:
    shown = any(row["state_size"] != "-" for row in rows)
    return ["state: numbers one layer keeps to mix one sequence"] * shown


def _verdict(group: Group, row: Row, cell: published.Cell | None) -> str:
    changed = any(verdicts.changed(run["deviations"] or []) for run in row.ok)
    return verdicts.verdict(row.summary, cell, origin=group.facts.get("data_origin"), changed=changed)


def _published(group: Group, row: Row) -> published.Cell | None:
    facts = group.facts
    return published.lookup(facts["paper"], facts["task"], row.mechanism, length=facts["length"])


def notes(group: Group, row: Row) -> list[str]:
    """What a reader must know before quoting the row."""
    found = failure_notes(row)
    summary = row.summary
    if summary.num_seeds == 1:
        found.append("1 seed: no verdict")
    bound = summary.low if summary.low is not None else summary.mean
    if bound is not None and group.majority is not None and bound <= group.majority:
        found.append("at majority")
    if len(row.ok) > summary.num_seeds:
        found.append(f"{_runs(len(row.ok) - summary.num_seeds)} without test accuracy")
    if row.repeats:
        found.append(f"{_runs(row.repeats)} of a seed already counted")
    found += unusual_steps(group, row)
    own = value_text("own", {k: v for k, v in row.own.items() if f"{k}={v}" not in row.label})
    common = shared_deviations(group)
    apart = [[d for d in run["deviations"] or [] if d not in common] for run in row.runs]
    deviations = [value_text("deviations", d) for d in distinct(apart) if d]
    found += [own] * bool(own) + [f"deviates: {d}" for d in deviations if d not in row.label]
    return found


def shared_deviations(group: Group) -> list[str]:
    """What every run of the table does otherwise than its recipe; said once, below it."""
    lists = [run["deviations"] or [] for row in group.rows for run in row.runs]
    return [d for d in lists[0] if all(d in other for other in lists[1:])] if lists else []


def unusual_steps(group: Group, row: Row) -> list[str]:
    """How the row's steps were run, where that is not what the title says."""
    modes = distinct(run["step_mode"] for run in row.ok)
    return [f"steps {', '.join(modes)}"] if modes and modes != group.step_modes[:1] else []


def short_reason(reason: object) -> str:
    """A reason on one line, cut to what a table can hold."""
    text = " ".join(str(reason or "").split())
    return text if len(text) <= REASON_WIDTH else text[: REASON_WIDTH - 3] + "..."


def failure_notes(row: Row) -> list[str]:
    """`1 run: diverged at step 812`, the most frequent first, two of them in full."""
    found = []
    for (status, reason), count in row.failures.most_common():
        reason = short_reason(reason)
        says_so = reason.lower().startswith((status, "out of memory" if status == "oom" else status))
        found.append(f"{_runs(count)}: {reason if says_so else f'{status} ({reason})' if reason else status}")
    rest = sum(count for _, count in row.failures.most_common()[2:])
    return found[:2] + [f"{_runs(rest)} failed otherwise"] * (rest > 0)


def _runs(count: int) -> str:
    return f"{count} run" + "s" * (count != 1)


def footnotes(group: Group, cells: list[published.Cell | None]) -> list[str]:
    """What the letters and marks in a section mean, and what could not be said."""
    found = []
    letters = sorted(set("".join(row.letters for row in group.rows)))
    if letters:
        found.append(
            f"{', '.join(letters)}: rows that share a letter cannot be told apart "
            f"(paired test over seeds and {group.num_paired:,} examples, Holm)"
        )
    missing = defaultdict(list)
    for row in group.rows:
        if row.no_letters:
            missing[row.no_letters].append(row.label)
    lead = "no letter" if letters else "no letters"
    comparable = sum(bool(row.ok) for row in group.rows) > 1
    found += [
        f"{lead} for want of {reason}: {', '.join(rows)}" for reason, rows in missing.items() if comparable
    ]
    bases = {row.summary.basis for row in group.rows}
    if stats.TEST_ONLY in bases:
        found.append("†: interval of the test set only; one seed does not show the spread over seeds")
    if stats.SEEDS_ONLY in bases:
        found.append("‡: interval of the seeds only; the size of the test set is not on record")
    verdict = verdicts.footnote({_verdict(group, *both) for both in zip(group.rows, cells, strict=True)})
    found += [verdict] if verdict else []
    shown = [cell for cell in cells if cell is not None]
    if shown:
        found.append(f"published: {shown[0].source}, {shown[0].table}")
    if any(cell.recalled for cell in shown):
        found.append("~: published number written from memory, not read in its source")
    if any(cell.copied for cell in shown):
        found.append(
            "(published): the paper took the number over from an earlier one; its recipe never ran it"
        )
    common = shared_deviations(group)
    found += [f"all rows deviate from the paper: {'; '.join(common)}"] * bool(common)
    if len(group.rows) > 1 and not any(row.mechanism in FLOORS for row in group.rows):
        found.append(f"no floor here; model={','.join(FLOORS)} shows what no mixing of tokens reaches")
    return found + memory_footnotes(group.rows)


def memory_footnotes(rows: list[Row]) -> list[str]:
    """How peak memory was measured, where a record says so; by row if rows differ."""
    methods = defaultdict(list)
    for row in rows:
        for method in distinct(extra_of(run, "peak_mem_method") for run in row.ok):
            methods[method].append(row.label)
    if len(methods) == 1:
        return [f"peak MiB: {method}" for method in methods]
    return [f"peak MiB of {', '.join(dict.fromkeys(labels))}: {method}" for method, labels in methods.items()]


# Measurements.


def measure_section(group: Group) -> Table:
    """Time and memory of a step, a line per mechanism, mode and length; the fastest of each length first."""
    rows = []
    for row in group.rows:
        alone = len(row.runs) == 1 and not row.ok  # the status column says the rest
        failures = [short_reason(row.runs[0]["reason"])] if alone else failure_notes(row)
        rows.append(
            {
                "mechanism": row.label,
                "mode": cautions.mode_of(row),
                "length": f"{row.runs[0]['length'] or 0:,}",
                "batch_size": str(row.runs[0]["batch_size"] or ""),
                **_cost(row),
                "status": row.state,
                "note": "; ".join(failures + unusual_steps(group, row)),
            }
        )
    places = defaultdict(list)
    for row in group.rows:
        places[f"{cautions.mode_of(row)} at {row.runs[0]['length'] or 0:,}"].append(row)
    warnings = cautions.one_kernel(group.rows) + cautions.heavier_by_place(places.items())
    below = cautions.kernels(group.rows) + measurements.setting_notes(group.rows)
    below += _state_footnote(rows) + memory_footnotes(group.rows)
    title = measurements.measure_title(group, "Time and memory of a step")
    data = [_data(group, row, None) for row in group.rows]
    return Table(title, _filled(MEASURED, rows), rows, below, data, keys=3, warnings=warnings)


# Plain numbers.

MEANS = (
    "num_params",
    "state_size",
    "step_ms",
    "examples_per_s",
    "tokens_per_s",
    "padded_tokens_per_s",
    "peak_mem_mib",
)
MEANS += ("reserved_mib", "flops_per_step", "wall_s", "train_s", "eval_s", "data_s", "compile_s")


def _section_data(group: Group) -> list[dict]:
    return [_data(group, row, _published(group, row)) for row in group.rows]


def _data(group: Group, row: Row, cell: published.Cell | None) -> dict:
    """One line of the CSV: every number plain, accuracies in percent as in the other formats."""
    summary = row.summary
    measured = row.runs[0]["kind"] == "measure"

    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    facts = {
        key: group.facts.get(key, row.only(key)) for key in dict.fromkeys((*grouping.TRAIN_KEY, "step_mode"))
    }
    if measured:  # a table may hold cells that were not compiled as the others were
        facts |= {key: group.facts[key] for key in ("torch", "setting")}
        facts["compiled"] = extra_of(row.runs[0], "compiled")
    return {
        "kind": row.runs[0]["kind"],
        **facts,
        "mode": cautions.mode_of(row) if measured else None,
        "batch_size": row.only("batch_size"),
        "mechanism": row.mechanism,
        "label": row.label,
        "config_hash": row.runs[0]["config_hash"],
        "status": row.state,
        "num_seeds": len(row.ok) if measured else summary.num_seeds,
        "num_failed": sum(row.failures.values()),
        "accuracy_percent": percent(summary.mean),
        "std_percent": percent(summary.std),
        "ci95_low_percent": percent(summary.low),
        "ci95_high_percent": percent(summary.high),
        "ci95_basis": summary.basis,
        "letters": row.letters or None,
        "num_test": row.only("num_test"),
        "majority_percent": percent(group.majority),
        "published_percent": cell.value if cell else None,
        "published_flag": None
        if cell is None
        else ", ".join(f for f in ("failed", "recalled", "copied") if getattr(cell, f)) or None,
        "published_source": None if cell is None else f"{cell.source}, {cell.table}",
        "verdict": _verdict(group, row, cell) or None,
        **{key: row.mean(key) for key in MEANS},
        "peak_mem_method": ", ".join(distinct(extra_of(run, "peak_mem_method") for run in row.ok)) or None,
        **(cost_tables.plain(row.runs[0]) if measured else {}),
        "note": "; ".join(failure_notes(row) if measured else notes(group, row)) or None,
    }
