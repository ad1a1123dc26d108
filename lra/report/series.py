"""Measurements by length: one series per mechanism, mode, setting and batch rule, ready to be compared."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lra.report.groups import extra_of, own_of, runs_of
from lra.report.measurements import MEASURE_KEY, mode_of, own_labels, parted, variant

if TYPE_CHECKING:
    import pandas as pd

IQR_OF_SD = 1.349  # the quartiles of a normal distribution lie so many standard deviations apart
# Full rows have no padding, so that the layout is no reason to keep mechanisms apart.
FACTS = tuple(key for key in MEASURE_KEY if key not in ("layout", "selection"))
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
    """One mechanism with its own parameters, in one mode and layout: its runs by length."""

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
    """The series of a frame of records, by what they can be compared under.

    A run stands under every batch rule that it satisfies and that its mechanism has two lengths of.
    """
    runs = [run for run in runs_of(frame, "measure") if run["length"] and run["batch_size"]]
    found = {}
    for facts, members in parted(runs, FACTS):
        for rule, chosen in _by_rule(members).items():
            found[Setting(tuple(facts.values()), rule)] = _series(chosen)
    return found


def _by_rule(runs: list[dict]) -> dict[Rule, list[dict]]:
    """The runs of each batch rule: those that were made for it, and those of other rules that satisfy it."""
    chosen = _rules(runs)
    found: dict[Rule, list[dict]] = {}
    for rule in dict.fromkeys(chosen):
        own = [run for run, made_for in zip(runs, chosen, strict=True) if made_for == rule]
        kinds = {_kind(run) for run in own}
        fitting = [
            run
            for run, made_for in zip(runs, chosen, strict=True)
            if made_for == rule or _satisfies(run, rule)
        ]
        lengths: dict[tuple, set[int]] = defaultdict(set)
        for run in fitting:
            lengths[_kind(run)].add(int(run["length"]))
        found[rule] = [run for run in fitting if _kind(run) in kinds or len(lengths[_kind(run)]) > 1]
    return found


def _satisfies(run: dict, rule: Rule) -> bool:
    kind, size = rule
    return int(run["batch_size"]) == (size if kind == "batch" else max(1, size // int(run["length"])))


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


def _kind(run: dict) -> tuple[tuple[str, str], str, str]:
    """Mechanism with own parameters, mode and layout."""
    return variant(run), mode_of(run), str(run["layout"])


def _series(runs: list[dict]) -> list[Series]:
    """A label tells the variants of a mechanism apart, where there are several."""
    labels = own_labels(runs)
    cells: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    layouts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in runs:
        cells[_kind(run)][int(run["length"])].append(run)
        layouts[variant(run)].add(str(run["layout"]))
    found = []
    for (which, mode, layout), by_length in cells.items():
        label = labels[which] + (f" [{layout}]" if len(layouts[which]) > 1 else "")
        own = own_of(next(iter(by_length.values()))[0])
        found.append(Series(which[0], label, mode, own, dict(by_length)))
    return found
