"""From command-line overrides to typed settings: the only place that sees a DictConfig.

`expand` turns comma lists into single runs, `compose` one list of overrides into a `RunConfig`. Overrides are
checked by name before Hydra sees them, so that a wrong one gets a message with the right ones.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lra import registry, tasks
from lra.errors import UserError, unknown
from lra.idle import refuse_idle_settings
from lra.schema import BackboneConfig, ModelConfig, PaperConfig, TrackerConfig, TrainConfig, check, semantic

GROUPS = ("task", "model", "paper", "train", "launcher", "tracker")
TOP_LEVEL = ("length", "seed", "batch_size")
EVALUATIONS = 10  # a run, where the config does not say


def conf_dir() -> Path:
    """Our configuration files: inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    return next(
        path for path in (package / "conf", package.parent / "conf") if (path / "config.yaml").is_file()
    )


def options(group: str) -> list[str]:
    """The choices of a configuration group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines one run, resolved."""

    task: Any  # lra.tasks.Task
    model: ModelConfig
    train: TrainConfig
    paper: PaperConfig
    length: int
    seed: int
    batch_size: int
    deviations: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    tracker: TrackerConfig = TrackerConfig()

    @property
    def padded_length(self) -> int:
        """What rows are padded to: the recipe's own padded length, else the length."""
        return self.task.padded_length or self.length

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations."""
        return self.train.eval_every or max(1, self.train.num_steps // EVALUATIONS)

    @property
    def evaluations(self) -> int:
        """How often a run is evaluated while it trains."""
        return -(-self.train.num_steps // self.eval_every)

    @cached_property
    def recipe_version(self) -> str:
        return f"{self.paper.name}@{self.paper.version}" if self.paper.name != "none" else "none"

    def identity(self) -> dict[str, Any]:
        """The semantic settings that differ from the defaults: what two runs must share to be the same
        run.
        """
        model = {"name": self.model.name, **semantic(self.model.backbone), **registry.changed(self.model)}
        if self.model.target:
            model |= {"target": self.model.target, "source": registry.source_hash(self.model)}
        return {
            "task": {"name": self.task.name, **semantic(self.task)},
            "model": model,
            "train": semantic(self.train),
            "length": self.length,
            "batch_size": self.batch_size,
        }

    def config_hash(self, data_hash: str) -> str:
        """12 hex digits that runs share exactly when they differ in nothing but the seed."""
        canonical = json.dumps(
            [self.identity(), data_hash, self.recipe_version], sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def run_id(self, data_hash: str) -> str:
        return f"{self.task.name}-{self.model.label}-{self.length}-s{self.seed}-{self.config_hash(data_hash)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for config.yaml."""
        return {
            "task": dataclasses.asdict(self.task),
            "model": {
                "name": self.model.name,
                "target": self.model.target,
                **dataclasses.asdict(self.model.backbone),
                **self.model.own,
            },
            "train": dataclasses.asdict(self.train),
            "paper": dataclasses.asdict(self.paper),
            "length": self.length,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "tracker": dataclasses.asdict(self.tracker),
        }


