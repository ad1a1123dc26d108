"""What forbids a comparison that a table invites: unequal recipes, precisions, data, or sizes."""

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from lra.report.cells import si
from lra.report.groups import FLOORS, Group, Row, data_parts, distinct, own_of, recipe_title
from lra.report.measurements import SETTING
from lra.report.measurements import mode_of as mode_of_run
from lra.report.verdicts import CHANGED

HEAVIER = 1.1  # a row with more parameters than this times its baseline's gets a warning
WHAT_DIFFERS = {
    "recipe": ("paper", "recipe_version"),
    "selection rule": ("selection",),
    "precision": ("precision",),
    "data": ("data_variant", "data_origin", "data_hash"),
    "size": ("d_model", "num_layers"),
    "setting": SETTING,
}


def elsewhere(groups: list[Group], about: Iterable[str] = tuple(WHAT_DIFFERS)) -> list[list[str]]:
    """Per group, a warning if others have its task and length under another recipe, precision or data."""
    found = []
    for group in groups:
        differences = []
        for what, keys in ((what, WHAT_DIFFERS[what]) for what in about):
            mine = [group.facts.get(key) for key in keys]
            theirs = [
                [other.facts.get(key) for key in keys]
                for other in groups
                if all(other.facts.get(key) == group.facts.get(key) for key in ("task", "length"))
            ]
            others = distinct(values for values in theirs if values != mine)
            if others:
                differences.append(what + _named(what, others))
        under = ", another ".join(differences)
        text = f"other tables here have this task under another {under}: rank no rows across tables"
        found.append([text] if differences else [])
    return found


def _named(what: str, values: list[list]) -> str:
    """` (skyformer2021, fp32)`; what tells data, sizes and settings apart stands in their titles."""
    if what in ("data", "size", "setting"):
        return ""
    if what == "recipe":
        names = [recipe_title({"paper": paper, "recipe_version": version}) for paper, version in values]
        names = [name.removeprefix("recipe ") for name in names]
    else:
        names = [str(value) for (value,) in values]
    return f" ({', '.join(dict.fromkeys(names))})"


def unequal_settings(group: Group) -> list[str]:
    """A warning if rows of one table ran with different settings of the recipe."""
    changes = {row.label: _settings(row) for row in group.rows if row.ok}
    shared = set.intersection(*map(set, changes.values())) if changes else set()
    apart = {label: [d for d in own if d not in shared] for label, own in changes.items()}
    named = [f"{label} has {', '.join(own)}" for label, own in apart.items() if own]
    return [f"rows of different settings stand together: {_shorter(named, between='; ')}"] if named else []


def _settings(row: Row) -> list[str]:
    deviations = distinct(d for run in row.ok for d in run["deviations"] or [])
    return [re.sub(r" \(recipe: .*\)$", "", d) for d in deviations if CHANGED.match(d) and not _own(row, d)]


def _own(row: Row, deviation: str) -> bool:
    """Whether a setting is the mechanism's own parameter, by which rows are meant to differ."""
    name = deviation.partition("=")[0]
    return name.startswith("model.") and name.removeprefix("model.") in row.own


def heavier(rows: list[Row]) -> list[str]:
    """A warning if rows have over 10 % more parameters than their baseline: softmax, else the median row."""
    sizes = {row.label: row.mean("num_params") for row in rows if row.ok}
    known = {label: size for label, size in sizes.items() if size}
    plain = [row for row in rows if row.mechanism == "softmax" and row.label in known]
    if plain:
        base = min(plain, key=lambda row: len(row.own))
        against, limit = base.label, known[base.label]
    else:
        mixing = [known[row.label] for row in rows if row.label in known and row.mechanism not in FLOORS]
        if len(mixing) < 2:
            return []
        against, limit = "the median row", float(np.median(mixing))
    found = [
        f"{label} {si(size, ' ')} (+{100 * (size / limit - 1):,.0f} %)"
        for label, size in sorted(known.items(), key=lambda item: -item[1])
        if size > HEAVIER * limit
    ]
    if not found:
        return []
    return [f"more than 10 % more parameters than {against} ({si(limit, ' ')}): {_shorter(found)}"]


def heavier_by_place(places: Iterable[tuple[str, list[Row]]]) -> list[str]:
    """`heavier` for each column of a matrix or block of a list; the same warning once, with its places."""
    found: dict[str, list[str]] = defaultdict(list)
    places = list(places)
    for place, rows in places:
        for warning in heavier(rows):
            found[warning].append(place)
    return [text if len(places) == 1 else f"{', '.join(at)}: {text}" for text, at in found.items()]


def one_kernel(rows: list[Row]) -> list[str]:
    """A warning if softmax was measured with one of its two kernels only."""
    kernels = {_kernel(row) for row in rows if row.mechanism == "softmax"}
    if len(kernels) != 1:
        return []
    has, lacks = ("fused kernel", "math") if kernels == {"fused"} else ("explicit mathematics", "fused")
    return [f"softmax stands here as {has} only: measure model.kernel={lacks} too before quoting a speed-up"]


def kernels(rows: list[Row]) -> list[str]:
    """Which row of softmax is which, where both are there."""
    names = {"fused": "fused kernel", "math": "explicit mathematics"}
    found = {row.label: names.get(_kernel(row), _kernel(row)) for row in rows if row.mechanism == "softmax"}
    if len(set(found.values())) < 2:
        return []
    return ["; ".join(f"{label}: {kernel}" for label, kernel in found.items())]


def _kernel(row: Row) -> str:
    return str(own_of(row.runs[0]).get("kernel", "fused"))


def mixed_data(headings: list[str], bundle: list[Group]) -> list[str]:
    """A warning if two columns of a matrix have one task and length but different data."""
    at = defaultdict(list)
    for heading, group in zip(headings, bundle, strict=True):
        at[group.facts["task"], group.facts["length"]].append((heading, group))
    return [
        f"{', '.join(heading for heading, _ in columns)} hold different data: compare nothing across them"
        for columns in at.values()
        if len(columns) > 1
    ]


def _shorter(parts: list[str], most: int = 6, between: str = ", ") -> str:
    rest = len(parts) - most
    return between.join(parts[:most]) + (f" and {rest} more" if rest > 0 else "")


def mode_of(row: Row) -> str:
    """What a measurement measured: `train` or `infer`."""
    return mode_of_run(row.runs[0])


def data_named(headings: list[str], bundle: list[Group]) -> str:
    """Which data stand in which column of a matrix."""
    parts = [
        f"{heading} {', '.join(data_parts(group.facts)) or 'not on record'}"
        for heading, group in zip(headings, bundle, strict=True)
    ]
    return f"data: {'; '.join(parts)}"
