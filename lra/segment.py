"""The clock of a training run."""

import time
from typing import TYPE_CHECKING

from lra import cost, environment
from lra.data.batch import Plan

if TYPE_CHECKING:
    from lra.train import Trainer

WARMUP_STEPS = 10  # untimed steps after a start: kernels load, allocators settle


class Segment:
    """Times the steps between two interruptions, once the process is warm; synchronises only at its ends."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.steps = self.tokens = 0
        self._open()
        if trainer.warmup_left:
            self.started = None

    def _open(self) -> None:
        self.started: float | None = time.perf_counter()
        self.compiled_before = self.trainer.step.compile_s

    def count(self, plans: list[Plan]) -> None:
        """Called after each step with its batch."""
        if self.started is not None:
            self.steps += 1
            self.tokens += sum(plan.num_tokens for plan in plans)
            return
        self.trainer.warmup_left -= 1
        if self.trainer.warmup_left == 0:
            environment.synchronize(self.trainer.device)
            cost.reset_peak(self.trainer.device)
            self._open()

    def close(self) -> None:
        environment.synchronize(self.trainer.device)
        if self.started is None:
            return
        compiling = self.trainer.step.compile_s - self.compiled_before
        state = self.trainer.state
        state.train_s += time.perf_counter() - self.started - compiling
        state.timed_steps += self.steps
        state.timed_tokens += self.tokens
        self.started = None