def parse(overrides: Iterable[str]) -> list[Override]:
    """Hydra's own grammar; UserError for what it cannot read."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(
                f"cannot read the override '{text}': write key=value, as in model.d_model=128"
            ) from error
        if override.is_delete():
            raise UserError(f"'{text}' would delete a setting; give it another value instead")
        parsed.append(override)
    return parsed


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """All combinations of the comma lists (and range(), choice()) in `overrides`, the last key varying
    fastest.
    """
    choices = []
    for override in parse(overrides):
        key = override.get_key_element()
        if override.is_sweep_override():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([f"{key}={override.get_value_element_as_str()}"])
    combinations = [list(combination) for combination in itertools.product(*choices)]
    if not combinations:
        raise UserError(f"{' '.join(overrides)} asks for no run: one of its lists is empty")
    return combinations


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="lra"):
            config: DictConfig = hydra_compose("config", overrides=list(overrides))
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot compose {' '.join(overrides)}: {' '.join(str(error).split())}") from error


def compose(overrides: Sequence[str], *, any_length: bool = False) -> RunConfig:
    """One run's settings; UserError names an unknown group choice, key or value and what is allowed.

    `any_length` lets a length pass that the task's data cannot have, for what needs no data.
    """
    parsed = parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"'{override.input_line}' lists several values; add -m to run them all")
    choices, values = _split(parsed)
    _check_paper(choices)
    if choices["paper"] != "none" and choices.get("train", "default") != "default":
        raise UserError(
            f"train={choices['train']} and paper={choices['paper']} both say how to train; give one of them, "
            "and single settings as train.KEY=value"
        )
    group_overrides = tuple(f"{group}={choice}" for group, choice in choices.items())
    recipe = _composed(group_overrides)
    target = next((o.value() for o in values if o.key_or_group == "model.target"), None)
    known = _known_keys(recipe["task"]["name"], recipe["model"]["name"], target)
    for override in values:
        key = override.key_or_group
        if key not in known:
            group = f"{key.partition('.')[0]}."
            raise unknown("setting", key, [name for name in known if name.startswith(group)] or known)
    forced = tuple(f"++{o.key_or_group}={o.get_value_element_as_str()}" for o in values)
    given = {o.key_or_group: o.value() for o in values}
    if "length" in given and given["length"] != recipe["length"] and "task.padded_length" not in given:
        forced += ("++task.padded_length=null",)  # a recipe's padded length belongs to the recipe's length
    raw = _composed(group_overrides + forced) if forced else recipe
    run = _resolve(raw, any_length)
    refuse_idle_settings(run, values)
    deviations = run.paper.deviations + [d.text for d in run.paper.task_deviations if d.holds(run.task)]
    if run.paper.name != "none":
        deviations += _differences(_resolve(recipe, any_length), run)
    return dataclasses.replace(run, deviations=tuple(deviations), overrides=tuple(overrides))


def _split(parsed: list[Override]) -> tuple[dict[str, str], list[Override]]:
    """Group choices (task=listops) and single values (model.d_model=64)."""
    choices, values = {"task": "listops", "model": "softmax", "paper": "none"}, []
    for override in parsed:
        key = override.key_or_group
        if override.package is not None:
            raise UserError(f"'{override.input_line}' names a package; write {key}=value")
        if key in GROUPS:
            choice = str(override.value())
            if choice not in options(key):
                raise unknown(key, choice, options(key))
            choices[key] = choice
        else:
            values.append(override)
    return choices, values


def _check_paper(choices: dict[str, str]) -> None:
    paper, task = choices["paper"], choices["task"]
    if paper == "none":
        return
    recipes = sorted(path.stem for path in (conf_dir() / "recipe" / paper).glob("*.yaml"))
    if task not in recipes:
        raise UserError(
            f"paper '{paper}' has no recipe for task '{task}'; it has: {', '.join(recipes) or 'none'}. "
            "Choose one of these, or leave paper= away"
        )


def _known_keys(task: str, model: str, target: str | None) -> list[str]:
    known = list(TOP_LEVEL)
    known += [f"task.{f.name}" for f in dataclasses.fields(tasks.get(task)) if f.name != "name"]
    known += [f"train.{f.name}" for f in dataclasses.fields(TrainConfig)]
    known += [f"tracker.{f.name}" for f in dataclasses.fields(TrackerConfig) if f.name != "name"]
    known += [f"model.{f.name}" for f in dataclasses.fields(BackboneConfig)]
    known += [f"model.{name}" for name in registry.own_names(model, target)]
    if model == "custom":
        known.append("model.target")
    return known


def _resolve(raw: dict[str, Any], any_length: bool) -> RunConfig:
    task_class = tasks.get(raw["task"]["name"])
    task = _typed(task_class, raw["task"], "task.")
    task.check()
    backbone_names = {f.name for f in dataclasses.fields(BackboneConfig)}
    model = dict(raw["model"])
    name, target = model.pop("name"), model.pop("target", None)
    backbone = _typed(BackboneConfig, {k: v for k, v in model.items() if k in backbone_names}, "model.")
    own = {k: v for k, v in model.items() if k not in backbone_names}
    schema = registry.own_schema(name, target)
    own = dataclasses.asdict(_typed(schema, own, "model."))
    length = task.default_length if raw["length"] is None else raw["length"]
    for key, value, low in (
        ("length", length, 1),
        ("batch_size", raw["batch_size"], 1),
        ("seed", raw["seed"], 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
            raise UserError(f"{key}={value} is not allowed; give a whole number of at least {low}")
    if not any_length:
        task.check_length(length)
    if task.padded_length is not None and task.padded_length < length:
        raise UserError(f"task.padded_length={task.padded_length} is shorter than length={length}; raise it")
    if backbone.cls_layer >= backbone.num_layers:
        raise UserError(
            f"model.cls_layer={backbone.cls_layer} of {backbone.num_layers} layers; -1 is the last"
        )
    if any(width < 1 for width in backbone.head_widths):
        raise UserError(f"model.head_widths={backbone.head_widths} has an empty layer; widths are at least 1")
    train = _typed(TrainConfig, raw["train"], "train.")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas={train.betas} is not allowed; give two numbers from 0 to below 1")
    return RunConfig(
        task=task,
        model=ModelConfig(name=name, target=target, own=own, backbone=backbone),
        train=train,
        paper=_typed(PaperConfig, raw["paper"], "paper."),
        length=length,
        seed=raw["seed"],
        batch_size=raw["batch_size"],
        tracker=_typed(TrackerConfig, raw["tracker"], "tracker."),
    )


def _typed(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """A dataclass from plain values; UserError for an unknown key, a wrong type, or a value out of bounds."""
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise unknown("setting", f"{prefix}{key}", [f"{prefix}{name}" for name in names])
    try:
        made = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        key = f"{prefix}{getattr(error, 'full_key', '') or ''}"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    check(made, prefix)
    return made


def _differences(recipe: RunConfig, run: RunConfig) -> list[str]:
    """What the command line changed against the recipe, as 'key=value (recipe: value)'."""
    before, after = _flat(recipe), _flat(run)
    return [
        f"{key}={after.get(key)} (recipe: {before.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(run: RunConfig) -> dict[str, Any]:
    flat = {"length": run.length, "batch_size": run.batch_size}
    for prefix, config in (("task", run.task), ("model", run.model.backbone), ("train", run.train)):
        semantic_names = [f.name for f in dataclasses.fields(config) if f.metadata.get("semantic", True)]
        flat |= {f"{prefix}.{name}": getattr(config, name) for name in semantic_names}
    return flat | {f"model.{name}": value for name, value in run.model.own.items()}


def paper(name: str) -> PaperConfig:
    """What conf/paper/<name>.yaml says."""
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "paper" / f"{name}.yaml"), resolve=True)
    return _typed(PaperConfig, values, "paper.")
