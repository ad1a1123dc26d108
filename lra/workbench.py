"""What consecutive runs of a process can share: the data on the device, and a step that is compiled already.

Runs that differ in nothing but the seed train the same code on the same data. The second one puts its own
fresh weights where those of the first were, and goes on with its compiled code and its graphs.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lra import parallel
from lra.assembly import build_model, choose_step, make_step
from lra.backbone import Backbone
from lra.config import RunConfig
from lra.data.batch import token_sizes
from lra.data.source import Source, choose_source
from lra.data.store import SPLITS, Store
from lra.step import Step

# What nn.Module keeps for itself, in one dict each; parameters and buffers are compared as tensors.
OF_MODULE = {"training", "_parameters", "_buffers", "_modules"} | {
    name for name in vars(nn.Module()) if "hooks" in name
}


@dataclass
class Workbench:
    """A model, its step and its data; `source` None leaves each split to read its own memory map."""

    key: str
    model: Backbone
    step: Step
    source: Source | None
    token_sizes: tuple[int, ...]
    why: str  # this step mode
    where: str  # the data lie
    reused: bool = False


_last: Workbench | None = None


def of(config: RunConfig, store: Store, device: torch.device, layout: str, *, runs: int = 1) -> Workbench:
    """The workbench of a run, with the fresh weights of its seed: the last one's, if that was for the same
    cell and has something worth keeping, else a new one. `runs`: how many may share it.
    """
    global _last
    train = config.train
    key = [config.identity(), store.data_hash, str(device), layout, train.data, train.eval_batch_size]
    key = json.dumps(key)
    model = build_model(config, vocab_size=store.vocab_size if config.task.input == "tokens" else None)
    world = parallel.world()
    parallel.check_mechanism(model, world)
    if _last is not None and _last.key == key and adopt(_last.model, model):
        _last.step.reset()
        _last.reused = True
        return _last
    clear()
    splits = [store.split(name) for name in SPLITS]
    lengths = [np.minimum(split.lengths, config.length) for split in splits]
    rows_per_forward = _rows_per_forward(config, world)
    sizes = token_sizes(lengths, rows_per_forward, config.task.documents) if layout == "packed" else ()
    padded = rows_per_forward[0] * config.task.documents * config.padded_length
    typical = rows_per_forward[0] * config.task.documents * lengths[0].mean() if sizes else padded
    evaluated = config.evaluations * (len(splits[1]) / (train.eval_batch_size or config.batch_size))
    mode, compiled, why = choose_step(config, device, typical, evaluations=evaluated, runs=runs)
    most = max(rows_per_forward) * config.task.documents  # of any split: a search trains on validation rows
    largest = max(int(np.sort(split)[-most:].sum()) for split in lengths)
    source, where = choose_source(splits, device, how=config.train.data, largest_batch=largest)
    model = model.to(device)
    parallel.broadcast_([*model.parameters(), *model.buffers()])
    parallel.seed_apart(config.seed)
    step = make_step(config, model, device, mode, compiled=compiled)
    sizes = sizes if mode != "eager" else ()
    made = Workbench(key, model, step, source, sizes, why, where)
    if mode != "eager" and world.size == 1:
        _last = made
    return made


def clear() -> None:
    """Lets go of the last run's workbench and what it has on the device."""
    global _last
    _last = None
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and to import it takes a second
        sys.modules["torch._dynamo"].reset()


def adopt(model: nn.Module, fresh: nn.Module) -> bool:
    """Writes the tensors of `fresh`, a model of the same config and another seed, into those of `model`.

    False, and nothing is written, if the two differ in more than tensors: then `model` cannot stand for it.
    """
    mine, theirs = dict(_state(model)), dict(_state(fresh))
    same = mine.keys() == theirs.keys() and all(mine[n].shape == theirs[n].shape for n in mine)
    if not same or not _alike(_kept(model), _kept(fresh)):
        return False
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
    return True


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _kept(model: nn.Module) -> list[dict[str, Any]]:
    """What modules keep beside parameters and buffers."""
    return [
        {name: value for name, value in vars(module).items() if name not in OF_MODULE}
        for module in model.modules()
    ]


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal through and through; no for objects that cannot tell, as generators."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _rows_per_forward(config: RunConfig, world: parallel.World) -> list[int]:
    """Of the training, validation and test split, on one process."""
    train = config.train
    evaluated = train.eval_batch_size or config.batch_size
    trained = min(config.batch_size, train.micro_batch or config.batch_size)
    return [-(-trained // world.size), evaluated, evaluated]
