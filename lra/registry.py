"""Names to mechanism classes. The only way into `models` from the harness.

`models` is the package that lies beside `lra`, in a clone and in an installed wheel alike. Importing `lra`
makes `import models` find it wherever lra is run; one that was imported before that is refused.
"""

import copy
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import MISSING

from lra import MODELS
from lra.errors import UserError, unknown
from lra.schema import BackboneConfig

REGISTERS = "\n@register("  # what the file of a mechanism has, and a file that mechanisms share has not


def load_models() -> ModuleType:
    """Our package `models`; UserError if another one of that name was imported first."""
    models = importlib.import_module("models")
    path = Path(getattr(models, "__file__", None) or "an unknown place").resolve()
    if path.parent != MODELS:
        raise UserError(
            f"another package called 'models' is already imported from {path}; lra needs {MODELS}. "
            "Start lra in a process that does not import the other one, or rename it"
        )
    return models


def names() -> list[str]:
    """Every mechanism in the repository, read from the files' text, so that listing them imports nothing."""
    return sorted(f.stem for f in MODELS.glob("*.py") if REGISTERS in f.read_text())


def get(name: str, target: str | None = None) -> type:
    """The class of mechanism `name`, or of `target` ("pkg.mod:Class" or "file.py:Class") for name
    'custom'.
    """
    models = load_models()
    if name == "custom":
        if not target:
            raise UserError("model=custom needs model.target=pkg.mod:Class, the mechanism to use")
        return load_target(target)
    if name not in models.names():
        raise unknown("model", name, [*models.names(), "custom"])
    return models.get(name)


def load_target(target: str) -> type:
    """A Mixer or Block class from outside the repository; the current folder is searched last."""
    models = load_models()
    path, _, class_name = target.partition(":")
    if not path or not class_name:
        raise UserError(f"target '{target}' is not of the form pkg.mod:Class (or file.py:Class)")
    try:
        module = _load_file(Path(path)) if path.endswith(".py") else _import_with_cwd(path)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(
            f"cannot import '{path}' of target '{target}': {error}; run lra where it can be imported"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = [n for n, v in vars(module).items() if isinstance(v, type)]
        raise unknown(f"class in {path}", class_name, classes)
    if not (isinstance(found, type) and issubclass(found, (models.Mixer, models.Block))):
        raise UserError(f"target '{target}' is not a subclass of models.Mixer or models.Block")
    return found


def _import_with_cwd(name: str) -> ModuleType:
    cwd = str(Path.cwd())
    if cwd not in sys.path:
        sys.path.append(cwd)
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"target file {path} does not exist")
    known = sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(path.resolve()):
            return known
        raise UserError(f"target file {path} has the name of a module that is imported already; rename it")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pickling and torch.compile look a class up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def source_hash(model) -> str:
    """12 hex digits of the file that a mechanism's class stands in: an edited mechanism is another one."""
    path = inspect.getsourcefile(get(model.name, model.target))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def build(model, place):
    """One mechanism of a `ModelConfig` at a place; it also gets the backbone settings that its constructor
    names.
    """
    cls = get(model.name, model.target)
    models = load_models()
    settings = {f.name: getattr(model.backbone, f.name) for f in dataclasses.fields(model.backbone)}
    settings["act_dropout"] = model.backbone.inner_dropout
    asked_for = models.common.own_parameters(cls)
    shared = {name: value for name, value in settings.items() if name in asked_for}
    try:
        return models.common.create(cls, place, **{**shared, **model.own})
    except ValueError as error:
        raise UserError(f"model '{model.name}': {error}") from error


def traits(model):
    """What the mechanism of a `ModelConfig` claims about itself, as its options make it."""
    models, backbone = load_models(), model.backbone
    with torch.random.fork_rng([]):
        return build(
            model,
            models.Place(
                d_model=backbone.d_model,
                num_heads=backbone.num_heads,
                max_len=1024,
                num_layers=backbone.num_layers,
                d_head=backbone.d_head,
            ),
        ).traits


def accepts(model) -> set[str]:
    """Every keyword argument the constructor of a `ModelConfig`'s mechanism takes."""
    cls = get(model.name, model.target)
    return set(load_models().common.own_parameters(cls))


def is_block(model) -> bool:
    """Whether the mechanism of a `ModelConfig` is a whole layer."""
    return issubclass(get(model.name, model.target), load_models().Block)


def own_schema(name: str, target: str | None = None) -> type:
    """A dataclass of the mechanism's own parameters, made from its constructor; backbone settings are left
    out.
    """
    backbone = {f.name for f in dataclasses.fields(BackboneConfig)}
    parameters = load_models().common.own_parameters(get(name, target))
    fields = []
    for parameter in parameters.values():
        if parameter.name in backbone:
            continue
        default = MISSING if parameter.default is parameter.empty else parameter.default
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        copied = isinstance(default, list | dict)
        value = dataclasses.field(default_factory=lambda d=default: copy.copy(d)) if copied else default
        fields.append((parameter.name, kind, value))
    return dataclasses.make_dataclass(f"{name}Parameters", fields)


def own_names(name: str, target: str | None = None) -> list[str]:
    return [f.name for f in dataclasses.fields(own_schema(name, target))]


def changed(model) -> dict[str, Any]:
    """The mechanism's own parameters that differ from their defaults, by name."""
    schema = own_schema(model.name, model.target)
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(schema)
    }
    return {name: value for name, value in model.own.items() if value != defaults[name]}
