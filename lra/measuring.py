"""Time and peak memory of one mechanism at one length, on full rows of made-up tokens; needs no data set.

Peak memory is told whole and in parts: weights; gradients and optimizer state; the rest, which is activations
and the workspaces of libraries. The data on the device are counted apart and are not in the whole. On a GPU
running out of memory is a result, with the largest length that fits; a CPU has no such end that could be
caught: the system kills the process, and only an allocation refused at once is a result.
"""

import dataclasses
import hashlib
import json
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lra import cost, environment, records, registry, tracking, workbench
from lra.assembly import build_model, choose_layout, choose_step, make_step
from lra.config import RunConfig, compose
from lra.data.batch import Batches, decoding
from lra.data.store import Split
from lra.errors import UserError, one_line
from lra.measuring_largest import largest_that_fits
from lra.measuring_rates import rates, seconds
from lra.records import Record
from lra.run import conditions, make_folder, release_memory
from lra.schema import semantic
from lra.step import Step

log = logging.getLogger(__name__)

MODES = ("train", "infer")
WARMUP_CALLS, WARMUP_SECONDS = 3, 3.0  # fewer calls where they take longer than this, compiling apart
MIN_CALLS, MIN_SECONDS = 10, 0.5  # a cell is timed at least this often and this long,
FEWEST_CALLS, MAX_SECONDS = 3, 10.0  # or only this often where that takes longer than this
SEARCH_SECONDS = 60.0  # for the largest length that fits
FINAL = ("ok", "oom", "unsupported")  # statuses that another try would only repeat


