"""The command that repeats one run, out of the one that made it, which may have made a whole sweep."""

import dataclasses
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lra.errors import UserError
from lra.report.groups import extra_of, own_of

CONFIG = "config.yaml"
SIZES = ("task", "model", "length", "seed", "batch_size", "paper")
WHOLE = "the whole command that made this run, among others"


def repeat(run: dict, config: str | None = None) -> tuple[str, str]:
    """The command for this run alone, and what to know of it; `("", "")` where none is on record.

    `config` is the text of the run's config.yaml. A sweep of which it cannot be told which run was this one
    is given whole, and the second text says so.
    """
    typed = run["command"]
    if not isinstance(typed, str) or len(typed.split()) < 2:
        return "", ""
    verb, combinations, varied = _combinations(typed)
    if verb is None:
        return typed, "as it was typed; it may have made other runs too"
    known = _known(run, config)
    fitting = [one for one in combinations if _fits(one, known, varied)]
    if len(fitting) != 1:
        return typed, WHOLE
    given = dict(fitting[0])
    if verb == "measure":
        given |= {"model": run["model"]} if given.get("model") == "all" else {}
        given |= {key: str(known[key]) for key in ("length", "mode") if key not in given and key in known}
    words = ["lra", verb, *(f"{key}={value}" for key, value in given.items())]
    if verb == "train" and (run["num_devices"] or 1) > 1:
        words = ["torchrun", "--nproc-per-node", str(run["num_devices"]), "-m", *words]
    return shlex.join(words), ""


def config_of(run: dict) -> str | None:
    """The text of the config.yaml in the run's folder; None where there is none."""
    path = Path(run["path"]) / CONFIG
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


@cache
def _combinations(typed: str) -> tuple[str | None, list[dict[str, str]], set[str]]:
    """The verb, the overrides of each run of a command line, and the keys in which they differ; no verb where
    it reads as something else.
    """
    from lra.config import expand
    from lra.measure import spelt_out

    nothing: tuple[None, list[dict[str, str]], set[str]] = (None, [], set())
    try:
        program, verb, *words = shlex.split(typed)
    except ValueError:
        return nothing
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if program != "lra" or verb not in ("train", "measure"):
        return nothing
    try:
        sets = spelt_out(overrides) if verb == "measure" else [overrides]
        found = [dict(o.split("=", 1) for o in one) for each in sets for one in expand(each)]
    except UserError:  # a command of another version
        return nothing
    return verb, found, _varied(found)


def _varied(combinations: list[dict[str, str]]) -> set[str]:
    """The keys in which the runs of a command differ."""
    keys = {key for one in combinations for key in one}
    return {key for key in keys if len({one.get(key) for one in combinations}) > 1}


def _known(run: dict, config: str | None) -> dict[str, Any]:
    """What the run says of itself, by the names of overrides."""
    known = {key: run[key] for key in SIZES if run[key] is not None}
    known["paper"] = run["paper"] or "none"
    known |= {f"model.{key}": value for key, value in own_of(run).items()}
    if run["kind"] == "measure":
        known["mode"] = extra_of(run, "mode") or "train"
    values = _yaml(config or "")
    for group in ("task", "model", "train"):
        inner = values.get(group) if isinstance(values, dict) else None
        known |= {f"{group}.{key}": value for key, value in inner.items()} if isinstance(inner, dict) else {}
    return known


def _fits(given: dict[str, str], known: dict[str, Any], varied: set[str]) -> bool:
    """Whether nothing that is known of a run speaks against its being this one of a command's runs."""
    for key in varied:
        wanted = known.get(key, _default(known["model"], key))
        if wanted is not None and not _same(given.get(key), wanted, _default(known["model"], key)):
            return False
    return True


def _same(text: str | None, wanted: Any, default: Any) -> bool:
    if text is None:  # not given in this set of a preset
        return wanted == default
    return text == str(wanted) or _value(text) == wanted


@cache
def _value(text: str) -> Any:
    """What an override's text gives."""
    return _yaml(text)


def _yaml(text: str) -> Any:
    """What a text says as YAML; None where it is none."""
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return None


@cache
def _default(model: str, key: str) -> Any:
    """A mechanism's own default, which a record leaves out; None where it has none."""
    from lra import registry

    group, _, name = key.partition(".")
    if group != "model" or model not in registry.names():
        return None
    return next((f.default for f in dataclasses.fields(registry.own_schema(model)) if f.name == name), None)
