"""From a frame of records to groups of measurements that may be compared, and to rows that keep to one
configuration over all lengths.
"""

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lra.report.groups import (
    CONDITIONS,
    FLOORS,
    Group,
    Row,
    data_title,
    differing,
    distinct,
    extra_of,
    own_of,
    partition,
    recipe_title,
    runs_of,
)

if TYPE_CHECKING:
    import pandas as pd

SETTING = ("torch", "setting", "compiled", "step_mode")  # what else a number depends on
MEASURE_KEY = ("task", *CONDITIONS, "d_model", "num_layers", *SETTING)
CELL = ("model", "length", "batch_size", "mode", "tokens", "seed", "preset")  # overrides that make cells


def measure_groups(frame: "pd.DataFrame") -> list[Group]:
    """Measurements, grouped; each row is one mechanism at one mode, length and batch size. A label stands
    for the same configuration at every length of a group.
    """
    groups = []
    for facts, runs in parted(runs_of(frame, "measure"), MEASURE_KEY):
        labels = own_labels(runs)
        cells = defaultdict(lambda: defaultdict(list))
        for run in runs:
            at = (mode_of(run), run["length"] or 0, run["batch_size"] or 0)
            cells[at][variant(run)].append(run)
        order = sorted(cells, key=lambda key: (key[0] != "train", key))
        rows = []
        for at in order:
            found = [Row(model, labels[model, own], runs) for (model, own), runs in cells[at].items()]
            rows += sorted(found, key=_by_time)
        groups.append(Group(facts, rows))
    _tell_apart(groups)
    return groups


def parted(runs: list[dict], key: tuple[str, ...]) -> list[tuple[dict, list[dict]]]:
    """Measurements by the facts of `key`. A run that does not say its setting joins the only one that fits
    what it says; what most runs of a setting did stands for all of it, so that a cell that could not be
    compiled, or failed before, stays with the others.
    """
    did: dict[Any, Counter] = defaultdict(Counter)
    for run in runs:
        if run["status"] == "ok":
            did[extra_of(run, "setting")][extra_of(run, "compiled"), run["step_mode"]] += 1

    def fact(run: dict, name: str) -> Any:
        setting = extra_of(run, "setting")
        if setting is not None and did[setting] and name in ("compiled", "step_mode"):
            return did[setting].most_common(1)[0][0][name == "step_mode"]
        return extra_of(run, name)

    return partition(runs, key, fact, loose=("setting",))


def variant(run: dict) -> tuple[str, str]:
    """What has one row over all lengths of a group: mechanism and own parameters."""
    return run["model"], json.dumps(own_of(run), sort_keys=True, default=str)


def own_labels(runs: Iterable[dict]) -> dict[tuple[str, str], str]:
    """A label for each variant: its mechanism, and where that has several the parameters that differ."""
    by_model: dict[str, dict[tuple[str, str], dict]] = defaultdict(dict)
    for run in runs:
        by_model[run["model"]][variant(run)] = own_of(run)
    labels = {}
    for model, variants in by_model.items():
        for key, parts in zip(variants, differing(list(variants.values())), strict=True):
            labels[key] = f"{model} ({', '.join(parts)})" if parts else model
    return labels


def mode_of(run: dict) -> str:
    """What was measured: `train` or `infer`."""
    return str(extra_of(run, "mode") or "train")


def _by_time(row: Row) -> tuple:
    step_ms = row.mean("step_ms")
    return (row.mechanism in FLOORS, step_ms is None, step_ms or 0.0, row.label)


# Titles, and what is said of settings.


def measure_title(group: Group, what: str) -> tuple[str, ...]:
    """The parts of the title line of a table of measurements."""
    facts = group.facts
    parts = (what, data_title(facts), recipe_title(facts), sizes(facts), group.conditions(), *group.marks)
    return tuple(part for part in parts if part)


def sizes(facts: dict) -> str:
    """`d_model 64, 2 layers`, as far as known."""
    layers = facts["num_layers"]
    found = [f"d_model {facts['d_model']}"] if facts["d_model"] else []
    found += [f"{layers} layer" + "s" * (layers != 1)] if layers else []
    return ", ".join(found)


def setting_marks(alike: list[tuple[dict, list[dict]]]) -> list[list[str]]:
    """What tells groups (their facts and runs) apart that differ in their setting only: the version of
    PyTorch, compiled or not, overrides of the command line, else the digest of the setting.
    """
    marks: list[list[str]] = [[] for _ in alike]
    asked = [_asked(runs) for _, runs in alike]
    keys = dict.fromkeys(key for one in asked for key in one)
    told = [(lambda i, k=key: asked[i].get(k), f"{key}={{}}") for key in keys]
    for name, text in (("torch", "torch {}"), ("compiled", None), ("step_mode", "{}")):
        told.insert(0, (lambda i, k=name: alike[i][0].get(k), text))
    for value_of, text in told:
        values = [value_of(i) for i in range(len(alike))]
        if len(set(values)) > 1:
            for mark, value in zip(marks, values, strict=True):
                said = ("compiled" if value else "not compiled") if text is None else text.format(value)
                mark += [said] * (value is not None)
    same = Counter(tuple(mark) for mark in marks)
    for mark, (facts, _) in zip(marks, alike, strict=True):
        if same[tuple(mark)] > 1:
            setting = facts.get("setting")
            mark.append(f"setting {setting[:6]}" if setting else "setting not on record")
    return marks


def _asked(runs: list[dict]) -> dict[str, str]:
    """The overrides that the command lines of all runs share, without those that make cells."""
    found: dict[str, str] | None = None
    for command in distinct(run["command"] for run in runs):
        try:
            words = shlex.split(command)
        except ValueError:
            return {}
        one = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
        found = one if found is None else dict(found.items() & one.items())
    return {k: v for k, v in (found or {}).items() if k not in CELL and "," not in v}


def _tell_apart(groups: list[Group]) -> None:
    by_title: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        by_title[measure_title(group, "")].append(group)
    for alike in (members for members in by_title.values() if len(members) > 1):
        found = setting_marks([(group.facts, [r for row in group.rows for r in row.runs]) for group in alike])
        for group, marks in zip(alike, found, strict=True):
            group.marks += marks


def setting_notes(rows: list[Row]) -> list[str]:
    """Which rows of a group did not run as the rest, and how many do not say."""
    runs = [(row, run) for row in rows for run in row.runs]
    good = [(row, bool(extra_of(run, "compiled"))) for row, run in runs if run["status"] == "ok"]
    found = []
    if any(compiled for _, compiled in good):
        places: dict[str, list[str]] = defaultdict(list)
        for row, compiled in good:
            if not compiled:
                places[f"{row.label}, {mode_of(row.runs[0])}"].append(f"{row.runs[0]['length'] or 0:,}")
        lacking = "; ".join(f"{name} at {', '.join(at)}" for name, at in places.items())
        found += [f"could not be compiled, run as they are: {lacking}"] * bool(lacking)
    silent = sum(extra_of(run, "setting") is None for _, run in runs)
    if 0 < silent < len(runs):
        found.append(f"{silent} of {len(runs)} runs do not record their whole setting")
    return found