@dataclass(frozen=True)
class Cell:
    """One thing to measure; `tokens` fix its batch by its length where that was asked for."""

    config: RunConfig
    mode: str
    tokens: int | None = None

    def at(self, length: int) -> "Cell":
        """The same at another length, with the batch that belongs to it."""
        rest = [o for o in self.config.overrides if o.split("=", 1)[0] not in ("length", "batch_size")]
        rows = max(1, self.tokens // length) if self.tokens else self.config.batch_size
        config = compose([*rest, f"length={length}", f"batch_size={rows}"], any_length=True)
        return dataclasses.replace(self, config=config)


@dataclass
class Bench:
    """A cell made ready: its step, its batch, and the call that is measured."""

    step: Step
    batches: Batches
    plans: list
    whole: Any  # the plan of all rows
    call: Callable[[], object]
    why: str  # this step mode


def done(cell: Cell) -> Record | None:
    """The record of a cell that need not be measured again."""
    folder = _folder(_describe(cell))
    if not (folder / records.RECORD).is_file():
        return None
    record = records.read(folder)
    return record if record.status in FINAL else None


def measure_cell(
    cell: Cell, *, known: Mapping[int, str] | None = None, left: float | None = None, force: bool = False
) -> Record:
    """The record of one cell; out of memory, an unsupported length and a failure are results.

    known: status by length of what was measured of the same mechanism; left: seconds that a search for the
    largest length may take. Busy if another process measures the cell.
    """
    record = _describe(cell)
    folder = _folder(record)
    make_folder(folder)
    with records.lock(folder):
        found = None if force else done(cell)  # by a process that has just ended
        if found is not None:
            return found
        started = time.perf_counter()
        record = _outcome(cell, record)
        release_memory()
        if record.status == "oom":
            seconds_left = min(SEARCH_SECONDS, SEARCH_SECONDS if left is None else left)
            record.extra.update(_largest(cell, known or {}, seconds_left))
        record = dataclasses.replace(record, wall_s=time.perf_counter() - started)
        record = tracking.start(cell.config, record, folder).end(record)
        records.write(record, folder)
    return record


def _outcome(cell: Cell, record: Record) -> Record:
    try:
        kernels = registry.load_models().fla_kernels
        with kernels.choices() as made:
            found = _measure(cell)
        found["extra"] = record.extra | found["extra"]
        if package := kernels.taken(made):
            found["extra"]["recurrence_kernel"] = package
        return dataclasses.replace(record, status="ok", **found)
    except Exception as error:
        status = "oom" if environment.out_of_memory(error) else "failed"
        status = "unsupported" if isinstance(error, UserError) else status
        level = logging.ERROR if status == "failed" else logging.INFO
        log.log(level, "%s: %s\n%s", record.run_id, status, traceback.format_exc())
        reason = f"{type(error).__name__}: {error}" if status == "failed" else error
        return dataclasses.replace(record, status=status, reason=one_line(reason))


def _bench(cell: Cell) -> Bench:
    config, device = cell.config, environment.pick_device(cell.config.train.device)
    workbench.clear()
    environment.set_precision(config.train.precision, deterministic=config.train.deterministic)
    environment.seed_everything(config.seed)
    continuous = config.task.input == "continuous"
    model = build_model(config, vocab_size=None if continuous else config.task.vocab_size).to(device)
    tokens = config.batch_size * config.task.documents * config.length
    step_mode, compiled, why = choose_step(config, device, tokens)
    log.info("step: %s%s (%s)", step_mode, ", compiled" if compiled else "", why)
    step = make_step(config, model, device, step_mode, compiled=compiled)
    batches = made_up_batches(config, device)
    plans = batches.plans(0, micro_batch=config.train.micro_batch)
    whole = batches.plan(plans[0].rows if len(plans) == 1 else np.arange(config.batch_size))

    def train() -> None:
        step.train(batches, plans, lr=0.0)

    def infer() -> None:
        step.predict(batches, whole)

    return Bench(step, batches, plans, whole, train if cell.mode == "train" else infer, why)


def _measure(cell: Cell) -> dict[str, Any]:
    config, device = cell.config, environment.pick_device(cell.config.train.device)
    best = rates(device, config.train.precision)
    release_memory()
    bench = _bench(cell)
    step, model = bench.step, bench.step.model
    # Counted first: a captured step keeps the memory of its graphs, beside which a second one may not fit.
    flops = _flops(bench, cell.mode)
    release_memory()
    _warm(bench, device)
    cost.reset_peak(device)
    times = _time(bench.call, device)
    median = statistics.median(times)
    rows = config.batch_size
    found = {
        "num_params": sum(p.numel() for p in model.parameters()),
        "state_size": model.mechanisms()[0].state_size(config.padded_length),
        "step_ms": median * 1e3,
        "examples_per_s": rows / median,
        "tokens_per_s": rows * config.length * config.task.documents / median,
        "padded_tokens_per_s": rows * config.padded_length * config.task.documents / median,
        "compile_s": step.compile_s,
        "step_mode": step.mode,
        "flops_per_step": flops,
        "reserved_mib": cost.reserved_mib(device),
        "num_steps": len(times),
    }
    spread = np.percentile(times, [25, 75]) * 1e3
    extra = {"step_ms_quartiles": spread.tolist(), "compiled": step.compiled}
    extra["step_reason"] = "; ".join([bench.why, *step.notes])
    found["peak_mem_mib"], extra["peak_mem_method"], memory = _memory(bench, cell.mode, device)
    extra["memory_mib"] = memory
    extra |= dataclasses.asdict(best)
    moved = cost.moved_bytes_at_least(step, cell.mode, memory["activations"] * cost.MIB)
    extra["moved_bytes_at_least"] = moved
    extra["copy_share_at_least"] = moved / median / best.copy_bytes_per_s
    extra["matrix_share"] = None if flops is None else flops / median / best.matrix_flops_per_s
    return found | {"extra": extra}


def _flops(bench: Bench, mode: str) -> int | None:
    """Of the call that is measured; None where kernels hide them, or where what is counted, which runs
    neither compiled nor captured, does not fit in memory.
    """
    try:
        trial = cost.Trial(bench.step)
        if mode == "train":
            return trial.flops(bench.batches, bench.plans)
        return trial.forward_flops(bench.batches, bench.whole)
    except Exception as error:
        if not environment.out_of_memory(error):
            raise
        log.info("the operations of a step could not be counted: out of memory")
        return None


def _warm(bench: Bench, device: torch.device) -> None:
    started = time.perf_counter()
    for _ in range(WARMUP_CALLS):
        bench.call()
        environment.synchronize(device)
        if time.perf_counter() - started - bench.step.compile_s > WARMUP_SECONDS:
            break


def _time(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each call."""
    times: list[float] = []
    while not (
        (len(times) >= MIN_CALLS and sum(times) >= MIN_SECONDS)
        or (len(times) >= FEWEST_CALLS and sum(times) >= MAX_SECONDS)
    ):
        times.append(seconds(call, device))
    return times


def _memory(bench: Bench, mode: str, device: torch.device) -> tuple[float, str, dict[str, float]]:
    """Peak MiB of the call, how it was found, and its parts; `data` is not one of them."""
    step = bench.step
    resting = cost.optimizer_bytes(step)
    parts = {"weights": cost.weight_bytes(step), "optimizer": resting if mode == "train" else 0}
    data = bench.batches.source.device_bytes
    if device.type == "cuda":
        aside = data + (0 if mode == "train" else resting)
        peak, method = cost.cuda_peak_mib(device, aside, step), cost.CUDA_METHOD
    elif mode == "train":
        peak, method = cost.Trial(step).cpu_peak_mib(bench.batches, bench.plans), cost.CPU_METHOD
    else:
        live = cost.peak_bytes(bench.call)
        peak, method = (parts["weights"] + live) / cost.MIB, cost.CPU_INFER_METHOD
    memory = {name: size / cost.MIB for name, size in parts.items()}
    memory["activations"] = max(0.0, peak - sum(memory.values()))
    return peak, method, memory | {"data": data / cost.MIB}


def _largest(cell: Cell, known: Mapping[int, str], seconds_left: float) -> dict[str, Any]:
    """The largest length that is known to fit and the shortest known not to, beside a cell that did not fit.

    On a GPU lengths between what is known are tried. A CPU is not asked: memory that was promised may be
    missing when it is used, and then the system ends the process.
    """
    high = min([cell.config.length, *(n for n, status in known.items() if status == "oom")])
    low = max((n for n, status in known.items() if status == "ok" and n < high), default=0)
    if environment.pick_device(cell.config.train.device).type == "cuda":
        fitting, high = largest_that_fits(lambda n: _fits(cell.at(n)), low, high, seconds=seconds_left)
    else:
        fitting = low or None
    return {"largest_length": fitting, "shortest_oom_length": high}


def _fits(cell: Cell) -> bool:
    """Whether one call of a cell finds the memory it needs; what else goes wrong counts as no."""
    try:
        bench = _bench(cell)
        bench.call()
        environment.synchronize(bench.step.device)
        return True
    except Exception as error:
        if not environment.out_of_memory(error):
            log.warning("length %d, tried for whether it fits: %s", cell.config.length, one_line(error))
        return False
    finally:
        bench = None
        release_memory()


def made_up_batches(config: RunConfig, device: torch.device) -> Batches:
    """One batch of full rows of random ids or pixels, of exactly the length."""
    task, rows = config.task, config.batch_size
    sequences = rows * task.documents
    generator = np.random.Generator(np.random.Philox(key=[config.seed, 0]))
    pixels = task.input == "continuous" or task.stored == "pixels"
    ids = (1, 256) if pixels else (1, task.vocab_size)
    dtype = np.uint8 if ids[1] <= 256 else np.int16
    tokens = generator.integers(*ids, sequences * config.length).astype(dtype)
    offsets = np.arange(sequences + 1, dtype=np.int64) * config.length
    labels = generator.integers(0, task.num_classes, rows).astype(np.uint8)
    return Batches(
        Split("train", tokens, offsets, labels, task.documents),
        documents=task.documents,
        length=config.length,
        padded_length=config.length,
        batch_size=rows,
        device=device,
        packed=choose_layout(config) == "packed",
        seed=config.seed,
        **decoding(task),
    )


def _folder(record: Record):
    return records.runs_root() / "measure" / record.run_id


def _describe(cell: Cell) -> Record:
    config, mode = cell.config, cell.mode
    name = environment.device_name(environment.pick_device(config.train.device))
    what = [config.identity(), mode, name, torch.__version__]
    digest = _digest(what)
    around = [semantic(config.task), semantic(config.model.backbone), semantic(config.train)]
    extra = {"mode": mode, "own": registry.changed(config.model), "setting": _digest(around)}
    if cell.tokens:
        extra["tokens"] = cell.tokens
    return Record(
        kind="measure",
        run_id=f"measure-{config.model.label}-{config.length}-{mode}-{digest}",
        status="failed",
        device=name,
        layout=choose_layout(config),
        command=environment.command(),
        config_hash=digest,
        extra=extra,
        **conditions(config) | {"precision": _precision(config)},
    )


def _precision(config: RunConfig) -> str:
    """As it is computed: a CPU has no TF32 and multiplies float32 in full."""
    precision, device = config.train.precision, environment.pick_device(config.train.device)
    return "fp32" if precision == "tf32" and device.type == "cpu" else precision


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
