"""From a frame of records to groups of rows that may be ranked together; a row is one mechanism's runs."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra import records
from lra.report import stats

if TYPE_CHECKING:
    import pandas as pd

# Training runs and measurements that differ in any of these are not ranked against each other.
CONDITIONS = ("paper", "recipe_version", "precision", "selection", "layout", "device", "num_devices")
TRAIN_KEY = ("task", "length", "data_variant", "data_origin", "data_hash", *CONDITIONS)
FLOORS = ("identity", "global_mean")  # what a mechanism has to beat; they stand below the ranking
TASK_TITLES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder32": "Pathfinder",
    "pathx": "Path-X",
}
SHOWN_DIFFERENCES = ("batch_size", "d_model", "num_layers", "deviations", "num_params")


@dataclass
class Row:
    """One mechanism under one configuration: all its runs in a group, ended well or not."""

    mechanism: str
    label: str
    runs: list[dict]
    letters: str = ""
    no_letters: str | None = None  # why the paired test left this row out

    @cached_property
    def ok(self) -> list[dict]:
        """Runs that ended well; a seed that was trained more than once counts once, a measurement always."""
        good = [run for run in self.runs if run["status"] == "ok"]
        once: dict = {}
        for index, run in enumerate(good):
            counted = run["kind"] == "train" and run["seed"] is not None
            once.setdefault(("seed", run["seed"]) if counted else index, run)
        return list(once.values())

    @cached_property
    def summary(self) -> stats.Summary:
        """Accuracy over the runs that ended well and were tested."""
        tested = [run for run in self.ok if run["test_accuracy"] is not None]
        sizes = [run["num_test"] for run in tested if run["num_test"]]
        return stats.summarise([run["test_accuracy"] for run in tested], min(sizes, default=None))

    def mean(self, key: str) -> float | None:
        """Mean of a number over the runs that ended well and have it."""
        values = [run[key] for run in self.ok if run[key] is not None]
        return float(np.mean(values)) if values else None

    def only(self, key: str) -> Any:
        """The value of a field if all runs that have it agree; else None."""
        values = distinct(run[key] for run in self.ok or self.runs)
        return values[0] if len(values) == 1 else None

    @cached_property
    def own(self) -> dict:
        """The mechanism's own parameters that are not at their default."""
        return next((own_of(run) for run in self.runs if own_of(run)), {})

    @property
    def repeats(self) -> int:
        """How many runs repeat a seed that is already counted."""
        return sum(run["status"] == "ok" for run in self.runs) - len(self.ok)

    @property
    def failures(self) -> Counter:
        """(status, reason) -> number of runs."""
        return Counter((run["status"], run["reason"]) for run in self.runs if run["status"] != "ok")

    @property
    def state(self) -> str:
        """`ok` if any run ended well, else the most frequent status."""
        return "ok" if self.ok else Counter(run["status"] for run in self.runs).most_common(1)[0][0]

    @cached_property
    def correct(self) -> np.ndarray | str:
        """Which test examples each seed got right, bool [n N]; or what a paired test lacks."""
        arrays = [
            records.load_correct(run["path"]) if Path(run["path"]).is_dir() else None for run in self.ok
        ]
        if not arrays or any(a is None for a in arrays):
            return "test predictions with labels"
        if len({a.size for a in arrays}) > 1:
            return "seeds tested on the same examples"
        for array, run in zip(arrays, self.ok, strict=True):
            if (
                run["test_accuracy"] is None
                or abs(array.mean() - run["test_accuracy"]) > 0.5 / array.size + 1e-6
            ):
                return "predictions that agree with the recorded accuracy"
        return np.stack(arrays)


@dataclass
class Group:
    """Rows that may be ranked together, and what they have in common."""

    facts: dict
    rows: list[Row]
    num_paired: int = 0  # test examples behind the letters
    tests: dict[tuple[str, str], tuple[stats.Difference, float]] = field(
        default_factory=dict
    )  # labels of two rows, the better one first: the joint test of their difference, its p-value after Holm
    marks: list[str] = field(default_factory=list)  # facts that tell two groups of one title apart

    @property
    def majority(self) -> float | None:
        """Share of the most frequent class in the test split."""
        return next(
            (r["majority_accuracy"] for row in self.rows for r in row.runs if r["majority_accuracy"]), None
        )

    @property
    def step_modes(self) -> list[str]:
        """How the optimisation steps were run, the most frequent way first."""
        modes = Counter(run["step_mode"] for row in self.rows for run in row.ok if run["step_mode"])
        return [mode for mode, _ in modes.most_common()]

    def title(self) -> tuple[str, ...]:
        """The parts of the title line: what, recipe, selection, majority, conditions."""
        facts = self.facts
        majority = f"majority {100 * self.majority:.1f} %" if self.majority is not None else None
        selection = f"selection {facts['selection']}" if facts.get("selection") else None
        parts = (data_title(facts), recipe_title(facts), selection, majority, self.conditions(), *self.marks)
        return tuple(part for part in parts if part)

    def conditions(self) -> str:
        """Device, precision, step mode and layout."""
        modes = self.step_modes
        steps = modes[0] + (" unless noted" if len(modes) > 1 else "") if modes else None
        compiled = "compiled" if self.facts.get("compiled") else None
        parts = (device_title(self.facts), self.facts["precision"], steps, compiled, self.facts["layout"])
        return ", ".join(str(part) for part in parts if part)


