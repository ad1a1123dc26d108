"""From overrides to finished runs: expand, check everything first, prepare the data, skip what is done,
launch.
"""

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lra import environment, parallel, run, tracking
from lra.config import RunConfig, compose, expand
from lra.errors import Agreed, UserError
from lra.launch.display import Display
from lra.launch.local import Job, run_all, visible_gpus
from lra.records import Record

log = logging.getLogger(__name__)


def train(overrides: Sequence[str], *, multirun: bool = False, force: bool = False) -> list[Record]:
    """Runs one config, or with `multirun` every combination; returns their records in the order asked for.

    Every config is resolved before the first run starts, so that a typing error in one costs nothing.
    """
    configs = [compose(one) for one in expand(overrides)] if multirun else [compose(overrides)]
    if parallel.launched():
        if multirun:
            raise Agreed("torchrun starts one run over several processes; start a sweep without it")
        parallel.start(configs[0].train.device)
    checked = set()
    for config in configs:
        if (identity := json.dumps(config.identity(), sort_keys=True)) not in checked:
            run.check(config)
            checked.add(identity)
        if multirun and config.train.device.startswith("cuda:"):
            raise UserError(
                f"train.device={config.train.device} in a sweep, which gives every GPU its own process; "
                "choose GPUs with CUDA_VISIBLE_DEVICES"
            )
    if any(config.tracker != configs[0].tracker for config in configs):
        raise UserError(
            "the sweep varies a setting of the tracker, which is no part of what a run is; give tracker= and "
            "each tracker. setting one value"
        )
    labels = {"command": environment.command()}
    if multirun:
        labels["sweep"] = f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    if not multirun:
        return [_run_here(configs[0], force=force, labels=labels)]
    return _run_sweep(configs, force=force, labels=labels)


def _run_here(config: RunConfig, *, force: bool, labels: dict[str, Any]) -> Record:
    store = run.prepared(config)
    run_id = config.run_id(store.data_hash)
    if not parallel.is_first():
        return run.execute(config, force=force, **labels)
    with Display([Job(run_id, config.overrides)]) as display:
        display({"kind": "start", "run_id": run_id})
        record = run.execute(
            config, progress=lambda event: display({"kind": "progress", **event}), force=force, **labels
        )
        display({"kind": "end", "record": record})
    _tell(display.console, [record])
    return record


def _run_sweep(configs: list[RunConfig], *, force: bool, labels: dict[str, Any]) -> list[Record]:
    stores = {}
    for config in configs:
        key = config.task.folder_name(config.length)
        stores[key] = stores.get(key) or run.prepared(config)
    finished: dict[str, Record] = {}
    jobs: list[Job] = []
    order = []
    for config in configs:
        store = stores[config.task.folder_name(config.length)]
        run_id = config.run_id(store.data_hash)
        if run_id in order:
            raise UserError(
                f"the sweep asks twice for the same run {run_id}; take the doubled value out of the list"
            )
        order.append(run_id)
        record = None if force else run.done(config, store)
        if record is not None:
            finished[run_id] = record
        else:
            jobs.append(Job(run_id, config.overrides, labels, force))
    cells = Counter(job.cell for job in jobs)
    workers = max(1, min(len(visible_gpus()), len(jobs)))
    spread = max(1, workers // max(1, len(cells)))  # workers that are likely to share a cell
    jobs = [dataclasses.replace(job, runs=-(-cells[job.cell] // spread)) for job in jobs]
    console = Console(stderr=True)
    if finished:
        console.print(f"{len(finished)} of {len(order)} runs are done already", highlight=False)
    if jobs:
        made: list[Record] = []
        complete = False
        try:
            with Display(jobs, console=console) as display:
                run_all(jobs, on_event=lambda event: _hear(event, display, made))
            complete = True
        finally:  # also of a sweep that was stopped, with what has ended
            finished |= {record.run_id: record for record in made}
            ended = [finished[run_id] for run_id in order if run_id in finished]
            if made:
                tracking.end_sweep(configs[0].tracker, labels["sweep"], ended, interrupted=not complete)
            _tell(console, made, labels["sweep"])
        return ended
    return [finished[run_id] for run_id in order]


def _hear(event: dict[str, Any], display: Display, made: list[Record]) -> None:
    """Shows an event, and keeps the record of a run that has ended."""
    if event["kind"] == "end":
        made.append(event["record"])
    display(event)


def _tell(console: Console, made: list[Record], sweep: str | None = None) -> None:
    """Where to look for what was tracked."""
    if line := tracking.told(made, sweep):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
