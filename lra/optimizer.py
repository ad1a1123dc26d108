"""Adam on one flat buffer, so that a step is a few kernels, clips and sums in one place, and can be captured.

All that changes from step to step (learning rate, first beta, loss scale, step count) is a tensor on the
device: a CUDA graph replays with whatever they hold by then. Parameters become views into the buffer.
"""

import numpy as np
import torch
from torch import Tensor, nn

from lra.data.source import pinned
from lra.schema import TrainConfig

# n numbers of the flat buffer

ALIGNMENT = 64  # numbers; each parameter starts at a multiple of it, so that kernels can read whole lines
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # torch.amp.GradScaler's defaults


def is_architecture(parameter: nn.Parameter) -> bool:
    """Whether validation batches train it, as what chooses between mechanisms (model=search)."""
    return getattr(parameter, "architecture", False)


class Adam:
    """Adam (arXiv 1412.6980, algorithm 1) or AdamW (arXiv 1711.05101, algorithm 2) for all parameters of a
    model but those tagged `architecture`, with clipping before it and dynamic loss scaling in fp16.

    Parameters tagged `lr_scale` learn at that share of the rate, those tagged `no_weight_decay` do not decay.
    A step whose gradients overflowed in fp16 changes nothing but the loss scale. A parameter that no loss
    reaches counts as one whose gradient is zero.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad and not is_architecture(p)]
        self.weights = torch.zeros(0, device=device)
        self._flatten()
        self.gradients, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        self._gradient_views = self.views(self.gradients)
        self.rates = torch.zeros(2, dtype=torch.float64, device=device)  # learning rate, beta1
        # Steps taken; not of shape (), whose writes torch.compile drops for float64 on a CPU.
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.scale = torch.ones((), device=device)  # of the loss
        self.good = torch.zeros((), device=device)  # steps since the scale last changed
        self.scaled = config.precision == "fp16"
        self.lr_scale = self._per_number("lr_scale", 1.0)
        self.decay = self._per_number("no_weight_decay", False, lambda tag: 0.0 if tag else 1.0)
        self.update = _update
        self.reset()

    def reset(self) -> None:
        """As before the first step."""
        for state in (self.mean, self.square, self.count, self.good):
            state.zero_()
        self.scale.fill_(FIRST_SCALE if self.scaled else 1.0)

    @property
    def num_bytes(self) -> int:
        """Of the gradients and the state, which inference has no use for."""
        return sum(x.nbytes for x in (self.gradients, self.mean, self.square))

    def compile(self, compiled: bool = True) -> None:
        """Runs the update through torch.compile, or no longer."""
        self.update = torch.compile(_update, dynamic=False, fullgraph=True) if compiled else _update

    def set_rates(self, lr: float, beta1: float | None = None) -> None:
        """The learning rate of the next step, and the first beta where a schedule moves it."""
        beta1 = self.config.betas[0] if beta1 is None else beta1
        self.rates.copy_(pinned(np.array([lr, beta1]), self.rates.device), non_blocking=True)

    @torch.no_grad()
    def collect(self, gradients: list[Tensor | None], *, first: bool = True) -> None:
        """Puts the gradients of `parameters` into the buffer, or with first=False adds them to it."""
        pairs = [
            (view, _real(gradient))
            for view, gradient in zip(self._gradient_views, gradients, strict=True)
            if gradient is not None
        ]
        if first and len(pairs) < len(self._gradient_views):
            self.gradients.zero_()
        if pairs:
            (torch._foreach_copy_ if first else torch._foreach_add_)(*map(list, zip(*pairs, strict=True)))

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients collected."""
        config = self.config
        self.update(
            self.weights,
            self.gradients,
            self.mean,
            self.square,
            self.rates,
            self.count,
            (self.scale, self.good) if self.scaled else None,
            self.lr_scale,
            self.decay,
            beta2=config.betas[1],
            eps=config.eps,
            weight_decay=config.weight_decay,
            decoupled=config.optimizer == "adamw",
            clip_value=config.clip_value,
            clip_norm=config.clip_norm,
        )

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold beside the weights."""
        return {
            "mean": self.mean,
            "square": self.square,
            "count": self.count,
            "scale": self.scale,
            "good": self.good,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _flatten(self) -> None:
        """Moves the parameters into one buffer, of which each becomes a view."""
        for parameter in self.parameters:
            if parameter.dtype not in (torch.float32, torch.complex64):
                raise ValueError(
                    f"the optimizer trains float32 and complex64 parameters, got {parameter.dtype}; "
                    "precision is set by train.precision, not by the parameters"
                )
        sizes = [_real(p.data).numel() for p in self.parameters]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        self._places = list(zip(starts, sizes, strict=False))
        self.weights = self.weights.new_zeros(starts[-1])
        for parameter, view in zip(self.parameters, self.views(self.weights), strict=True):
            view.copy_(_real(parameter.data))
            parameter.data = torch.view_as_complex(view) if parameter.is_complex() else view

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each of `parameters` in a buffer laid out as `weights`, complex ones as pairs."""
        return [
            flat[start : start + size].view(_real(p.data).shape)
            for (start, size), p in zip(self._places, self.parameters, strict=True)
        ]

    def _per_number(self, tag: str, usual, factor=float) -> Tensor | None:
        """[n] the factor of each number by the tag of its parameter; None if all have the usual one."""
        tags = [getattr(parameter, tag, usual) for parameter in self.parameters]
        if all(value == usual for value in tags):
            return None
        flat = torch.ones_like(self.weights)
        for (start, size), value in zip(self._places, tags, strict=True):
            flat[start : start + size] = factor(value)
        return flat


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _update(
    weights: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    count: Tensor,
    scaling: tuple[Tensor, Tensor] | None,
    lr_scale: Tensor | None,
    decay: Tensor | None,
    *,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    clip_value: float | None,
    clip_norm: float | None,
) -> None:
    """One step in place; weights, gradients, mean, square: [n]; rates: [learning rate, beta1] and count: [1]
    float64.
    """
    lr, beta1 = rates[0], rates[1]
    good = None
    if scaling is not None:
        scale, streak = scaling
        gradients = gradients / scale
        good = gradients.isfinite().all()
        _move_scale(scale, streak, good)
    if clip_value is not None:
        gradients = gradients.clamp(-clip_value, clip_value)
    if clip_norm is not None:
        norm = torch.linalg.vector_norm(gradients)
        gradients = gradients * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    steps = count[0] + 1
    rate = lr if lr_scale is None else lr * lr_scale
    shrink = weight_decay if decay is None else weight_decay * decay
    start = weights
    if weight_decay and decoupled:
        start = weights * (1 - rate * shrink)
    elif weight_decay:
        gradients = gradients + shrink * weights
    new_mean = mean + (gradients - mean) * (1 - beta1)
    new_square = beta2 * square + (1 - beta2) * gradients.square()
    root = new_square.sqrt() / (1 - beta2**steps).sqrt() + eps
    new_weights = start - rate / (1 - beta1**steps) * (new_mean / root)
    pairs = [(weights, new_weights), (mean, new_mean), (square, new_square), (count, steps[None])]
    for old, new in pairs:
        old.copy_(new if good is None else torch.where(good, new, old))


def _move_scale(scale: Tensor, streak: Tensor, good: Tensor) -> None:
    """Halves the loss scale after an overflow, doubles it after a long run without one."""
    longer = streak + 1
    grows = longer >= GROWTH_INTERVAL
    scale.copy_(torch.where(good, torch.where(grows, scale * GROWTH, scale), scale * BACKOFF))
    streak.copy_(torch.where(good & ~grows, longer, torch.zeros_like(longer)))
