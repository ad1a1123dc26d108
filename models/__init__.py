"""Sequence-mixing mechanisms, one file each; usable outside the harness through `models.build`."""

import importlib
import pkgutil

from models.common import Block, Mixer, Place, Traits, create, register, registered

__all__ = ["Block", "Mixer", "Place", "Traits", "build", "get", "names", "register"]


def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


_import_all()


def names() -> list[str]:
    """Every registered mechanism, sorted."""
    return sorted(registered())


def get(name: str) -> type[Mixer] | type[Block]:
    """The class registered under `name`; KeyError if there is none."""
    return registered()[name]


def build(name: str, place: Place, **own) -> Mixer | Block:
    """One mechanism at one place of a model; `own` are the keyword arguments of its constructor.

    Raises KeyError for an unknown name and TypeError for an argument the mechanism does not have.
    """
    return create(get(name), place, **own)
