"""One run from its config to its record: data, folder, lock, status."""

import contextlib
import dataclasses
import gc
import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from lra import environment, parallel, records, registry, tracking, workbench
from lra.assembly import build_model, check_recompute, choose_layout, choose_step
from lra.config import RunConfig, compose
from lra.data.prepare import prepare
from lra.data.store import Store
from lra.errors import UserError, one_line
from lra.records import Record
from lra.stop import Stop, stop_requested
from lra.train import LAST, Diverged, Progress, Trainer

log = logging.getLogger(__name__)

FINAL = ("ok", "diverged", "unsupported")  # statuses that another try would only repeat


def check(config: RunConfig) -> None:
    """Raises UserError for what would only show when the run begins, as sizes that do not fit."""
    tracking.check(config.tracker)
    world = parallel.world()
    parallel.check_batch(config.batch_size, config.train.micro_batch, world)
    choose_layout(config)
    _, compiled, _ = choose_step(config, environment.pick_device(config.train.device), rows=1)
    vocab_size = config.task.vocab_size if config.task.input == "tokens" else None
    model = build_model(config, vocab_size=vocab_size)
    check_recompute(model, compiled=compiled)
    parallel.check_mechanism(model, world)


def prepared(config: RunConfig) -> Store:
    """The data of a run, built if they are not there yet; UserError if they cannot fill one batch."""
    store = prepare(config.task, config.length)
    rows = len(store.split("train"))
    if config.batch_size > rows:
        raise UserError(f"batch_size={config.batch_size} is larger than the {rows} training rows; lower it")
    return store


def folder_of(config: RunConfig, store: Store) -> Path:
    return records.runs_root() / config.run_id(store.data_hash)


def done(config: RunConfig, store: Store) -> Record | None:
    """The record of a run that need not be run again."""
    folder = folder_of(config, store)
    if not (folder / "record.json").is_file():
        return None
    record = records.read(folder)
    return record if record.status in FINAL else None


def execute(
    config: RunConfig,
    *,
    progress: Progress | None = None,
    force: bool = False,
    runs: int = 1,
    **labels: Any,
) -> Record:
    """Runs `config` to its end and writes its record; a run that is done already is only read.

    `runs`: how many of this process are likely to differ from this one in the seed alone. `labels` (command,
    sweep) go into the record as they are. UserError, Stop and Ctrl-C pass through; out of memory, divergence
    and any other error become the record's status.
    """
    started = time.perf_counter()
    store = prepared(config)
    data_s = time.perf_counter() - started
    parallel.start(config.train.device)
    folder = folder_of(config, store)
    with contextlib.ExitStack() as held:
        record = parallel.of_first(lambda: _begin(config, store, held, force=force))
        if record is not None:
            log.info("%s is done already (%s)", record.run_id, record.status)
            return record
        record = dataclasses.replace(describe(config, store), **labels)
        resumed = (folder / LAST).is_file()
        tracker = held.enter_context(tracking.start(config, record, folder, resumed=resumed))
        kernels = registry.load_models().fla_kernels
        try:
            with kernels.choices() as made:
                record = train(record, config, store, folder, progress, runs, on_line=tracker.line)
        finally:
            if parallel.world().size == 1:  # of several, each process makes one run and ends
                if record.status != "ok":
                    workbench.clear()
                release_memory()
        if package := kernels.taken(made):
            record = dataclasses.replace(record, extra={**record.extra, "recurrence_kernel": package})
        record = dataclasses.replace(record, data_s=data_s)
        if parallel.is_first():
            with stop_requested() as stop:  # torchrun sends a signal as soon as another process has failed
                record = tracker.end(record)
                records.write(record, folder)
            if stop.signal is not None:
                raise Stop(stop.signal)
        elif record.status not in FINAL:
            log.error("process %d: %s: %s", parallel.world().rank, record.status, record.reason)
    return record


