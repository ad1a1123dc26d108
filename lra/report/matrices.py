"""Matrices: one number per mechanism and length, or per mechanism and task."""

from collections import Counter, defaultdict
from collections.abc import Callable

from lra.report import cautions, measurements
from lra.report import groups as grouping
from lra.report.averages import add_averages
from lra.report.cells import Column, Table, accuracy_text, number
from lra.report.groups import CONDITIONS, FLOORS, TASK_TITLES, Group, Row, distinct

MAJORITY = "majority class"


def _accuracy_cell(row: Row) -> str:
    marks = "†" * (row.summary.num_seeds == 1) + "‡" * bool(row.failures)
    return accuracy_text(row.summary, "") + marks


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
            if len(distinct(g.facts["data_variant"] for g in bundle)) > 1:
                table.footnotes.append(cautions.data_named(_headings(table), bundle))
            tables.append(table)
    return tables


def task_matrices(found: list[Group], data: Callable[[Group], list[dict]]) -> list[Table]:
    """Accuracy of mechanisms by tasks, with the averages whose tasks are all there.

    `data` gives the plain numbers of one group.
    """
    bundles = defaultdict(list)
    for group in found:
        bundles[tuple(str(group.facts[k]) for k in CONDITIONS)].append(group)
    tables = []
    for bundle, elsewhere in zip(bundles.values(), _elsewhere(list(bundles.values())), strict=True):
        table = _matrix(bundle, _accuracy_cell, _task_heading)
        table.title = ("Accuracy (%) by task", *_shared_title(bundle))
        headings = _headings(table)
        table.footnotes.append(cautions.data_named(headings, bundle))
        table.warnings += elsewhere
        table.warnings += cautions.heavier_by_place(
            (heading, group.rows) for heading, group in zip(headings, bundle, strict=True)
        )
        for heading, group in zip(headings, bundle, strict=True):
            table.warnings += [f"{heading}: {text}" for text in cautions.unequal_settings(group)]
        add_averages(table, bundle)
        table.data = [line for group in bundle for line in data(group)]
        tables.append(table)
    return tables


def _elsewhere(bundles: list[list[Group]]) -> list[list[str]]:
    """Per bundle, what `cautions.elsewhere` says of its groups beside those of other bundles, each once."""
    groups = [group for bundle in bundles for group in bundle]
    warnings = dict(zip(map(id, groups), cautions.elsewhere(groups, ("recipe", "precision")), strict=True))
    return [
        list(dict.fromkeys(text for group in bundle for text in warnings[id(group)])) for bundle in bundles
    ]


def _task_heading(group: Group) -> str:
    task, length = group.facts["task"], group.facts["length"]
    return f"{TASK_TITLES.get(task, task)} {length or 0:,}".removesuffix(" 0")


def _headings(table: Table) -> list[str]:
    return [column.title for column in table.columns if column.key.isdigit()]


def _shared_title(bundle: list[Group]) -> tuple[str, ...]:
    facts = bundle[0].facts
    selection = f"selection {facts['selection']}" if facts["selection"] else ""
    conditions = (grouping.device_title(facts), facts["precision"], facts["layout"])
    parts = (grouping.recipe_title(facts), selection, ", ".join(str(c) for c in conditions if c))
    return tuple(part for part in parts if part)


def _matrix(bundle: list[Group], cell: Callable[[Row], str], heading: Callable[[Group], str]) -> Table:
    """One row per label, one column per group; rows in the order of their mean accuracy over the groups."""
    texts = [heading(group) for group in bundle]
    headings = [
        f"{text} [{str(group.facts['data_hash'])[:6]}]" if texts.count(text) > 1 else text
        for text, group in zip(texts, bundle, strict=True)
    ]
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
    table = Table((), columns, lines, matrix=True, warnings=cautions.mixed_data(headings, bundle))
    if cell is _accuracy_cell:
        _add_counts(table, bundle)
        _add_failures(table, headings, bundle)
        _add_majority(table, bundle)
    return table


def _add_counts(table: Table, bundle: list[Group]) -> None:
    """How many seeds stand behind a cell: the usual number below, others in the cell."""
    counts = {
        (row.label, str(i)): row.summary.num_seeds for i, group in enumerate(bundle) for row in group.rows
    }
    several = Counter(n for n in counts.values() if n > 1)
    usual = max(several, key=lambda n: (several[n], n), default=None)
    for line in table.rows:
        for key in line:
            n = counts.get((line["mechanism"], key), 0)
            if n > 1 and n != usual:
                line[key] += f" (n={n})"
    if usual is not None:
        table.footnotes.append(f"mean ± std over {usual} seeds" + " unless noted" * (len(several) > 1))
    if 1 in counts.values():
        table.footnotes.append("†: one seed")


def _add_failures(table: Table, headings: list[str], bundle: list[Group]) -> None:
    """Which of the cells with an accuracy have seeds that ended otherwise."""
    found = [
        f"{row.label} in {heading}: {', '.join(f'{n} {status}' for status, n in _statuses(row).items())}"
        for heading, group in zip(headings, bundle, strict=True)
        for row in group.rows
        if row.ok and row.failures
    ]
    if found:
        table.footnotes.append(f"‡: other seeds failed and are not in the mean: {'; '.join(found)}")


def _statuses(row: Row) -> Counter:
    statuses: Counter = Counter()
    for (status, _), count in row.failures.items():
        statuses[status] += count
    return statuses


def _add_majority(table: Table, bundle: list[Group]) -> None:
    """The share of the most frequent class, below the floors."""
    shares = ["" if g.majority is None else f"{100 * g.majority:.1f}" for g in bundle]
    if any(shares):
        table.rows.append({"mechanism": MAJORITY} | {str(i): text for i, text in enumerate(shares)})


def measure_matrices(group: Group) -> list[Table]:
    """Step time and peak memory by length for each mode that was measured at several lengths."""
    cells: dict[str, dict[tuple[int, int], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in group.rows:
        run = row.runs[0]
        at = (run["length"] or 0, run["batch_size"] or 0)
        cells[cautions.mode_of(row)][at][row.label] = row
    kernels = cautions.kernels(group.rows)
    tables = []
    for mode, lengths in cells.items():
        if len({length for length, _ in lengths}) < 2:
            continue
        batches = {batch for _, batch in lengths}
        settings = measurements.setting_notes([row for at in lengths.values() for row in at.values()])
        labels = dict.fromkeys(label for at in sorted(lengths) for label in lengths[at])
        floors = {row.label for row in group.rows if row.mechanism in FLOORS}
        columns = [Column("mechanism", "mechanism", left=True, wrap=True)]
        for index, (length, batch) in enumerate(sorted(lengths)):
            columns.append(Column(str(index), f"{length:,}" + (f" x {batch}" if len(batches) > 1 else "")))
        for what, cell in MATRICES[1:]:
            rows = []
            for label in sorted(labels, key=lambda label: label in floors):
                found = [lengths[at].get(label) for at in sorted(lengths)]
                texts = ["" if row is None else cell(row) if row.ok else row.state for row in found]
                rows.append({"mechanism": label} | {str(i): text for i, text in enumerate(texts)})
            batch = f", batch {min(batches)}" if len(batches) == 1 and min(batches) else ""
            headings = measurements.measure_title(group, f"{what} by length, {mode}{batch}")
            notes_below = ["columns are length x batch size"] if len(batches) > 1 else []
            tables.append(Table(headings, columns, rows, [*notes_below, *kernels, *settings], matrix=True))
            tables[-1].warnings += cautions.one_kernel(group.rows)
    return tables
