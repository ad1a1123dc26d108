"""`lra measure`: which cells a command line asks for, and one after the other with what ends them.

A cell is one mechanism at one length and batch size, trained or applied; `lra.measuring` measures it.
"""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, OmegaConf

from lra import environment, measuring, registry, tracking
from lra.assembly import choose_layout
from lra.config import RunConfig, compose, conf_dir, expand
from lra.errors import UserError, unknown
from lra.measuring import MODES, Cell
from lra.records import Busy, Record

DEFAULT_LENGTHS = "1024,4096"
NOT_ALONE = ("search", "hybrid")  # made of other mechanisms, which `model=all` has already


@dataclass(frozen=True)
class Event:
    """What a sweep of measurements tells whoever watches it: `begin` of a cell, `end` with its record, or
    `skip` with the reason.
    """

    kind: str
    cell: Cell
    record: Record | None = None
    reason: str = ""


class Watcher:
    """Hears of a sweep; this one stays silent."""

    def plan(self, cells: Sequence[Cell]) -> None:
        """The cells to come, in order."""

    def __call__(self, event: Event) -> None:
        """One thing that happened."""


def measure(
    overrides: Sequence[str],
    *,
    force: bool = False,
    shard: str | None = None,
    time_limit: float | None = None,
    watcher: Watcher | None = None,
) -> list[Record]:
    """One record per cell of the overrides, `mode=`, `tokens=` and `preset=` among them; done cells are only
    read.

    shard: `i/n`, the i-th of n processes that share the list (and LRA_RUNS); time_limit: seconds after which
    no further cell is begun. Cells that are left have no record.
    """
    if time_limit is not None and not time_limit > 0:
        raise UserError(f"--time-limit {time_limit:g} leaves no time; give seconds above 0")
    planned = dealt(cells(overrides), shard)
    watcher = watcher or Watcher()
    watcher.plan(planned)
    started = time.monotonic()  # the plan takes none of the time: even a small limit begins a cell
    lengths: dict[str, dict[int, str]] = defaultdict(dict)  # of one mechanism and mode: length -> status
    found = []
    for cell in planned:
        left = None if time_limit is None else time_limit - (time.monotonic() - started)
        record = None if force else measuring.done(cell)
        try:
            if record is None and left is not None and left <= 0:
                watcher(Event("skip", cell, reason="time limit"))
                continue
            if record is None:
                watcher(Event("begin", cell))
                record = measuring.measure_cell(cell, known=lengths[_apart(cell)], left=left, force=force)
        except Busy:
            watcher(Event("skip", cell, reason="another process measures it"))
            continue
        lengths[_apart(cell)][cell.config.length] = record.status
        found.append(record)
        watcher(Event("end", cell, record))
    return found


def cells(overrides: Sequence[str]) -> list[Cell]:
    """The cells that the overrides ask for, each checked before the first is measured."""
    found = [cell for one in spelt_out(overrides) for cell in _cells(one)]
    for device in {cell.config.train.device for cell in found}:
        environment.pick_device(device)
    ids = [(json.dumps(c.config.identity(), sort_keys=True), c.config.seed, c.mode) for c in found]
    if len(set(ids)) < len(ids):
        raise UserError("one cell is asked for twice; take the doubled value out of its list")
    return found


def dealt(planned: list[Cell], shard: str | None) -> list[Cell]:
    """The cells of one of several processes: mechanisms dealt in turn, each with its lengths and modes.

    A mechanism stays whole, so that each process has its share of long and short lengths, and knows which of
    a mechanism's lengths fitted.
    """
    if shard is None:
        return planned
    first, slash, count = shard.partition("/")
    valid = slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)
    if not valid:
        raise UserError(f"--shard {shard} is not a share; write i/n with i from 1 to n, as in 1/4")
    names = [json.dumps([cell.config.model.label, registry.changed(cell.config.model)]) for cell in planned]
    place = {name: index for index, name in enumerate(dict.fromkeys(names))}
    taken = [c for c, name in zip(planned, names, strict=True) if place[name] % int(count) == int(first) - 1]
    if not taken:
        raise UserError(f"--shard {shard} has nothing to do: there {_mechanisms(len(place))}; use fewer")
    return taken


def _mechanisms(count: int) -> str:
    return f"are {count} mechanisms" if count != 1 else "is 1 mechanism"


def presets() -> list[str]:
    return sorted(path.stem for path in (conf_dir() / "measure").glob("*.yaml"))


