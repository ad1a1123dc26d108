"""Where the time of a training step goes: from a plain PyTorch loop to a captured step on packed tokens.

Every rung trains the same model of a recipe on the same data, with its dropout, clipping, schedule and data
path; each adds one thing to the rung before it:

  plain      float32, explicit mathematics, eager, DataLoader, every row padded to the recipe's length with
             its mask, the loss read after each step, as loops do that log it
  precision  the recipe's own precision
  kernel     the fused kernels of the mechanism
  compiled   data on the card, no reading between steps, torch.compile
  captured   the whole step in a CUDA graph
  packed     no padding computed

On a CPU, which has no CUDA graphs, `captured` is unsupported and `packed` runs eagerly; every row says how it
ran.

usage: python scripts/bench_step.py [--tasks T,...] [--models M,...] [--rungs R,...] [-o FILE.jsonl]
       [--profile] [key=value ...]
       python scripts/bench_step.py --table FILE.jsonl ...
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lra import environment, run, workbench
from lra.assembly import build_model
from lra.config import RunConfig, compose
from lra.cost import MIB
from lra.data.batch import decoding
from lra.data.store import Store
from lra.errors import UserError, one_line
from lra.layout import Padded
from lra.schedule import Schedule
from lra.step import autocast
from lra.train import Trainer
from models import row_products

# b rows, s sequences, l padded length

RUNGS = ("plain", "precision", "kernel", "compiled", "captured", "packed")
TASKS = ("listops", "text", "image")
MODELS = ("softmax", "linear", "performer", "nystrom", "linformer", "luna")
WARMUP_STEPS = 12
WINDOWS, WINDOW_S, MOST_STEPS = 9, 0.15, 50  # each median is over so many windows, each so long


@dataclass
class Row:
    """One rung of one cell; times are of a training step in ms, the median of windows and their quartiles."""

    task: str
    model: str
    rung: str
    precision: str
    batch_size: int
    overrides: list[str] = field(default_factory=list)
    status: str = "ok"
    reason: str | None = None
    step_ms: float | None = None
    quartiles: list[float] | None = None
    step_mode: str | None = None  # how it ran, whatever was asked for
    compiled: bool | None = None
    compile_s: float | None = None
    peak_mib: float | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict = field(default_factory=dict)


class Rows(Dataset):
    """A split as a map-style data set gives it to a DataLoader: ids and label of one row."""

    def __init__(self, store: Store, config: RunConfig) -> None:
        self.split, self.length = store.split("train"), config.length

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[list[np.ndarray], int]:
        documents = [np.asarray(part[: self.length]) for part in self.split.row(index)]
        return documents, int(self.split.labels[index])


def collate(config: RunConfig) -> Callable:
    """Pads every document to the recipe's length: inputs [s l], mask [s l], labels [b]."""
    settings = decoding(config.task)

    def padded(rows: list) -> tuple[Tensor, Tensor, Tensor]:
        documents = [document for row, _ in rows for document in row]
        stored = torch.zeros(len(documents), config.padded_length, dtype=torch.int64)
        mask = torch.zeros(len(documents), config.padded_length, dtype=torch.bool)
        for place, document in enumerate(documents):
            stored[place, : len(document)] = torch.from_numpy(document.astype(np.int64))
            mask[place, : len(document)] = True
        if settings.get("scaling"):
            mean, std = settings["scaling"]
            inputs = ((stored.float() - mean) / std).unsqueeze(-1)
        else:
            inputs = stored + settings["id_offset"]
        return inputs, mask, torch.tensor([label for _, label in rows])

    return padded


def plain_steps(config: RunConfig, store: Store, device: torch.device) -> Iterator[None]:
    """The loop that most PyTorch code has: one training step for each `next`."""
    train = config.train
    for name in ("clip_value", "micro_batch"):
        if (value := getattr(train, name)) is not None:
            raise UserError(f"the plain loop has no train.{name}={value}; leave it or this rung away")
    model = build_model(config, vocab_size=store.vocab_size if config.task.input == "tokens" else None)
    model = model.to(device).train()
    optimizers = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        tags = getattr(parameter, "lr_scale", 1.0), getattr(parameter, "no_weight_decay", False)
        groups.setdefault(tags, []).append(parameter)
    optimizer = optimizers[train.optimizer](
        [
            {"params": tagged, "lr_scale": scale, "weight_decay": 0.0 if free else train.weight_decay}
            for (scale, free), tagged in groups.items()
        ],
        lr=train.lr,
        betas=tuple(train.betas),
        eps=train.eps,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16" and device.type == "cuda")
    schedule, step, losses = Schedule(train), 0, []
    workers = 4 if device.type == "cuda" else 0
    loader = DataLoader(
        Rows(store, config),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=collate(config),
        persistent_workers=workers > 0,
    )
    while True:
        for inputs, mask, labels in loader:
            inputs, mask, labels = (x.to(device, non_blocking=True) for x in (inputs, mask, labels))
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step) * group["lr_scale"]
                if (beta1 := schedule.beta1(step)) is not None:
                    group["betas"] = (beta1, train.betas[1])
            model.training_update(step)
            layout = Padded(len(inputs), config.padded_length, mask, device)
            optimizer.zero_grad(set_to_none=True)
            with autocast(train.precision, device):
                logits = model(inputs, layout)
            loss = F.cross_entropy(logits.float(), labels)
            extra = model.aux_loss()
            scaler.scale(loss if extra is None else loss + extra).backward()
            if train.clip_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            step += 1
            yield


