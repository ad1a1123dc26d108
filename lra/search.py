"""The verb `search`: which of several mixers should each layer be? Search, tell, train the answer again.

The weights come from self-attention between candidates (models/search.py, inspired by Hao and Zhu 2021):
mixers learn on training batches, the weights on validation batches. What is then trained again from a fresh
start, under the same recipe, is a `hybrid` of each layer's heaviest candidate. Its best step is then found on
validation rows too, as in every run; test rows take no part in either.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lra import run
from lra.config import compose, expand, parse
from lra.errors import UserError
from lra.launch import sweep
from lra.records import Record

ORIGIN = "inspired by Hao and Zhu 2021"
UNDECIDED = 0.02  # two weights that are no farther apart say nothing
SEARCH_ALONE = ("model", "model.candidates", "model.settings", "model.embedding_width", "train.arch_lr")


@dataclass(frozen=True)
class Found:
    """One search: the weights of each layer's candidates, and the runs around it.

    `again` is the run of the answer, `beside` those of each candidate alone.
    """

    record: Record
    again: tuple[Record, ...] = ()
    beside: tuple[Record, ...] = ()

    @property
    def weights(self) -> list[dict[str, float]]:
        """One dict per layer, candidate to weight; [] if the search did not end."""
        return (self.record.extra or {}).get("findings", [])

    @property
    def chosen(self) -> list[str]:
        """The heaviest candidate of each layer, the first of equals."""
        return [max(layer, key=layer.get) for layer in self.weights]

    @property
    def runs(self) -> list[Record]:
        return [self.record, *self.again, *self.beside]


def search(
    overrides: Sequence[str],
    *,
    beside: bool = False,
    force: bool = False,
    on_found: Callable[[Found], None] = lambda found: None,
) -> list[Found]:
    """One search for each combination of the comma lists, each followed by the training of its answer.

    With `beside` every candidate is trained alone too, under the same recipe and seed. `on_found` hears of
    each search with all its runs as they end.
    """
    asked = expand(overrides)
    if len({tuple(one) for one in asked}) < len(asked):
        raise UserError("the same search is asked for twice; take the doubled value out of its list")
    for one in asked:  # what is wrong with the last one should not cost the first
        run.check(compose(searching(one)))
        for name in _candidates(one):
            run.check(compose(retraining(one, [name])))
    found = []
    for one in asked:
        (record,) = sweep.train(searching(one), force=force)
        answer = Found(record)
        if record.status == "ok":
            again = sweep.train(retraining(one, answer.chosen), force=force)
            names = _candidates(one) if beside else []
            others = [made for name in names for made in sweep.train(retraining(one, [name]), force=force)]
            answer = Found(record, tuple(again), tuple(others))
        found.append(answer)
        on_found(answer)
    return found


def searching(overrides: Sequence[str]) -> list[str]:
    """The overrides of the search itself. Its last weights count: the best on validation rows would be chosen
    by the rows that train them.
    """
    given = {override.key_or_group: override for override in parse(overrides)}
    model, candidates = given.get("model"), given.get("model.candidates")
    if model is not None and model.value() != "search":
        raise UserError(
            f"lra search has a model of its own, got {model.input_line}; "
            "name what it may choose from: model.candidates=[softmax,linear,local]"
        )
    settings = given.get("model.settings")
    if candidates is not None and not _is_list_of_names(candidates.value()):
        raise UserError(
            f"{candidates.input_line} is no list of mixers; write model.candidates=[softmax,linear,local]"
        )
    if settings is not None and not isinstance(settings.value(), dict):
        raise UserError(
            f"{settings.input_line} is no mapping from mixers to settings; "
            "write model.settings={local:{window:16}}"
        )
    extra = [] if model is not None else ["model=search"]
    if "train.selection" not in given:
        extra.append("train.selection=last")
    return [*extra, *overrides]


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(name, list | dict) for name in value)


def _candidates(overrides: Sequence[str]) -> list[str]:
    return list(compose(searching(overrides)).model.own["candidates"])


def retraining(overrides: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The same recipe with `hybrid` of these mixers, one name for all layers or one each; they keep their
    settings. What a paper's recipe has for a single mechanism is used neither here nor in the search.
    """
    settings = {name: own for name, own in _settings(overrides).items() if name in chosen}
    again = [*_without_search(overrides), "model=hybrid", f"model.layers=[{','.join(chosen)}]"]
    return [*again, f"model.settings={_literal(settings)}"] if settings else again


def _settings(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    return compose(searching(overrides)).model.own["settings"]


def _without_search(overrides: Sequence[str]) -> list[str]:
    return [o.input_line for o in parse(overrides) if o.key_or_group not in SEARCH_ALONE]


def _literal(value: Any) -> str:
    """A value in the grammar of overrides: JSON without quotes around keys."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_literal(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_literal(v) for v in value) + "]"
    return json.dumps(value) if not isinstance(value, str) else value


def told(found: Found) -> str:
    """What a search found, as text: a line a layer, its candidates by weight, the heaviest named."""
    record = found.record
    title = f"{record.task} ({record.length:,} tokens), seed {record.seed}: search over mechanisms, {ORIGIN}"
    if record.status != "ok":
        return f"{title}\n  {record.status}: {record.reason}"
    lines = [title]
    for index, (weights, chosen) in enumerate(zip(found.weights, found.chosen, strict=True)):
        ranked = sorted(weights.items(), key=lambda item: -item[1])
        shares = "  ".join(f"{name} {100 * weight:.1f} %" for name, weight in ranked)
        doubt = ", undecided" if weights[ranked[0][0]] - weights[ranked[1][0]] < UNDECIDED else ""
        lines.append(f"  layer {index}: {chosen:<16} ({shares}{doubt})")
    return "\n".join(lines)
