"""Averages over tasks, under the conventions that papers use and under no other."""

import numpy as np

from lra.report.cells import Column, Table
from lra.report.groups import TASK_TITLES, Group, Row
from lra.report.published import LENGTHS

FIVE = ("listops", "text", "retrieval", "image", "pathfinder32")
CONVENTIONS = {"5 tasks": FIVE, "6 tasks, failed Path-X as 50": (*FIVE, "pathx")}
FAILED = ("oom", "diverged", "failed", "unsupported")  # an interrupted run is no result
CHANCE = 0.5  # Path-X has two classes


def add_averages(table: Table, bundle: list[Group]) -> None:
    """A column per convention, if every task of it stands once in the table at the papers' own length.

    All groups of a bundle have one recipe. A row gets an average only if it has every task; one whose Path-X
    failed gets 50 for it under the convention that says so.
    """
    for name, tasks in CONVENTIONS.items():
        at = {task: [g for g in bundle if _is_native(g, task)] for task in tasks}
        if not all(at.values()):
            continue
        twice = [TASK_TITLES[task] for task, groups in at.items() if len(groups) > 1]
        if twice:
            table.footnotes.append(f"no average over {name}: {', '.join(twice)} stands here more than once")
            continue
        rows = {task: {row.label: row for row in at[task][0].rows} for task in tasks}
        failed = []
        for line in table.rows:
            label = line["mechanism"]
            found = {task: rows[task].get(label) for task in tasks}
            text, path_x_failed = _average(found)
            line[name] = text
            failed += [f"{label} ({found['pathx'].state})"] if path_x_failed else []
        table.columns.append(Column(name, name))
        table.footnotes.append(_footnote(name, tasks, at, failed))


def _is_native(group: Group, task: str) -> bool:
    return group.facts["task"] == task and group.facts["length"] in LENGTHS[task]


def _average(rows: dict[str, Row | None]) -> tuple[str, bool]:
    """`57.3 ± 0.2`, and whether Path-X counts as 50 in it; the spread is that of the averages per seed."""
    path_x = rows.get("pathx")
    failed = path_x is not None and not path_x.ok and path_x.state in FAILED
    trained = [row for task, row in rows.items() if not (failed and task == "pathx")]
    if any(row is None or row.summary.mean is None for row in trained):
        return "", False
    extra = [CHANCE] if failed else []
    mean = float(np.mean([row.summary.mean for row in trained] + extra))
    by_seed = [{run["seed"]: run["test_accuracy"] for run in row.ok} for row in trained]
    seeds = set(by_seed[0])
    if len(seeds) < 2 or any(set(scores) != seeds or None in scores.values() for scores in by_seed):
        return f"{100 * mean:.1f}", failed
    std = np.std([np.mean([scores[seed] for scores in by_seed] + extra) for seed in seeds], ddof=1)
    return f"{100 * mean:.1f} ± {100 * std:.1f}", failed


def _footnote(name: str, tasks: tuple[str, ...], at: dict[str, list[Group]], failed: list[str]) -> str:
    origins = dict.fromkeys(str(at[task][0].facts["data_origin"]).replace("_", " ") for task in tasks)
    text = f"{name}: mean over {', '.join(TASK_TITLES[task] for task in tasks)}, for rows that have them all"
    text += f"; data: {', '.join(origins)}" if len(origins) > 1 else ""
    return text + (f"; Path-X counts as 50 for {', '.join(failed)}" if failed else "")