def data_title(facts: dict) -> str:
    """Task, length, variant and origin: `ListOps (2,000 tokens, regenerated)`."""
    inside = [f"{facts['length']:,} tokens"] if facts.get("length") is not None else []
    inside += data_parts(facts)
    name = TASK_TITLES.get(facts["task"], facts["task"])
    return f"{name} ({', '.join(inside)})" if inside else name


def data_parts(facts: dict) -> list[str]:
    """The variant, as far as task and length do not say it already, and the origin."""
    variant = str(facts.get("data_variant") or "")
    for usual in (f"{facts['task']}-{facts.get('length')}", facts["task"]):
        if variant == usual or variant.startswith(f"{usual} ("):
            variant = variant[len(usual) + 2 : -1]
    return [part for part in (variant, str(facts.get("data_origin") or "").replace("_", " ")) if part]


def recipe_title(facts: dict) -> str:
    """The recipe by name and version."""
    if facts["paper"] in (None, "none"):
        return "no paper's recipe"
    version = facts["recipe_version"]
    return f"recipe {facts['paper']}" + (f" version {version}" if version not in (None, 1, "1") else "")


def device_title(facts: dict) -> str | None:
    """The device without its vendor, and how many of them."""
    if facts["device"] is None:
        return None
    name = str(facts["device"]).removeprefix("NVIDIA ")
    name = "CPU" if name == "cpu" else name
    return f"{facts['num_devices']} x {name}" if (facts["num_devices"] or 1) > 1 else name


def distinct(values: Iterable) -> list:
    """Known values in order of appearance, each once; unhashable ones are compared by their JSON."""
    return list({json.dumps(v, sort_keys=True, default=str): v for v in values if v is not None}.values())


def own_of(run: dict) -> dict:
    """`extra['own']` of a run, or {}."""
    own = run["extra"].get("own") if isinstance(run["extra"], dict) else None
    return own if isinstance(own, dict) else {}


def extra_of(run: dict, key: str) -> Any:
    """A value that stands at the top of a record or in its `extra`; None if in neither."""
    if run.get(key) is not None:
        return run[key]
    return run["extra"].get(key) if isinstance(run["extra"], dict) else None


def runs_of(frame: "pd.DataFrame", kind: str) -> list[dict]:
    """The records of one kind as plain dicts, None for what is not known."""
    columns = [*records.FIELDS, *(c for c in frame.columns if c not in records.FIELDS)]
    frame = frame.reindex(columns=columns).astype(object)
    runs = frame.where(frame.notna(), None).to_dict("records")
    return [run for run in runs if run["kind"] == kind]


def train_groups(frame: "pd.DataFrame", *, ties: bool = True) -> list[Group]:
    """Training runs, grouped and ranked; `ties` False spares the paired test."""
    groups = [
        Group(facts, rank(_rows(runs))) for facts, runs in partition(runs_of(frame, "train"), TRAIN_KEY)
    ]
    _tell_apart(groups)
    for group in groups if ties else ():
        _give_letters(group)
    return groups


