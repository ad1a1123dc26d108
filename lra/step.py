"""One optimisation step: forward, backward, clipping, optimizer. Eager and compiled are one interface."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lra.backbone import Backbone
from lra.data.batch import Batch
from lra.layout import Layout, Packed, Padded
from lra.schema import TrainConfig

log = logging.getLogger(__name__)

MOST_SHAPES = 64  # compiled forms of one model: four token counts, each split, training and evaluation
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_mode(config: TrainConfig) -> tuple[str, str]:
    """The step mode and why it was chosen."""
    if config.step_mode != "auto":
        return config.step_mode, "as asked"
    return (
        "eager",
        "compiling takes minutes that not every run pays back: train.step_mode=compiled asks for it",
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters by the tags `lr_scale` and `no_weight_decay` that mechanisms put on them.

    Those tagged `architecture` are left out: validation batches train them.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if is_architecture(parameter):
            continue
        key = (getattr(parameter, "lr_scale", 1.0), getattr(parameter, "no_weight_decay", False))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr_scale": scale, "weight_decay": 0.0 if plain else weight_decay}
        for (scale, plain), params in groups.items()
    ]


def is_architecture(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "architecture", False)


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    groups = parameter_groups(model, config.weight_decay)
    return cls(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast region of a forward pass; fp32 and tf32 have none."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


class Step:
    """Called with the parts of one batch, updates the weights once and returns the mean loss, on the
    device.
    """

    def __init__(self, model: Backbone, config: TrainConfig, device: torch.device, mode: str) -> None:
        self.model, self.config, self.device, self.mode = model, config, device, mode
        self.optimizer = make_optimizer(model, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        if mode == "compiled":
            self._compiled = compile_logits()

    def logits(self, batch: Batch) -> Tensor:
        """[b num_classes] in float32, under the precision of the run."""
        with autocast(self.config.precision, self.device):
            if self.mode == "eager":
                return self.model(batch.inputs, batch.layout).float()
            return self._compiled(self.model, batch.inputs, *_plain(batch.layout)).float()

    def loss(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.logits(batch), batch.labels)
        extra = self.model.aux_loss()
        return loss if extra is None else loss + extra

    def __call__(self, parts: list[Batch], *, lr: float, beta1: float | None = None) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if beta1 is not None:
                group["betas"] = (beta1, group["betas"][1])
        rows = sum(len(part.labels) for part in parts)
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            loss = self.loss(part) * (len(part.labels) / rows)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self._clip(p for p in self.model.parameters() if not is_architecture(p))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _clip(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.config.clip_norm is None and self.config.clip_value is None:
            return
        self.scaler.unscale_(self.optimizer)
        parameters = list(parameters)
        if self.config.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.config.clip_value)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)


def compile_logits():
    """`_logits`, compiled once for each of the few batch shapes of a run.

    What an earlier run of the process compiled is let go first. Past the limit dynamo raises: left to itself
    it would go on uncompiled, and the record would say otherwise.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(_logits, dynamic=False, fullgraph=True)


def _logits(model: Backbone, inputs: Tensor, where: Tensor | None, shape: tuple) -> Tensor:
    """The forward pass from plain tensors and numbers, the form that compiles without guards on layouts."""
    layout: Layout
    if shape[0] == "packed":
        layout = Packed(where, *shape[1:])
    else:
        layout = Padded(*shape[1:], mask=where, device=inputs.device)
    return model(inputs, layout)


def _plain(layout: Layout) -> tuple[Tensor | None, tuple]:
    """A layout as its tensor and its numbers; `_logits` makes it again."""
    if isinstance(layout, Packed):
        return layout.cu_seqlens, ("packed", layout.num_rows, layout.length, layout.full)
    return layout.mask, ("padded", layout.num_sequences, layout.length)
