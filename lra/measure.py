"""Time and peak memory of a mechanism at a length, on full rows of made-up tokens; needs no data set."""

import dataclasses
import hashlib
import json
import logging
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lra import cost, environment, records, registry, workbench
from lra.assembly import build_model, choose_layout, choose_step, make_step
from lra.config import RunConfig, compose, expand
from lra.data.batch import Batches, decoding
from lra.data.store import Split
from lra.errors import UserError, one_line, unknown
from lra.records import Record
from lra.run import conditions, make_folder, release_memory

log = logging.getLogger(__name__)

MODES = ("train", "infer")
WARMUP_CALLS = 3
MIN_CALLS, MIN_SECONDS = 10, 1.0  # a cell is timed at least this often and this long
DEFAULT_LENGTHS = "1024,4096"


def measure(overrides: Sequence[str], *, force: bool = False, on_record=lambda record: None) -> list[Record]:
    """One record per combination of the overrides, `mode=` and `tokens=` among them; done cells are only
    read.
    """
    records_made = []
    for cell in cells(overrides):
        record = measure_cell(*cell, force=force)
        on_record(record)
        records_made.append(record)
    return records_made


def cells(overrides: Sequence[str]) -> list[tuple[RunConfig, str]]:
    """The configs and modes that the overrides ask for, each checked before the first is measured."""
    given = {
        override.split("=", 1)[0]: override.split("=", 1)[1] for override in overrides if "=" in override
    }
    modes = given.get("mode", "train").split(",")
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    if "seed" in given and len(expand([f"seed={given['seed']}"])) > 1:
        raise UserError("a measurement has no seeds to compare; give one seed or none")
    if "tokens" in given and "batch_size" in given:
        raise UserError("tokens= and batch_size= both fix the batch; give one of them")
    rest = [override for override in overrides if override.split("=", 1)[0] not in ("mode", "tokens")]
    if "length" not in given:
        rest.append(f"length={DEFAULT_LENGTHS}")
    found = []
    for one in expand(rest):
        if "tokens" in given:
            length = dict(each.split("=", 1) for each in one)["length"]
            one = [*one, f"batch_size={_rows(given['tokens'], length)}"]
        config = compose(one, any_length=True)
        choose_layout(config)
        environment.pick_device(config.train.device)
        found += [(config, mode) for mode in modes]
    ids = [(json.dumps(config.identity(), sort_keys=True), config.seed, mode) for config, mode in found]
    if len(set(ids)) < len(ids):
        raise UserError("one cell is asked for twice; take the doubled value out of its list")
    return found


def _rows(tokens: str, length: str) -> int:
    if not length.isdigit() or int(length) < 1:
        raise UserError(f"length={length} is not a positive whole number")
    if not tokens.isdigit() or int(tokens) < 1:
        raise UserError(f"tokens={tokens} is not a positive whole number")
    if int(tokens) < int(length):
        raise UserError(f"tokens={tokens} is less than one row of length={length}; raise it")
    return int(tokens) // int(length)


def measure_cell(config: RunConfig, mode: str, *, force: bool = False) -> Record:
    """The record of one cell; out of memory, an unsupported length and a failure are results."""
    device = environment.pick_device(config.train.device)
    record = _describe(config, mode, device)
    folder = records.runs_root() / "measure" / record.run_id
    if not force and (folder / "record.json").is_file():
        return records.read(folder)
    make_folder(folder)
    with records.lock(folder):
        started = time.perf_counter()
        try:
            kernels = registry.load_models().fla_kernels
            with kernels.choices() as made:
                found = _measure(config, mode, device)
            if package := kernels.taken(made):
                found["extra"]["recurrence_kernel"] = package
            record = dataclasses.replace(record, status="ok", **found)
        except Exception as error:
            status = "oom" if environment.out_of_memory(error) else "failed"
            status = "unsupported" if isinstance(error, UserError) else status
            log.error("%s: %s\n%s", record.run_id, status, traceback.format_exc())
            reason = f"{type(error).__name__}: {error}" if status == "failed" else error
            record = dataclasses.replace(record, status=status, reason=one_line(reason))
        finally:
            release_memory()
        record = dataclasses.replace(record, wall_s=time.perf_counter() - started)
        records.write(record, folder)
    return record


def _measure(config: RunConfig, mode: str, device: torch.device) -> dict[str, Any]:
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

    # Counted first: a captured step keeps the memory of its graphs, beside which a second one may not fit.
    flops = cost.Trial(step).flops(batches, plans) if mode == "train" else None
    release_memory()
    call = train if mode == "train" else infer
    for _ in range(WARMUP_CALLS):
        call()
    environment.synchronize(device)
    cost.reset_peak(device)
    times = _time(call, device)
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
    extra = {"mode": mode, "own": registry.changed(config.model), "step_ms_quartiles": spread.tolist()}
    extra |= {"compiled": step.compiled, "step_reason": "; ".join([why, *step.notes])}
    if device.type == "cuda":
        aside = batches.source.device_bytes + (0 if mode == "train" else step.optimizer.num_bytes)
        found["peak_mem_mib"] = cost.cuda_peak_mib(device, aside, step)
        extra["peak_mem_method"] = cost.CUDA_METHOD
    elif mode == "train":
        found["peak_mem_mib"] = cost.Trial(step).cpu_peak_mib(batches, plans)
        extra["peak_mem_method"] = cost.CPU_METHOD
    else:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        found["peak_mem_mib"] = (weights + cost.peak_bytes(infer)) / cost.MIB
        extra["peak_mem_method"] = cost.CPU_INFER_METHOD
    found["extra"] = extra
    return found


def _time(call, device: torch.device) -> list[float]:
    """Seconds of each call, synchronised; GPU calls by device events, so that launch gaps of the host do not
    count twice but waiting for launches does."""
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < MIN_SECONDS:
        if device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            call()
            after.record()
            torch.cuda.synchronize(device)
            times.append(before.elapsed_time(after) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return times


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


def _describe(config: RunConfig, mode: str, device: torch.device) -> Record:
    name = environment.device_name(device)
    what = [config.identity(), mode, name, torch.__version__]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return Record(
        kind="measure",
        run_id=f"measure-{config.model.label}-{config.length}-{mode}-{digest}",
        status="failed",
        device=name,
        layout=choose_layout(config),
        command=environment.command(),
        config_hash=digest,
        extra={"mode": mode, "own": registry.changed(config.model)},
        **conditions(config),
    )
