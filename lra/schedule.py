"""Learning-rate schedules of the published recipes, as functions of the step number."""

import math
from dataclasses import dataclass

from lra.schema import TrainConfig

ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25 / 1e4  # of the peak, torch's OneCycleLR defaults
ONECYCLE_MOMENTUM = (0.95, 0.85)


@dataclass
class Schedule:
    """`lr(step)` for steps 0, 1, ...; only `plateau` has a state, which `observe` moves."""

    config: TrainConfig
    factor: float = 1.0
    best: float = -math.inf
    stale: int = 0

    def lr(self, step: int) -> float:
        """The learning rate of optimisation step `step`, counted from 0."""
        return getattr(self, f"_{self.config.schedule}")(step)

    def beta1(self, step: int) -> float | None:
        """Adam's first beta where the schedule moves it (onecycle with cycle_momentum), else None."""
        if self.config.schedule != "onecycle" or not self.config.cycle_momentum:
            return None
        high, low = ONECYCLE_MOMENTUM
        return self._two_phases(step, high, low, high)

    def observe(self, val_accuracy: float) -> None:
        """Tells the schedule the result of an evaluation."""
        if self.config.schedule != "plateau":
            return
        if val_accuracy > self.best:
            self.best, self.stale = val_accuracy, 0
            return
        self.stale += 1
        if self.stale > self.config.plateau_patience:
            self.factor, self.stale = self.factor * self.config.plateau_factor, 0

    def state(self) -> dict[str, float]:
        return {"factor": self.factor, "best": self.best, "stale": self.stale}

    def _warmup(self, step: int) -> float:
        """The share of the way from the initial to the peak rate; 1 once warm."""
        warmup = self.config.warmup_steps
        return min(1.0, (step + 1) / warmup) ** self.config.warmup_power if warmup else 1.0

    def _warmed(self, step: int, decay: float) -> float:
        share = self._warmup(step)
        start = self.config.warmup_init_lr
        return start + (self.config.lr - start) * share if share < 1 else self.config.lr * decay

    def _after_warmup(self, step: int) -> float:
        """0 when warm-up ends, 1 at the last step."""
        done = step + 1 - self.config.warmup_steps
        return min(1.0, max(0.0, done / max(1, self.config.num_steps - self.config.warmup_steps)))

    def _constant(self, step: int) -> float:
        return self._warmed(step, 1.0)

    def _plateau(self, step: int) -> float:
        return self._warmed(step, self.factor)

    def _linear(self, step: int) -> float:
        return self._warmed(step, 1 - self._after_warmup(step))

    def _cosine(self, step: int) -> float:
        return self._warmed(step, 0.5 * (1 + math.cos(math.pi * self._after_warmup(step))))

    def _cosine_cycle(self, step: int) -> float:
        """Half cosines, one every `cycle_steps` (google-research/long-range-arena, cosine_decay)."""
        cycle = self.config.cycle_steps or self.config.num_steps
        progress = max(0.0, (step + 1 - self.config.warmup_steps) / cycle)
        return self.config.lr * self._warmup(step) * 0.5 * (1 + math.cos(math.pi * (progress % 1.0)))

    def _rsqrt(self, step: int) -> float:
        """base * min(1, t / W) / sqrt(max(t, W)): the base is not the peak
        (google-research/long-range-arena).
        """
        return self.config.lr * self._warmup(step) / math.sqrt(max(step + 1, self.config.warmup_steps))

    def _inverse_sqrt(self, step: int) -> float:
        """Linear to the peak, then peak * sqrt(W / t) (fairseq)."""
        return self._warmed(step, math.sqrt(max(1, self.config.warmup_steps) / (step + 1)))

    def _onecycle(self, step: int) -> float:
        """torch's OneCycleLR with linear annealing and pct_start = warmup_steps / num_steps."""
        peak = self.config.lr
        return self._two_phases(step, peak * ONECYCLE_START, peak, peak * ONECYCLE_END)

    def _two_phases(self, step: int, start: float, middle: float, end: float) -> float:
        rise = self.config.warmup_steps - 1
        last = self.config.num_steps - 1
        if step <= rise:
            return start + (middle - start) * (step / rise if rise else 1.0)
        return middle + (end - middle) * (step - rise) / max(1, last - rise)
