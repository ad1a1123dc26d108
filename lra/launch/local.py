"""The launcher of one machine: a worker process per visible GPU, or one on the CPU, each taking run after
run.

Runs share processes, so that imports and CUDA contexts are paid once; a worker that dies costs only the run
it had.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from lra.errors import UserError
from lra.records import Record
from lra.stop import Stop, terminate_as_stop

log = logging.getLogger(__name__)

GRACE_S = 60.0  # a stopped worker's time to write its checkpoint


@dataclass(frozen=True)
class Job:
    """One run to do: the overrides that define it, and the labels for its record."""

    run_id: str
    overrides: tuple[str, ...]
    labels: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    runs: int = 1  # of its cell, that its worker is likely to make

    @property
    def cell(self) -> str:
        """What runs share that differ in nothing but the seed: the last part of their ids."""
        return self.run_id.rpartition("-")[2]


@dataclass
class Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    device: str | None
    job: Job | None = None
    cell: str | None = None  # of its last job, whose compiled step it still has


def visible_gpus() -> list[str]:
    """The GPUs a worker may be given, as values of CUDA_VISIBLE_DEVICES."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def run_all(jobs: list[Job], *, on_event: Callable[[dict[str, Any]], None]) -> list[Record]:
    """Does every job and returns their records in the order they end; on_event hears of starts, steps and
    ends.

    A run that fails, or whose worker dies, does not stop the others. A UserError inside a run counts as
    failed.
    """
    waiting, records = deque(jobs), []
    devices: list[str | None] = list(visible_gpus()[: len(jobs)]) or [None]
    workers = [_start(device) for device in devices]
    with terminate_as_stop():
        try:
            for worker in workers:
                _assign(worker, waiting, workers, on_event)
            while busy := [worker for worker in workers if worker.job is not None]:
                for pipe in wait([worker.pipe for worker in busy]):
                    worker = next(worker for worker in busy if worker.pipe is pipe)
                    record = _hear(worker, on_event)
                    if record is not None:
                        records.append(record)
                        on_event({"kind": "end", "record": record})
                        _assign(worker, waiting, workers, on_event)
        except (KeyboardInterrupt, Stop):
            for worker in workers:
                if worker.process.is_alive():
                    os.kill(worker.process.pid, signal.SIGTERM)
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)  # for one that has just ended its run and waits for the next
            deadline = time.monotonic() + GRACE_S
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
            raise
        finally:
            for worker in workers:
                _dismiss(worker)
    return records


def _start(device: str | None) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), name=f"lra-worker-{device or 'cpu'}")
    with _environment("CUDA_VISIBLE_DEVICES", device):
        process.start()
    theirs.close()
    return Worker(process, ours, device)


def next_job(worker: Worker, waiting: deque[Job], workers: list[Worker]) -> Job | None:
    """The first job of the worker's own cell, else the first that no other worker is at, else the first."""
    busy = {other.cell for other in workers if other is not worker and other.job is not None}
    ranked = sorted(waiting, key=lambda job: 0 if job.cell == worker.cell else 1 + (job.cell in busy))
    if not ranked:
        return None
    waiting.remove(ranked[0])
    return ranked[0]


def _assign(
    worker: Worker,
    waiting: deque[Job],
    workers: list[Worker],
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    worker.job = next_job(worker, waiting, workers)
    if worker.job is None:
        return
    worker.cell = worker.job.cell
    if not worker.process.is_alive():
        fresh = _start(worker.device)
        worker.process, worker.pipe = fresh.process, fresh.pipe
    on_event({"kind": "start", "run_id": worker.job.run_id, "device": worker.device})
    worker.pipe.send(worker.job)


def _hear(worker: Worker, on_event: Callable[[dict[str, Any]], None]) -> Record | None:
    """One message of a worker: progress (None) or its run's record; a dead worker gives a record of its
    death.
    """
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(GRACE_S)
        code = worker.process.exitcode
        reason = (
            f"worker killed by signal {-code}"
            if code is not None and code < 0
            else f"worker exited with {code}"
        )
        return _write_failure(worker.job, reason)
    if isinstance(message, Record):
        return message
    if "error" in message:
        return _write_failure(worker.job, message["error"], busy=message["busy"])
    on_event({"kind": "progress", **message})
    return None


def _write_failure(job: Job, reason: str, *, busy: bool = False) -> Record:
    """The record of a run that could not write one itself; a run that another process works on gets none."""
    from lra import run

    record = run.failure(job.overrides, reason, **job.labels)
    if busy:
        return dataclasses.replace(record, status="interrupted")
    try:
        run.write_failure(record)
    except UserError as error:
        log.error("%s: its record could not be written: %s", record.run_id, error)
    return record


def _dismiss(worker: Worker) -> None:
    with contextlib.suppress(OSError, BrokenPipeError):
        worker.pipe.send(None)
    worker.process.join(5)
    if worker.process.is_alive():
        worker.process.terminate()
        worker.process.join(5)
    worker.pipe.close()


def _work(pipe: Connection) -> None:
    """A worker's life: take a job, run it, send its record; None or a closed pipe ends it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lra").setLevel(logging.INFO)
    logging.getLogger("lra").propagate = False  # into each run's log.txt, not over the parent's display
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks for an orderly end

    from lra import run
    from lra.config import compose
    from lra.locks import Busy

    with terminate_as_stop(), contextlib.suppress(Stop, EOFError, BrokenPipeError):
        while (job := pipe.recv()) is not None:
            try:
                config = compose(job.overrides)
                record = run.execute(config, progress=pipe.send, force=job.force, runs=job.runs, **job.labels)
            except UserError as error:
                pipe.send({"error": str(error), "busy": isinstance(error, Busy)})
            else:
                pipe.send(record)


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """A variable set for the child that is started inside."""
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