def _begin(config: RunConfig, store: Store, held: contextlib.ExitStack, *, force: bool) -> Record | None:
    """Takes the run's folder, which `held` will let go of, and makes it ready; or the record of a run that is
    done already.
    """
    folder = folder_of(config, store)
    if not force and (record := done(config, store)) is not None:
        return record
    held.enter_context(_held(folder))
    # Another process may have ended it while this one waited to begin.
    if not force and (record := done(config, store)) is not None:
        return record
    records.archive(folder)
    if force:
        (folder / LAST).unlink(missing_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    return None


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The run folder, made, locked, and open to the log."""
    make_folder(folder)
    with records.lock(folder), log_to(folder / "log.txt"):
        yield


def train(
    record: Record,
    config: RunConfig,
    store: Store,
    folder: Path,
    progress: Progress | None,
    runs: int = 1,
    on_line: Progress | None = None,
) -> Record:
    """The record with what training measured, or with the status and reason of its failure."""
    trainer = None
    if config.task.black == "padding" and registry.traits(config.model).needs_prefix_mask:
        reason = f"{config.model.label} cannot mask single positions, which task.black=padding asks for"
        return dataclasses.replace(record, status="unsupported", reason=reason)
    try:
        trainer = Trainer(config, store, folder, progress=progress, on_line=on_line, runs=runs)
        device = trainer.device
        record = dataclasses.replace(
            record,
            num_params=sum(p.numel() for p in trainer.model.parameters()),
            state_size=trainer.model.mechanisms()[0].state_size(config.padded_length),
            device=environment.device_name(device),
            layout=trainer.layout,
        )
        measured = trainer.run()
        parallel.barrier()  # it is done where all processes are
        if findings := measured.pop("findings"):
            record = dataclasses.replace(record, extra={**record.extra, "findings": findings})
        found: dict[str, Any] = {"status": "ok", **measured}
    except Diverged as error:
        found = {"status": "diverged", "reason": str(error), "num_steps": trainer.state.step}
    except UserError:
        raise
    except Exception as error:
        if parallel.lost_another(error):
            found = {"status": "failed", "reason": "another process of this run failed"}
        elif environment.out_of_memory(error):
            found = {"status": "oom", "reason": one_line(error)}
        else:
            log.error("%s failed:\n%s", record.run_id, traceback.format_exc())
            found = {"status": "failed", "reason": one_line(f"{type(error).__name__}: {error}")}
    if trainer is not None:
        found |= trainer.how()
        found["extra"] = {**record.extra, **found["extra"]}
    return dataclasses.replace(record, **found)


def describe(config: RunConfig, store: Store) -> Record:
    """A record of what is known before the run starts."""
    return Record(
        kind="train",
        run_id=config.run_id(store.data_hash),
        status="failed",
        selection=config.train.selection,
        config_hash=config.config_hash(store.data_hash),
        data_hash=store.data_hash,
        data_origin=store.data_origin,
        data_variant=store.data_variant,
        extra={"own": registry.changed(config.model)},
        **conditions(config),
    )


def conditions(config: RunConfig) -> dict[str, Any]:
    """What the config and the environment say of a record, trained or measured."""
    backbone, paper = config.model.backbone, config.paper
    return {
        "task": config.task.name,
        "model": config.model.label,
        "paper": None if paper.name == "none" else paper.name,
        "recipe_version": paper.version or None,
        "deviations": list(config.deviations),
        "length": config.length,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "d_model": backbone.d_model,
        "num_layers": backbone.num_layers,
        "num_devices": parallel.world().size,
        "host": environment.host(),
        "precision": config.train.precision,
        "torch": torch.__version__,
        "versions": environment.versions(),
        "git_revision": environment.git_revision(),
    }


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder}: {error.strerror or error}; "
            "set LRA_RUNS to a folder you may write to"
        ) from error


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Everything that lra logs goes into the run's log.txt too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lra")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        handler.close()


def release_memory() -> None:
    """Gives the last run's memory back before the next one of the same process starts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure(overrides: tuple[str, ...], reason: str, **labels: Any) -> Record:
    """The record of a run that failed before, or with, its process."""
    config = compose(overrides)
    record = describe(config, prepare(config.task, config.length))
    return dataclasses.replace(record, status="failed", reason=reason, **labels)


def write_failure(record: Record) -> None:
    """Writes the record of a run whose process could not; never over one that ended well meanwhile."""
    folder = records.runs_root() / record.run_id
    make_folder(folder)
    with records.lock(folder):
        if not (folder / "record.json").is_file() or records.read(folder).status not in FINAL:
            records.write(record, folder)