def measurable() -> list[str]:
    """What `model=all` stands for: every mechanism that needs no argument and is not made of others."""
    return [
        name
        for name in registry.names()
        if name not in NOT_ALONE
        and all(f.default != MISSING for f in dataclasses.fields(registry.own_schema(name)))
    ]


def _apart(cell: Cell) -> str:
    """What the lengths of one mechanism in one mode have in common, as text."""
    identity = {k: v for k, v in cell.config.identity().items() if k not in ("length", "batch_size")}
    batch = None if cell.tokens else cell.config.batch_size
    return json.dumps([identity, cell.mode, cell.tokens, batch], sort_keys=True)


def _key(override: str) -> str:
    return override.split("=", 1)[0]


def spelt_out(overrides: Sequence[str]) -> list[list[str]]:
    """The lists of overrides that a preset stands for, or the one given, `model=all` spelt out."""
    names = [o.split("=", 1)[1] for o in overrides if _key(o) == "preset" and "=" in o]
    rest = [o for o in overrides if _key(o) != "preset"]
    if not names:
        return [_spelt(rest)]
    if len(names) > 1 or names[0] not in presets():
        raise unknown("preset", ",".join(names), presets())
    if clash := [o for o in rest if _key(o) == "model"]:
        raise UserError(
            f"preset={names[0]} says which mechanisms are measured, and so does {clash[0]}; leave one away"
        )
    preset: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "measure" / f"{names[0]}.yaml"))
    given = {_key(o) for o in rest}
    given |= {"tokens", "batch_size"} if given & {"tokens", "batch_size"} else set()
    shared = [o for o in preset["overrides"] if _key(o) not in given]
    return [_spelt([*(o for o in one if _key(o) not in given), *shared, *rest]) for one in preset["models"]]


def _spelt(overrides: list[str]) -> list[str]:
    return [f"model={','.join(measurable())}" if o == "model=all" else o for o in overrides]


def _cells(overrides: Sequence[str]) -> list[Cell]:
    given = {_key(override): override.split("=", 1)[1] for override in overrides if "=" in override}
    modes = given.get("mode", "train").split(",")
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    if "seed" in given and len(expand([f"seed={given['seed']}"])) > 1:
        raise UserError("a measurement has no seeds to compare; give one seed or none")
    if "tokens" in given and "batch_size" in given:
        raise UserError("tokens= and batch_size= both fix the batch; give one of them")
    rest = [override for override in overrides if _key(override) not in ("mode", "tokens")]
    if "length" not in given:
        rest.append(f"length={DEFAULT_LENGTHS}")
    composed = _Composer()
    found = []
    for one in expand(rest):
        if "tokens" in given:
            length = dict(each.split("=", 1) for each in one)["length"]
            one = [*one, f"batch_size={_rows(given['tokens'], length)}"]
        config = composed(one)
        tokens = int(given["tokens"]) if "tokens" in given else None
        found += [Cell(config, mode, tokens) for mode in modes]
    return found


class _Composer:
    """`compose`, once per mechanism where its other lengths can differ in nothing but length and batch."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, ...], RunConfig] = {}

    def __call__(self, overrides: list[str]) -> RunConfig:
        sizes = {_key(o): o.split("=", 1)[1] for o in overrides if _key(o) in ("length", "batch_size")}
        others = tuple(o for o in overrides if _key(o) not in ("length", "batch_size"))
        whole = all(value.isdigit() and int(value) > 0 for value in sizes.values())
        if whole and others in self.made:
            numbers: dict[str, Any] = {key: int(value) for key, value in sizes.items()}
            return dataclasses.replace(self.made[others], overrides=tuple(overrides), **numbers)
        config = compose(overrides, any_length=True)
        choose_layout(config)
        tracking.check(config.tracker)
        if _plain(config):
            self.made[others] = config
        return config


def _plain(config: RunConfig) -> bool:
    """Whether no other setting is read together with the length or the batch size."""
    return (
        config.paper.name == "none"
        and config.task.padded_length is None
        and config.train.micro_batch is None
        and not config.model.target
    )


def _rows(tokens: str, length: str) -> int:
    if not length.isdigit() or int(length) < 1:
        raise UserError(f"length={length} is not a positive whole number")
    if not tokens.isdigit() or int(tokens) < 1:
        raise UserError(f"tokens={tokens} is not a positive whole number")
    if int(tokens) < int(length):
        raise UserError(f"tokens={tokens} is less than one row of length={length}; raise it")
    return int(tokens) // int(length)
