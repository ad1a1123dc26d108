"""One training run: loop, evaluation, checkpoints, resume, record."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lra import checkpoint, cost, environment, records
from lra.architecture import ArchitectureStep
from lra.assembly import build_model, choose_layout
from lra.config import RunConfig
from lra.data.batch import Batch, Batches, decoding, token_sizes
from lra.data.store import Store
from lra.errors import UserError
from lra.schedule import Schedule
from lra.step import Step, choose_mode
from lra.stop import Stop, stop_requested

log = logging.getLogger(__name__)

WARMUP_STEPS = 10  # untimed steps after a start: kernels load, allocators settle
EVALUATIONS = 10  # a run, where the config does not say

LAST, BEST = (
    "checkpoint/last.pt",
    "checkpoint/best.pt",
)  # in a run's folder: all of the run; the chosen weights

Progress = Callable[[dict[str, Any]], None]


class Diverged(Exception):
    """The loss is no longer a number."""


@dataclass
class State:
    """What a run has done so far; goes into checkpoints whole."""

    step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    train_s: float = 0.0  # time of the timed steps
    timed_steps: int = 0
    timed_tokens: int = 0
    eval_s: float = 0.0
    wall_s: float = 0.0
    compile_s: float = 0.0
    lines: int = 0  # of metrics.jsonl
    schedule: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Builds a run from its config and folder, trains it to the end, and scores the chosen weights on
    test.
    """

    def __init__(
        self, config: RunConfig, store: Store, folder: Path, *, progress: Progress | None = None
    ) -> None:
        self.started = time.perf_counter()
        self.config, self.store, self.folder = config, store, folder
        self.progress = progress or (lambda event: None)
        train = config.train
        self.device = environment.pick_device(train.device)
        self.run_id = config.run_id(store.data_hash)
        self.layout = choose_layout(config)
        environment.set_precision(train.precision, deterministic=train.deterministic)
        environment.seed_everything(config.seed)
        tokens = config.task.input == "tokens"
        self.model = build_model(config, vocab_size=store.vocab_size if tokens else None).to(self.device)
        self.mode, why = choose_mode(train)
        log.info("step: %s (%s); layout: %s; device: %s", self.mode, why, self.layout, self.device)
        self.step = Step(self.model, train, self.device, self.mode)
        self.architecture = ArchitectureStep.of(self.step, config)
        self.schedule = Schedule(train)
        self.state = State()
        self.warmup_left = WARMUP_STEPS
        self.losses: list[Tensor] = []  # of the steps since the last line of metrics.jsonl
        self.batches = {split: self._batches(split) for split in ("train", "val", "test")}
        if self.architecture:
            self.batches["architecture"] = self._batches("val", config.batch_size)
            if not self.batches["architecture"].batches_per_epoch:
                raise UserError(
                    f"batch_size={config.batch_size} is larger than the {len(store.split('val'))} validation "
                    "rows that the search needs; lower it"
                )

    def _batches(self, split: str, size: int | None = None) -> Batches:
        config, rows = self.config, self.store.split(split)
        evaluated = config.train.eval_batch_size or config.batch_size
        size = size or (config.batch_size if split == "train" else evaluated)
        batches = Batches(
            rows,
            documents=config.task.documents,
            length=config.length,
            padded_length=config.padded_length,
            batch_size=size,
            device=self.device,
            packed=self.layout == "packed",
            seed=config.seed,
            **decoding(config.task),
        )
        if self.mode == "compiled" and self.layout == "packed" and not batches.full:
            rows_per_forward = min(size, config.train.micro_batch or size)
            batches.token_sizes = token_sizes(
                batches.lengths, rows_per_forward, config.task.documents, seed=config.seed
            )
        return batches

    def run(self) -> dict[str, Any]:
        """Trains, or goes on from the checkpoint; returns the measured fields of the record."""
        self._resume()
        measured = self._measure_cost() if self.state.step < self.config.train.num_steps else {}
        self._loop()
        return measured | self._finish()

    def _loop(self) -> None:
        train, state = self.config.train, self.state
        eval_every = train.eval_every or max(1, train.num_steps // EVALUATIONS)
        checkpoint_every = train.checkpoint_every or eval_every
        bad_step = torch.full((), -1, device=self.device)
        segment = _Segment(self)
        with stop_requested() as stop:
            while state.step < train.num_steps:
                if stop.signal is not None:
                    segment.close()
                    self._save()
                    raise Stop(stop.signal)
                self.model.train()
                self.model.training_update(state.step)
                parts = self.batches["train"].train(state.step, micro_batch=train.micro_batch)
                loss = self.step(
                    parts, lr=self.schedule.lr(state.step), beta1=self.schedule.beta1(state.step)
                )
                if self.architecture and state.step >= self.architecture.first:
                    held_out = self.batches["architecture"]
                    self.architecture(held_out.train(state.step, micro_batch=train.micro_batch))
                bad_step = torch.where((bad_step < 0) & ~torch.isfinite(loss), state.step, bad_step)
                self.losses.append(loss)
                state.step += 1
                segment.count(parts)
                last = state.step == train.num_steps
                if state.step % train.log_every == 0 or last:
                    self._log(bad_step)
                if state.step % eval_every == 0 or last:
                    segment.close()
                    self._raise_if_diverged(bad_step)
                    self._evaluate_and_keep()
                    segment = _Segment(self)
                if state.step % checkpoint_every == 0 or last:
                    segment.close()
                    self._save()
                    segment = _Segment(self)
            if stop.signal is not None:
                raise Stop(stop.signal)

    def _log(self, bad_step: Tensor) -> None:
        mean = torch.stack(self.losses).mean().item()
        self.losses = []
        self._raise_if_diverged(bad_step)
        self._write_line({"step": self.state.step, "loss": mean, "lr": self.schedule.lr(self.state.step - 1)})
        self._tell(loss=mean)

    def _raise_if_diverged(self, bad_step: Tensor) -> None:
        if (step := int(bad_step.item())) >= 0:
            raise Diverged(f"loss is not finite at step {step}")

    def _evaluate_and_keep(self) -> None:
        state, started = self.state, time.perf_counter()
        accuracy, loss, _ = self.evaluate("val")
        state.eval_s += time.perf_counter() - started
        self.schedule.observe(accuracy)
        self._write_line({"step": state.step, "val_accuracy": accuracy, "val_loss": loss})
        self._tell(val_accuracy=accuracy)
        if accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            if self.config.train.selection == "best_val":
                self._save_best()

    @torch.no_grad()
    def evaluate(self, split: str) -> tuple[float, float, np.ndarray]:
        """Accuracy, mean loss and predictions of the present weights on every example of a split, each
        once.
        """
        self.model.eval()
        batches = self.batches[split]
        predicted, total_loss = [], torch.zeros((), device=self.device, dtype=torch.float64)
        for batch in batches.in_order():
            logits = self.step.logits(batch)
            predicted.append(logits.argmax(-1))
            total_loss += torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").double()
        predictions = torch.cat(predicted)
        accuracy = (predictions == batches.labels).double().mean().item()
        return accuracy, (total_loss / batches.num_rows).item(), predictions.to(torch.uint8).cpu().numpy()

    def _measure_cost(self) -> dict[str, Any]:
        """FLOPs of a step and, on the CPU, its peak memory, from a copy of the model, on the first batch; not
        of a search, whose steps are two.
        """
        if self.architecture:
            return {}
        self.model.train()
        parts = self.batches["train"].train(0, micro_batch=self.config.train.micro_batch)
        trial = cost.Trial(self.step)
        found: dict[str, Any] = {"flops_per_step": trial.flops(parts)}
        if self.device.type == "cpu":
            found["peak_mem_mib"] = trial.cpu_peak_mib(parts)
        return found

    def _finish(self) -> dict[str, Any]:
        """Scores the selected weights on test and gathers what the run measured."""
        config, state = self.config, self.state
        peak = {}
        if self.device.type == "cuda":
            data_bytes = sum(b.device_bytes for b in self.batches.values())
            peak = {"peak_mem_mib": cost.cuda_peak_mib(self.device, data_bytes)}
        val_accuracy, best_step = state.best_accuracy, state.best_step
        if config.train.selection == "best_val":
            self.model.load_state_dict(checkpoint.load(self.folder / BEST, **self._owner())["model"])
        else:
            val_accuracy, best_step = self.evaluate("val")[0], state.step
        started = time.perf_counter()
        accuracy, _, predictions = self.evaluate("test")
        state.eval_s += time.perf_counter() - started
        test = self.batches["test"]
        labels = test.labels.cpu().numpy()
        records.save_predictions(self.folder, predictions, labels)
        per_step = state.train_s / state.timed_steps if state.timed_steps else None
        rows_per_s = 1 / per_step * config.batch_size if per_step else None
        return peak | {
            "test_accuracy": accuracy,
            "val_accuracy": val_accuracy,
            "best_step": best_step,
            "num_test": test.num_rows,
            "majority_accuracy": float(np.bincount(labels).max() / len(labels)),
            "accuracy_by_length": accuracy_by_length(
                predictions == labels, test.lengths, config.task.documents
            ),
            "num_steps": state.step,
            "step_ms": per_step and per_step * 1e3,
            "examples_per_s": rows_per_s,
            "tokens_per_s": state.timed_tokens / state.train_s if state.train_s else None,
            "padded_tokens_per_s": rows_per_s and rows_per_s * config.task.documents * config.padded_length,
            "train_s": state.train_s,
            "eval_s": state.eval_s,
            "wall_s": self.wall_s,
            "compile_s": state.compile_s,
            "reserved_mib": cost.reserved_mib(self.device),
            "findings": findings
            if any(findings := [m.findings() for m in self.model.mechanisms()])
            else None,
        }

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run, earlier tries that it goes on from included."""
        return self.state.wall_s + time.perf_counter() - self.started

    def _tell(self, **event: Any) -> None:
        self.progress(
            {
                "run_id": self.run_id,
                "step": self.state.step,
                "num_steps": self.config.train.num_steps,
                **event,
            }
        )

    def _write_line(self, line: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.state.lines += 1

    # Checkpoints: everything that the rest of the run depends on.

    def _owner(self) -> dict[str, Any]:
        """What a checkpoint must say to be read into this run."""
        return {"config_hash": self.config.config_hash(self.store.data_hash), "seed": self.config.seed}

    def _save_best(self) -> None:
        saved = {**self._owner(), "step": self.state.step, "model": self.model.state_dict()}
        checkpoint.save(saved, self.folder / BEST)

    def _save(self) -> None:
        self.state.schedule = self.schedule.state()
        cuda = self.device.type == "cuda"
        saved = {
            **self._owner(),
            "state": {**vars(self.state), "wall_s": self.wall_s},
            "losses": [loss.item() for loss in self.losses],
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "architecture": self.architecture and self.architecture.state_dict(),
            "cpu_random": torch.get_rng_state(),
            "gpu_random": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        checkpoint.save(saved, self.folder / LAST)

    def _resume(self) -> None:
        path, metrics = self.folder / LAST, self.folder / "metrics.jsonl"
        if not path.is_file():
            metrics.unlink(missing_ok=True)
            return
        saved = checkpoint.load(path, **self._owner())
        self.model.load_state_dict(saved["model"])
        self.step.optimizer.load_state_dict(saved["optimizer"])
        self.step.scaler.load_state_dict(saved["scaler"])
        if self.architecture:
            self.architecture.load_state_dict(saved["architecture"])
        self.state = State(**saved["state"])
        self.losses = [torch.tensor(loss, device=self.device) for loss in saved["losses"]]
        self.schedule = Schedule(self.config.train, **self.state.schedule)
        torch.set_rng_state(saved["cpu_random"].cpu())
        if saved["gpu_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["gpu_random"].cpu(), self.device)
        kept = metrics.read_text().splitlines(keepends=True)[: self.state.lines] if metrics.is_file() else []
        metrics.write_text("".join(kept))
        log.info("resumed %s at step %d", self.run_id, self.state.step)


class _Segment:
    """Times the steps between two interruptions, once the process is warm; synchronises only at its ends."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps = self.tokens = 0
        self.opened = time.perf_counter()
        self.started: float | None = None if trainer.warmup_left else self.opened

    def count(self, parts: list[Batch]) -> None:
        """Called after each step with its batch."""
        if self.started is not None:
            self.steps += 1
            self.tokens += sum(part.num_tokens for part in parts)
            return
        self.trainer.warmup_left -= 1
        if self.trainer.warmup_left == 0:
            self._book_compilation()
            self.started = time.perf_counter()
            cost.reset_peak(self.trainer.device)

    def close(self) -> None:
        if self.started is None:
            self._book_compilation()
            return
        environment.synchronize(self.trainer.device)
        state = self.trainer.state
        state.train_s += time.perf_counter() - self.started
        state.timed_steps += self.steps
        state.timed_tokens += self.tokens
        self.started = None

    def _book_compilation(self) -> None:
        """In compiled mode the untimed first steps are what compiling took."""
        environment.synchronize(self.trainer.device)
        if self.trainer.mode == "compiled":
            self.trainer.state.compile_s += time.perf_counter() - self.opened
        self.opened = time.perf_counter()


def accuracy_by_length(right: np.ndarray, lengths: np.ndarray, documents: int) -> dict[str, dict] | None:
    """Accuracy and count per quarter of the test rows by real length; None where all rows are equally
    long.
    """
    per_row = lengths.reshape(-1, documents).sum(1)
    edges = np.unique(np.quantile(per_row, [0, 0.25, 0.5, 0.75, 1]).round().astype(int))
    if len(edges) < 2:
        return None
    bucket = np.clip(np.searchsorted(edges, per_row, side="right") - 1, 0, len(edges) - 2)
    found = {}
    for index in range(len(edges) - 1):
        inside = bucket == index
        if inside.any():
            name = f"{edges[index]}-{edges[index + 1] - (index + 2 < len(edges))}"
            found[name] = {"accuracy": float(right[inside].mean()), "num": int(inside.sum())}
    return found