def our_steps(config: RunConfig, store: Store, folder: Path) -> tuple[Iterator[None], Trainer]:
    """The steps that `lra train` takes, and the trainer they belong to."""
    trainer = Trainer(config, store, folder)
    batches = trainer.batches["train"]

    def steps() -> Iterator[None]:
        step = 0
        while True:
            trainer.model.training_update(step)
            plans = batches.plans(step, micro_batch=config.train.micro_batch)
            lr, beta1 = trainer.schedule.lr(step), trainer.schedule.beta1(step)
            trainer.step.train(batches, plans, lr=lr, beta1=beta1)
            step += 1
            yield

    return steps(), trainer


def settings_of(rung: str, model: str, device: torch.device) -> list[str]:
    """The overrides that make a rung of the recipe."""
    mode = {"compiled": "compiled", "captured": "captured", "packed": "captured"}.get(rung, "eager")
    settings = [f"train.layout={'packed' if rung == 'packed' else 'padded'}"]
    if rung == "packed" and device.type == "cpu":
        mode = "eager"
    settings.append(f"train.step_mode={mode}")
    settings += ["train.compile=true"] if mode == "captured" else []
    if rung == "plain":
        settings.append("train.precision=fp32")
    if model == "softmax":
        settings.append(f"model.kernel={'math' if rung in ('plain', 'precision') else 'fused'}")
    return settings


def config_of(task: str, model: str, rung: str, paper: str, overrides: list[str]) -> RunConfig:
    settings = settings_of(rung, model, environment.pick_device("auto"))
    return compose([f"task={task}", f"model={model}", f"paper={paper}", *settings, *overrides])


def measure(steps: Iterator[None], device: torch.device) -> tuple[float, list[float]]:
    """Median and quartiles of a step, in ms, each window timed from outside and synchronised."""
    for _ in range(WARMUP_STEPS if device.type == "cuda" else 2):
        next(steps)
    environment.synchronize(device)
    started = time.perf_counter()
    next(steps)
    environment.synchronize(device)
    per_window = max(1, min(MOST_STEPS, int(WINDOW_S / (time.perf_counter() - started))))
    times = []
    for _ in range(WINDOWS if device.type == "cuda" else 3):
        started = time.perf_counter()
        for _ in range(per_window):
            next(steps)
        environment.synchronize(device)
        times.append((time.perf_counter() - started) / per_window * 1e3)
    return statistics.median(times), np.percentile(times, [25, 75]).tolist()