def partition(
    runs: list[dict],
    key: tuple[str, ...],
    fact: Callable[[dict, str], Any] = dict.__getitem__,
    *,
    loose: tuple[str, ...] = (),
) -> list[tuple[dict, list[dict]]]:
    """Runs by the facts they share. One that failed before it knew them, or lacks those of `loose`, joins
    the only group it fits.
    """
    groups: dict[tuple, list[dict]] = {}
    unsure: tuple[list, list] = ([], [])  # runs that ended well are placed first
    for run in runs:
        facts = tuple(fact(run, k) for k in key)
        failed = run["status"] != "ok"
        if any(f is None and (failed or k in loose) for k, f in zip(key, facts, strict=True)):
            unsure[failed].append((facts, run))
        else:
            groups.setdefault(facts, []).append(run)
    for failed, waiting in enumerate(unsure):
        free = [failed or k in loose for k in key]
        certain = list(groups)
        for facts, run in waiting:
            fitting = [
                group
                for group in certain
                if all(f == g or (f is None and any_) for f, g, any_ in zip(facts, group, free, strict=True))
            ]
            groups.setdefault(fitting[0] if len(fitting) == 1 else facts, []).append(run)
    tasks = list(TASK_TITLES)

    def order(facts: dict) -> tuple:
        place = tasks.index(facts["task"]) if facts["task"] in tasks else len(tasks)
        rest = [str(facts[k]) for k in key if k != "length"]
        return (place, facts["task"], str(facts["paper"]), facts.get("length") or 0, rest)

    named = [(dict(zip(key, facts, strict=True)), members) for facts, members in groups.items()]
    return sorted(named, key=lambda item: order(item[0]))


def _rows(runs: list[dict]) -> list[Row]:
    """One row per mechanism and configuration, labelled by what differs where a mechanism has several."""
    by_model: dict[str, dict[Any, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_model[run["model"]][run["config_hash"]].append(run)
    rows = []
    for model, configs in by_model.items():
        labels = _labels(model, list(configs.items()))
        rows += [Row(model, label, members) for label, members in zip(labels, configs.values(), strict=True)]
    return rows


def _labels(model: str, configs: list[tuple[Any, list[dict]]]) -> list[str]:
    if len(configs) == 1:
        return [model]
    described = []
    for _, runs in configs:
        own = next((own_of(run) for run in runs if own_of(run)), {})
        fields = {k: next((r[k] for r in runs if r[k] is not None), None) for k in SHOWN_DIFFERENCES}
        described.append((own, fields))
    lists = [fields["deviations"] or [] for _, fields in described]
    for _, fields in described:  # what all share tells none of them apart
        fields["deviations"] = [
            d for d in fields["deviations"] or [] if not all(d in other for other in lists)
        ]
    parts = differing([own for own, _ in described])  # it says more than the sizes it leads to
    if len({tuple(part) for part in parts}) < len(parts):
        sizes = differing([fields for _, fields in described])
        parts = [one + more for one, more in zip(parts, sizes, strict=True)]
    labels = [f"{model} ({', '.join(part)})" if part else model for part in parts]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} [{str(key)[:6]}]" for label, (key, _) in zip(labels, configs, strict=True)]


def differing(described: list[dict]) -> list[list[str]]:
    """For each dict, those of its values that not all have, as text."""
    parts: list[list[str]] = [[] for _ in described]
    for key in dict.fromkeys(key for one in described for key in one):
        values = [one.get(key) for one in described]
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1:
            for part, value in zip(parts, values, strict=True):
                part += [] if value in (None, []) else [value_text(key, value)]
    return parts


def value_text(key: str, value: Any) -> str:
    """`key=value` for a label or a note; lists and dicts as their parts."""
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return f"{key}={value}" if key != "deviations" else str(value)


def rank(rows: list[Row]) -> list[Row]:
    """Best accuracy first, then rows without one, then the floors."""

    def order(row: Row) -> tuple:
        mean = row.summary.mean
        return (row.mechanism in FLOORS, mean is None, -(mean or 0.0), row.label)

    return sorted(rows, key=order)


def _give_letters(group: Group) -> None:
    paired, size = [], None
    for row in group.rows:
        if len(row.ok) < 2:
            row.no_letters = "a second seed" if row.ok else None
        elif isinstance(row.correct, str):
            row.no_letters = row.correct
        elif size in (None, row.correct.shape[1]):
            size = row.correct.shape[1]
            paired.append(row)
        else:
            row.no_letters = "the other rows' test examples"
    if len(paired) < 2:
        return
    group.num_paired = size or 0
    correct = [row.correct for row in paired]
    found = stats.differences(correct)
    adjusted = stats.holm([difference.p_value for difference in found])
    for (a, b), test in zip(
        itertools.combinations(paired, 2), zip(found, adjusted.tolist(), strict=True), strict=True
    ):
        group.tests[a.label, b.label] = test
    for row, letter in zip(paired, stats.tie_letters(correct, adjusted=adjusted), strict=True):
        row.letters = letter


def _tell_apart(groups: list[Group]) -> None:
    """Adds to groups whose titles would read the same the facts in which they differ."""
    by_title: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        by_title[group.title()].append(group)
    for alike in (members for members in by_title.values() if len(members) > 1):
        for key in TRAIN_KEY:
            if len({g.facts[key] for g in alike}) > 1:
                for group in alike:
                    group.marks.append(f"{key} {group.facts[key]}")
