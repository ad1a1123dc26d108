"""Mechanisms made of other mechanisms: how a mixer is made by name, and what several claim together."""

import dataclasses
from collections.abc import Mapping, Sequence

from models.common import Block, Mixer, Place, Traits, create, own_parameters, registered

ALL_OF = ("content_invariant", "length_invariant", "batch_invariant", "packed", "capturable")
TYPES = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}  # annotation -> what a setting may be
COMPOSITE = ("search", "hybrid")  # mechanisms that are made of others, and not of each other


def make(
    owner: str, name: str, place: Place, settings: Mapping[str, Mapping], backbone: Mapping[str, object]
) -> Mixer:
    """The mixer `name` with its own `settings[name]`; of the `backbone` settings it gets those that it takes.

    ValueError for a name that is unknown, a whole block or composite itself, and for what the mixer refuses.
    """
    simple = [n for n, c in registered().items() if not issubclass(c, Block) and n not in COMPOSITE]
    if name not in simple:
        known = "is no mixer of the standard block" if name in registered() else "is unknown"
        raise ValueError(f"{owner}: '{name}' {known}; choose from: {', '.join(sorted(simple))}")
    cls, own = registered()[name], settings.get(name, {})
    if not isinstance(own, Mapping):
        raise ValueError(f"{owner}: settings of '{name}' are {own!r}; write {{{name}: {{key: value}}}}")
    for key, value in own.items():
        wanted = TYPES.get(getattr(own_parameters(cls).get(key), "annotation", None))
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            kinds = " or ".join(kind.__name__ for kind in wanted)
            raise ValueError(f"{owner}: settings of '{name}': {key}={value!r} is no {kinds}")
    shared = {key: value for key, value in backbone.items() if key in own_parameters(cls)}
    try:
        return create(cls, place, **{**shared, **own})
    except TypeError as error:
        raise ValueError(f"{owner}: settings of '{name}': {error}") from error


def refuse_idle(owner: str, settings: Mapping[str, Mapping], names: Sequence[str]) -> None:
    """ValueError for settings of a mechanism that is not among `names`."""
    idle = sorted(set(settings) - set(names))
    if idle:
        raise ValueError(
            f"{owner}: settings for {', '.join(idle)}, which is not among its mechanisms: {', '.join(names)}"
        )


def joined(mixers: Mapping[str, Mixer]) -> Traits:
    """What a sum or a choice of mixers may claim: invariances that all have, exceptions that any has."""
    claims, because = {}, {}
    for field in dataclasses.fields(Traits):
        if field.name == "because":
            continue
        answers = {name: getattr(mixer.traits, field.name) for name, mixer in mixers.items()}
        claims[field.name] = (all if field.name in ALL_OF else any)(answers.values())
        unusual = [name for name, answer in answers.items() if answer != getattr(Traits(), field.name)]
        if claims[field.name] != getattr(Traits(), field.name):
            said = {name: mixers[name].traits.because.get(field.name) for name in unusual}
            because[field.name] = "; ".join(f"{name}: {reason}" for name, reason in said.items() if reason)
    return Traits(**claims, because=because)