def profile(steps: Iterator[None], row: Row, path: Path, *, count: int = 5, kernels: int = 40) -> None:
    """Adds to a file what the kernels of a step are and how long each takes, first all together."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            next(steps)
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found) / count
    launches = sum(event.count for event in found) / count
    lines = [
        f"{row.task} {row.model} {row.rung}: {total:.0f} us of kernels in {launches:.0f} launches a step"
    ]
    for event in found[:kernels]:
        time_us, calls = event.self_device_time_total / count, event.count / count
        lines.append(f"  {time_us:8.1f} us  {calls:5.1f} x  {event.key[:120]}")
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n\n")


def bench(
    task: str,
    model: str,
    rung: str,
    paper: str,
    overrides: list[str],
    folder: Path,
    profiles: Path | None = None,
) -> Row:
    """One rung of one cell; what fails is a result with a reason."""
    device = environment.pick_device("auto")
    config = config_of(task, model, rung, paper, overrides)
    row = Row(task, model, rung, config.train.precision, config.batch_size, list(overrides))
    try:
        store = run.prepared(config)
        environment.set_precision(config.train.precision, deterministic=False)
        environment.seed_everything(config.seed)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with row_products.kernels(rung not in ("plain", "precision")):
            if rung in ("plain", "precision", "kernel"):
                steps = plain_steps(config, store, device)
                row.step_mode, row.compiled = "eager", False
                row.step_ms, row.quartiles = measure(steps, device)
                peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
                row.peak_mib = peak and peak / MIB
            else:
                steps, trainer = our_steps(config, store, folder)
                row.step_ms, row.quartiles = measure(steps, device)
                step = trainer.step
                row.step_mode, row.compiled, row.notes = step.mode, step.compiled, step.notes
                row.compile_s = step.compile_s
                if device.type == "cuda":
                    peak = max(torch.cuda.max_memory_allocated(), step.peak_bytes or 0)
                    row.peak_mib = peak / MIB
            if profiles and device.type == "cuda":
                profile(steps, row, profiles)
    except UserError as error:
        row.status, row.reason = "unsupported", one_line(error)
    except Exception as error:
        row.status = "oom" if environment.out_of_memory(error) else "failed"
        row.reason = one_line(f"{type(error).__name__}: {error}")
    workbench.clear()
    run.release_memory()
    row.environment = {
        "device": environment.device_name(device),
        "torch": torch.__version__,
        "git_revision": environment.git_revision(),
    }
    return row


def table(rows: list[Row]) -> str:
    """One line a cell: ms per rung, and the last rung against the first; the geometric mean at the end."""
    rungs = [rung for rung in RUNGS if any(row.rung == rung for row in rows)]
    lines = [
        "| task | mechanism | " + " | ".join(rungs) + " | last / first |",
        "|" + "---|" * (len(rungs) + 3),
    ]
    gains = []
    for cell in dict.fromkeys((row.task, row.model, tuple(row.overrides)) for row in rows):
        mine = {row.rung: row for row in rows if (row.task, row.model, tuple(row.overrides)) == cell}
        gain = ""
        first, last = mine.get(rungs[0]), mine.get(rungs[-1])
        if first and last and first.step_ms and last.step_ms:
            gains.append(first.step_ms / last.step_ms)
            gain = f"{gains[-1]:.1f}"
        name = " ".join((cell[1], *cell[2]))
        lines.append(
            f"| {cell[0]} | {name} | " + " | ".join(_cell(mine.get(r)) for r in rungs) + f" | {gain} |"
        )
    if gains:
        mean = statistics.geometric_mean(gains)
        lines.append(f"\nGeometric mean of last / first over {len(gains)} cells: {mean:.1f}")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.step_ms is None:
        return row.status
    low, high = row.quartiles
    return f"{row.step_ms:.2f} ({low:.2f}-{high:.2f})"


def comma_list(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe, everywhere")
    for name, usual in (("tasks", TASKS), ("models", MODELS), ("rungs", RUNGS)):
        parser.add_argument(f"--{name}", type=comma_list, default=usual, help=f"of {','.join(usual)}")
    parser.add_argument("--paper", default="nystromformer2021")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds to begin rungs in")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE.jsonl", help="print rows made before")
    parser.add_argument(
        "--profile", action="store_true", help="write FILE.profiles.txt: kernels of each rung"
    )
    parser.add_argument("-o", "--output", type=Path, help="a .jsonl file that rows are added to")
    args = parser.parse_intermixed_args()
    if wrong := set(args.rungs) - set(RUNGS):
        parser.error(f"unknown rungs {', '.join(sorted(wrong))}; there are {', '.join(RUNGS)}")
    if args.table:
        try:
            lines = [line for path in args.table for line in path.read_text().splitlines()]
            rows = [Row(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"cannot read the rows of a table: {error}")
        print(table(rows))
        return 0
    try:  # before the first is measured
        for cell in itertools.product(args.tasks, args.models, args.rungs):
            config_of(*cell, args.paper, args.overrides)
    except UserError as error:
        parser.error(str(error))
    rows, started, left_out = [], time.perf_counter(), 0
    folder = Path(args.output or "bench_step").with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    profiles = folder.with_suffix(".profiles.txt") if args.profile else None
    for task in args.tasks:
        for model in args.models:
            for rung in args.rungs:
                if time.perf_counter() - started > args.time_limit:
                    left_out += 1
                    continue
                row = bench(task, model, rung, args.paper, args.overrides, folder, profiles)
                rows.append(row)
                print(f"{task} {model} {rung}: {_cell(row)} {row.reason or ''}", file=sys.stderr, flush=True)
                if args.output:
                    with open(args.output, "a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
    print(table(rows))
    if left_out:
        print(f"{left_out} rungs were not begun within {args.time_limit:.0f} s")
    return 1 if left_out or any(row.status != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
