"""Measurements by length: one series per mechanism, mode, setting and batch rule, ready to be compared."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lra.report.groups import extra_of, own_of, runs_of, value_text

if TYPE_CHECKING:
    import pandas as pd

IQR_OF_SD = 1.349  # the quartiles of a normal distribution lie so many standard deviations apart
FACTS = ("task", "paper", "recipe_version", "precision", "device", "num_devices", "d_model", "num_layers")
NO_VALUE = (math.nan, math.nan)

Rule = tuple[str, int]  # ("tokens", N): about N tokens a batch at each length; ("batch", b): b rows


@dataclass(frozen=True)
class Setting:
    """What series must share to be compared: conditions, the model around the mechanism, the batch rule."""

    facts: tuple
    rule: Rule

    @property
    def batch_text(self) -> str:
        kind, size = self.rule
        return f"{size:,} tokens a batch" if kind == "tokens" else f"batch {size}"


@dataclass
class Series:
    """One mechanism in one mode: its runs by length. `variant` is its own parameters as text."""

    mechanism: str
    label: str
    mode: str
    own: dict
    cells: dict[int, list[dict]]

    def lengths(self) -> list[int]:
        return sorted(self.cells)

    def value(self, length: int, what: str) -> tuple[float, float]:
        """(cost, standard deviation of its logarithm) at a length; cost is inf where memory ran out, nan
        where nothing is known.

        The deviation is that of a single call, from the quartiles of the calls: calls of one cell share what
        differs between cells, so that their number does not make it smaller. Repeated cells count as one,
        with the larger of both spreads.
        """
        runs = self.cells.get(length, [])
        found = [(run, measured(run, what)) for run in runs if run["status"] == "ok"]
        values = [value for _, value in found if value]
        if not values:
            return (math.inf, 0.0) if any(run["status"] == "oom" for run in runs) else NO_VALUE
        spreads = [_spread(run) for run, value in found if value] if what == "step_ms" else [0.0]
        between = float(np.std(np.log(values), ddof=1)) if len(values) > 1 else 0.0
        return float(np.exp(np.mean(np.log(values)))), max(float(np.mean(spreads)), between)


def measured(run: dict, what: str) -> float | None:
    """A number of a record, or of the parts of its peak memory under `activations_mib`."""
    if what != "activations_mib":
        return run[what]
    parts = extra_of(run, "memory_mib")
    return parts.get("activations") if isinstance(parts, dict) else None


def _spread(run: dict) -> float:
    quartiles = extra_of(run, "step_ms_quartiles")
    if not (isinstance(quartiles, list) and len(quartiles) == 2 and min(quartiles) > 0):
        return 0.0
    return math.log(quartiles[1] / quartiles[0]) / IQR_OF_SD


def settings(frame: "pd.DataFrame") -> dict[Setting, list[Series]]:
    """The series of a frame of records, by what they can be compared under; in order of appearance."""
    runs = [run for run in runs_of(frame, "measure") if run["length"] and run["batch_size"]]
    by_facts: dict[tuple, list[dict]] = defaultdict(list)
    for run in runs:
        by_facts[(*(run[key] for key in FACTS), extra_of(run, "setting"))].append(run)
    found = {}
    for facts, members in by_facts.items():
        by_rule: dict[Rule, list[dict]] = defaultdict(list)
        for run, rule in zip(members, _rules(members), strict=True):
            by_rule[rule].append(run)
        for rule, chosen in by_rule.items():
            found[Setting(facts, rule)] = _series(chosen)
    return found


def _rules(runs: list[dict]) -> list[Rule]:
    """The batch rule of each run: the one it was asked for, else the one that most lengths of its mechanism
    and mode keep to.
    """
    lengths: dict[tuple[tuple, Rule], set[int]] = defaultdict(set)
    choices = []
    for run in runs:
        size, length = int(run["batch_size"]), int(run["length"])
        rules: tuple[Rule, Rule] = (
            ("batch", size),
            ("tokens", int(extra_of(run, "tokens") or size * length)),
        )
        choices.append((_kind(run), *rules))
        for rule in rules:
            lengths[_kind(run), rule].add(length)
    return [
        tokens if extra_of(run, "tokens") or len(lengths[kind, tokens]) > len(lengths[kind, batch]) else batch
        for run, (kind, batch, tokens) in zip(runs, choices, strict=True)
    ]


def _kind(run: dict) -> tuple[str, str, str]:
    """Mechanism, own parameters and mode."""
    return run["model"], json.dumps(own_of(run), sort_keys=True), str(extra_of(run, "mode") or "train")


def _series(runs: list[dict]) -> list[Series]:
    """A label tells the variants of a mechanism apart, where there are several."""
    by_model: dict[str, dict[str, dict]] = defaultdict(dict)
    for run in runs:
        by_model[run["model"]][_kind(run)[1]] = own_of(run)
    cells: dict[tuple[str, str, str], dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[_kind(run)][int(run["length"])].append(run)
    found = []
    for (model, key, mode), by_length in cells.items():
        own = by_model[model][key]
        parts = [value_text(name, value) for name, value in own.items()] if len(by_model[model]) > 1 else []
        label = f"{model} ({', '.join(parts)})" if parts else model
        found.append(Series(model, label, mode, own, dict(by_length)))
    return found
