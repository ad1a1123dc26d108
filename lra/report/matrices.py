"""Matrices: one number per mechanism and length, or per mechanism and task."""

from collections import defaultdict
from collections.abc import Callable

from lra.report import groups as grouping
from lra.report.cells import Column, Table, accuracy_text, number
from lra.report.groups import CONDITIONS, FLOORS, Group, Row, extra_of


def _accuracy_cell(row: Row) -> str:
    return accuracy_text(row.summary, "") + ("†" if row.summary.num_seeds == 1 else "")


MATRICES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("Accuracy (%)", _accuracy_cell),
    ("Step time (ms)", lambda row: number(row.mean("step_ms"))),
    ("Peak memory (MiB)", lambda row: number(row.mean("peak_mem_mib"))),
)


def length_matrices(found: list[Group]) -> list[Table]:
    """Accuracy, step time and peak memory by length, for each recipe and device with several lengths."""
    bundles = defaultdict(list)
    for group in found:
        bundles[tuple(str(group.facts[k]) for k in ("task", "data_origin", *CONDITIONS))].append(group)
    tables = []
    for bundle in bundles.values():
        if len({group.facts["length"] for group in bundle}) < 2:
            continue
        name = grouping.data_title(bundle[0].facts | {"length": None, "data_variant": None})
        for what, cell in MATRICES:
            table = _matrix(bundle, cell, lambda group: f"{group.facts['length'] or 0:,}")
            table.title = (f"{what} by length: {name}", *_shared_title(bundle))
            tables.append(table)
    return tables


def task_matrices(found: list[Group], data: Callable[[Group], list[dict]]) -> list[Table]:
    """Accuracy of mechanisms by tasks, with the mean over tasks where each task stands once.

    `data` gives the plain numbers of one group.
    """
    bundles = defaultdict(list)
    for group in found:
        bundles[tuple(str(group.facts[k]) for k in CONDITIONS)].append(group)
    tables = []
    for bundle in bundles.values():
        table = _matrix(
            bundle, _accuracy_cell, lambda g: f"{g.facts['task']} {g.facts['length'] or ''}".strip()
        )
        table.title = ("Accuracy (%) by task", *_shared_title(bundle))
        tasks = [group.facts["task"] for group in bundle]
        if 1 < len(tasks) == len(set(tasks)):
            _add_average(table, bundle, tasks)
        table.data = [line for group in bundle for line in data(group)]
        tables.append(table)
    return tables


def _shared_title(bundle: list[Group]) -> tuple[str, ...]:
    facts = bundle[0].facts
    selection = f"selection {facts['selection']}" if facts["selection"] else ""
    conditions = (grouping.device_title(facts), facts["precision"], facts["layout"])
    parts = (grouping.recipe_title(facts), selection, ", ".join(str(c) for c in conditions if c))
    return tuple(part for part in parts if part)


def _matrix(bundle: list[Group], cell: Callable[[Row], str], heading: Callable[[Group], str]) -> Table:
    """One row per label, one column per group; rows in the order of their mean accuracy over the groups."""
    headings = [heading(group) for group in bundle]
    for index, (text, group) in enumerate(zip(headings, bundle, strict=True)):
        if headings.count(text) > 1:
            headings[index] = f"{text} [{str(group.facts['data_hash'])[:6]}]"
    rows: dict[str, dict[str, str]] = {}
    means: dict[str, list[float]] = defaultdict(list)
    floors = set()
    for index, group in enumerate(bundle):
        for row in group.rows:
            line = rows.setdefault(
                row.label, {"mechanism": row.label, **{str(i): "" for i in range(len(bundle))}}
            )
            line[str(index)] = cell(row) if row.ok else row.state
            means[row.label] += [] if row.summary.mean is None else [row.summary.mean]
            if row.mechanism in FLOORS:
                floors.add(row.label)

    def order(label: str) -> tuple:
        known = means[label]
        return (label in floors, -len(known), -sum(known) / max(len(known), 1), label)

    columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
    columns += [Column(str(index), text) for index, text in enumerate(headings)]
    lines = [rows[label] for label in sorted(rows, key=order)]
    one_seed = any("†" in text for line in lines for text in line.values())
    return Table((), columns, lines, ["†: one seed"] * one_seed, matrix=True)


def _add_average(table: Table, bundle: list[Group], tasks: list[str]) -> None:
    means = [{row.label: row.summary.mean for row in group.rows} for group in bundle]
    for line in table.rows:
        values = [group.get(line["mechanism"]) for group in means]
        line["average"] = "" if None in values else f"{100 * sum(values) / len(values):.1f}"
    table.columns.append(Column("average", "mean"))
    path_x = "Path-X included" if "pathx" in tasks else "Path-X left out"
    table.footnotes.append(
        f"mean: over the {len(tasks)} tasks shown, {path_x}, only for rows that have all of them"
    )


def measure_matrices(group: Group) -> list[Table]:
    """Step time and peak memory by length for each mode that was measured at several lengths."""
    cells: dict[str, dict[tuple[int, int], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in group.rows:
        run = row.runs[0]
        at = (run["length"] or 0, run["batch_size"] or 0)
        cells[str(extra_of(run, "mode") or "train")][at][row.label] = row
    tables = []
    for mode, lengths in cells.items():
        if len({length for length, _ in lengths}) < 2:
            continue
        batches = {batch for _, batch in lengths}
        labels = dict.fromkeys(label for at in sorted(lengths) for label in lengths[at])
        columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
        for index, (length, batch) in enumerate(sorted(lengths)):
            columns.append(Column(str(index), f"{length:,}" + (f" x {batch}" if len(batches) > 1 else "")))
        for what, cell in MATRICES[1:]:
            rows = []
            for label in labels:
                found = [lengths[at].get(label) for at in sorted(lengths)]
                texts = ["" if row is None else cell(row) if row.ok else row.state for row in found]
                rows.append({"mechanism": label} | {str(i): text for i, text in enumerate(texts)})
            batch = f", batch {min(batches)}" if len(batches) == 1 and min(batches) else ""
            headings = grouping.measure_title(group, f"{what} by length, {mode}{batch}")
            notes_below = ["columns are length x batch size"] if len(batches) > 1 else []
            tables.append(Table(headings, columns, rows, notes_below, matrix=True))
    return tables
