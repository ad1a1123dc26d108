"""One training run: loop, evaluation, checkpoints, resume, record."""

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lra import checkpoint, cost, environment, parallel, records, workbench
from lra.architecture import ArchitectureStep
from lra.assembly import choose_layout
from lra.config import RunConfig
from lra.data.batch import Batches, decoding
from lra.data.store import Store
from lra.errors import UserError
from lra.schedule import Schedule
from lra.scores import accuracy_by_length
from lra.segment import WARMUP_STEPS, Segment
from lra.stop import Stop, stop_requested

log = logging.getLogger(__name__)

# In a run's folder: all of the run, and the chosen weights.
LAST, BEST = "checkpoint/last.pt", "checkpoint/best.pt"

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
    compile_s: float = 0.0  # compiling and capturing
    lines: int = 0  # of metrics.jsonl
    schedule: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Builds a run from its config and folder, trains it to the end, and scores the chosen weights on
    test.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        folder: Path,
        *,
        progress: Progress | None = None,
        on_line: Progress | None = None,
        runs: int = 1,
    ) -> None:
        """`on_line` hears each line of metrics.jsonl. `runs`: how many runs of this process are likely to
        differ from this one in the seed alone.
        """
        self.started = time.perf_counter()
        self.config, self.store, self.folder = config, store, folder
        self.progress = progress or (lambda event: None)
        self.on_line = on_line or (lambda line: None)
        self.world = parallel.world()
        self.first = self.world.rank == 0  # of the processes of this run; it alone writes
        train = config.train
        parallel.check_batch(config.batch_size, train.micro_batch, self.world)
        self.device = environment.pick_device(train.device)
        self.run_id = config.run_id(store.data_hash)
        self.layout = choose_layout(config)
        environment.set_precision(train.precision, deterministic=train.deterministic)
        environment.seed_everything(config.seed)
        bench = workbench.of(config, store, self.device, self.layout, runs=runs)
        self.bench, self.step, self.model = bench, bench.step, bench.model
        self.mode = self.step.mode
        log.info(
            "step: %s%s (%s); layout: %s; device: %s; data: %s%s%s",
            self.mode,
            ", compiled" if self.step.compiled and self.mode == "captured" else "",
            bench.why,
            self.layout,
            self.device,
            bench.where,
            "; goes on with the step of the run before" if bench.reused else "",
            "".join(f", which {note}" for note in self.step.notes),
        )
        self.compiled_before = self.step.compile_s
        self.architecture = ArchitectureStep.of(self.step, config)
        self.schedule = Schedule(train)
        self.state = State()
        self.warmup_left = WARMUP_STEPS
        self.batches = {split: self._batches(split) for split in ("train", "val", "test")}
        if self.architecture:
            self.batches["architecture"] = self._batches("val", config.batch_size)
            if not self.batches["architecture"].batches_per_epoch:
                raise UserError(
                    f"batch_size={config.batch_size} is larger than the {len(store.split('val'))} validation "
                    "rows that the search needs; lower it"
                )

    def _batches(self, split: str, size: int | None = None) -> Batches:
        config = self.config
        evaluated = config.train.eval_batch_size or config.batch_size
        return Batches(
            self.store.split(split),
            documents=config.task.documents,
            length=config.length,
            padded_length=config.padded_length,
            batch_size=size or (config.batch_size if split == "train" else evaluated),
            device=self.device,
            packed=self.layout == "packed",
            seed=config.seed,
            token_sizes=self.bench.token_sizes,
            source=self.bench.source,
            world=self.world,
            **decoding(config.task),
        )

    def run(self) -> dict[str, Any]:
        """Trains, or goes on from the checkpoint; returns the measured fields of the record."""
        self._resume()
        measured = self._measure_cost() if self.state.step < self.config.train.num_steps else {}
        self._loop()
        return measured | self._finish()

    def _loop(self) -> None:
        train, state = self.config.train, self.state
        eval_every = self.config.eval_every
        checkpoint_every = train.checkpoint_every or eval_every
        segment = Segment(self)
        asked = parallel.Agreement(state.step)
        with stop_requested() as stop:
            while state.step < train.num_steps:
                if asked(stop.signal is not None, state.step):
                    segment.close()
                    self._save()
                    raise Stop(stop.signal or signal.SIGTERM)
                self.model.training_update(state.step)
                plans = self.batches["train"].plans(state.step, micro_batch=train.micro_batch)
                self.step.train(
                    self.batches["train"],
                    plans,
                    lr=self.schedule.lr(state.step),
                    beta1=self.schedule.beta1(state.step),
                )
                if self.architecture and state.step >= self.architecture.first:
                    held_out = self.batches["architecture"]
                    self.architecture(held_out, held_out.plans(state.step, micro_batch=train.micro_batch))
                state.step += 1
                segment.count(plans)
                last = state.step == train.num_steps
                if state.step % train.log_every == 0 or last:
                    self._log()
                if state.step % eval_every == 0 or last:
                    segment.close()
                    self._raise_if_diverged(self.step.first_bad())
                    self._evaluate_and_keep()
                    segment = Segment(self)
                if state.step % checkpoint_every == 0 or last:
                    segment.close()
                    self._save()
                    segment = Segment(self)
            if asked(stop.signal is not None, state.step, now=True):
                raise Stop(stop.signal or signal.SIGTERM)

    def _log(self) -> None:
        mean, bad = self.step.read()
        self._raise_if_diverged(bad)
        self._write_line({"step": self.state.step, "loss": mean, "lr": self.schedule.lr(self.state.step - 1)})
        self._tell(loss=mean)

    def _raise_if_diverged(self, step: int | None) -> None:
        if step is not None:
            raise Diverged(f"loss is not finite at step {step}")

    def _evaluate_and_keep(self) -> None:
        state = self.state
        parallel.check_equal(self.model)
        accuracy, loss, _ = self.evaluate("val")
        self.schedule.observe(accuracy)
        self._write_line({"step": state.step, "val_accuracy": accuracy, "val_loss": loss})
        self._tell(val_accuracy=accuracy)
        if accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            if self.config.train.selection == "best_val":
                self._save_best()

    def evaluate(self, split: str) -> tuple[float, float, np.ndarray]:
        """Accuracy, mean loss and predictions of the present weights on every example of a split, each
        once. Waits for the device at the end alone.
        """
        started, compiled_before = time.perf_counter(), self.step.compile_s
        batches = self.batches[split]
        counts = [len(part) for part in parallel.shares(np.arange(batches.num_rows), self.world)]
        predictions = torch.empty(counts[self.world.rank], dtype=torch.int64, device=self.device)
        total_loss = torch.zeros((), device=self.device, dtype=torch.float64)
        done = 0
        for plan in batches.plans_in_order():
            predicted, loss = self.step.predict(batches, plan)
            predictions[done : done + len(predicted)] = predicted
            total_loss += loss
            done += len(predicted)
        predictions = parallel.gather_rows(predictions, counts)
        parallel.sum_(total_loss)
        accuracy = (predictions == batches.device_labels).double().mean()
        accuracy, mean_loss = torch.stack([accuracy, total_loss / batches.num_rows]).tolist()
        compiling = self.step.compile_s - compiled_before  # counts as that
        self.state.eval_s += time.perf_counter() - started - compiling
        return accuracy, mean_loss, predictions.to(torch.uint8).cpu().numpy()

    def _measure_cost(self) -> dict[str, Any]:
        """FLOPs of a step and, on the CPU, its peak memory, from a copy of the model, on the first batch; not
        of a search, whose steps are two.
        """
        if self.architecture:
            return {}
        batches = self.batches["train"]
        plans = batches.plans(0, micro_batch=self.config.train.micro_batch)
        trial = cost.Trial(self.step)
        flops = trial.flops(batches, plans)
        if flops is not None:
            flops = int(parallel.sum_(torch.tensor(flops)))
        found: dict[str, Any] = {"flops_per_step": flops}
        if self.device.type == "cpu":
            found["peak_mem_mib"] = parallel.largest(trial.cpu_peak_mib(batches, plans))
        return found

    def _finish(self) -> dict[str, Any]:
        """Scores the selected weights on test and gathers what the run measured."""
        config, state = self.config, self.state
        peak = {}
        if self.device.type == "cuda":
            sources = {id(b.source): b.source for b in self.batches.values()}
            data_bytes = sum(source.device_bytes for source in sources.values())
            peak_mib = cost.cuda_peak_mib(self.device, data_bytes, self.step)
            peak = {"peak_mem_mib": parallel.largest(peak_mib)}
        val_accuracy, best_step = state.best_accuracy, state.best_step
        if config.train.selection == "best_val":
            self.model.load_state_dict(checkpoint.load(self.folder / BEST, **self._owner())["model"])
        else:
            val_accuracy, best_step = self.evaluate("val")[0], state.step
        accuracy, _, predictions = self.evaluate("test")
        test = self.batches["test"]
        labels = test.labels
        if self.first:
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
            "reserved_mib": cost.reserved_mib(self.device),
            "findings": findings
            if any(findings := [m.findings() for m in self.model.mechanisms()])
            else None,
        }

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run, earlier tries that it goes on from included."""
        return self.state.wall_s + time.perf_counter() - self.started

    def how(self) -> dict[str, Any]:
        """How the steps were run, for the record, whatever became of the run."""
        return {
            "step_mode": self.step.mode,
            "compile_s": self.state.compile_s + self._compile_s(),
            "extra": {
                "compiled": self.step.compiled,
                "step_reason": "; ".join([self.bench.why, *self.step.notes]),
            },
        }

    def _compile_s(self) -> float:
        """Seconds that this process compiled and captured for this run."""
        return self.step.compile_s - self.compiled_before

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
        self.state.lines += 1
        if not self.first:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.on_line(line)

    # Checkpoints: everything that the rest of the run depends on.

    def _owner(self) -> dict[str, Any]:
        """What a checkpoint must say to be read into this run."""
        return {"config_hash": self.config.config_hash(self.store.data_hash), "seed": self.config.seed}

    def _save_best(self) -> None:
        saved = {**self._owner(), "step": self.state.step, "model": self.model.state_dict()}
        if self.first:
            checkpoint.save(saved, self.folder / BEST)
        parallel.barrier()

    def _save(self) -> None:
        self.state.schedule = self.schedule.state()
        cuda = self.device.type == "cuda"
        saved = {
            **self._owner(),
            "state": {
                **vars(self.state),
                "wall_s": self.wall_s,
                "compile_s": self.state.compile_s + self._compile_s(),
            },
            "model": self.model.state_dict(),
            "step": self.step.state(),
            "architecture": self.architecture and self.architecture.state_dict(),
            "cpu_random": self._of_all(torch.get_rng_state()),
            "gpu_random": self._of_all(torch.cuda.get_rng_state(self.device)) if cuda else None,
        }
        if self.first:
            checkpoint.save(saved, self.folder / LAST)
        parallel.barrier()

    def _of_all(self, state: Tensor) -> Tensor:
        """The random states of all processes, a row each."""
        return parallel.gather_rows(state[None], [1] * self.world.size)

    def _resume(self) -> None:
        path, metrics = self.folder / LAST, self.folder / "metrics.jsonl"
        if not path.is_file():
            if self.first:
                metrics.unlink(missing_ok=True)
            return
        saved = checkpoint.load(path, **self._owner())
        if len(saved["cpu_random"]) != self.world.size:
            raise UserError(
                f"the checkpoint {path} was written by {len(saved['cpu_random'])} processes and this run has "
                f"{self.world.size}; start as many again, or add --force to begin anew"
            )
        self.model.load_state_dict(saved["model"])
        self.step.load(saved["step"])
        if self.architecture:
            self.architecture.load_state_dict(saved["architecture"])
        self.state = State(**saved["state"])
        self.schedule = Schedule(self.config.train, **self.state.schedule)
        rank = self.world.rank  # a row's clone, as torch reads a view from its storage's beginning
        torch.set_rng_state(saved["cpu_random"][rank].clone())
        if saved["gpu_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["gpu_random"][rank].clone(), self.device)
        if self.first:
            kept = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
            metrics.write_text("".join(kept[: self.state.lines]))
        log.info("resumed %s at step %d", self.run_id, self.state.step)
