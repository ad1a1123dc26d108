"""One optimisation step: assemble the batch, forward, backward, clipping, optimizer.

`Step` runs it kernel by kernel, compiled or not; `lra.capture.CapturedStep` replays the same code from CUDA
graphs. Nothing here waits for the device: losses add up there until `Step.read` is asked for them.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lra import parallel
from lra.backbone import Backbone
from lra.data.batch import Batch, Batches, Form, Plan, assemble
from lra.data.source import pinned
from lra.environment import synchronize
from lra.layout import Layout
from lra.optimizer import Adam
from lra.schema import TrainConfig

# b rows, t packed tokens

MOST_SHAPES = 64  # compiled forms of one model: token counts, each split, training and evaluation
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast region of a forward pass; fp32 and tf32 have none."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


class Step:
    """Trains and applies a model batch by batch; `compiled` runs it through torch.compile."""

    mode = "eager"

    def __init__(
        self, model: Backbone, config: TrainConfig, device: torch.device, *, compiled: bool = False
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.mode = "compiled" if compiled and self.mode == "eager" else self.mode
        self.optimizer = Adam(model, config, device)
        self._compile(compiled)
        self.notes: list[str] = []  # what a step could not do that it was made for
        self.compile_s = 0.0  # spent on compiling and capturing so far
        self.peak_bytes: int | None = None  # of a captured step, where the allocator shows it only once
        self._loss = torch.zeros((), dtype=torch.float64, device=device)  # of the step being made
        self._total = torch.zeros((), dtype=torch.float64, device=device)  # of the steps since `read`
        self._steps = 0  # since `read`
        self._clock = torch.zeros((), dtype=torch.float64, device=device)  # steps made
        self._bad = torch.full((), -1.0, dtype=torch.float64, device=device)  # first without a finite loss
        self._templates: dict[int, Tensor] = {}
        self._known: set = set()

    def train(
        self, batches: Batches, plans: Sequence[Plan], *, lr: float, beta1: float | None = None
    ) -> None:
        """Updates the weights once, from the parts of one batch; the loss is the mean over all its rows,
        those of other processes included."""
        self._in_mode(training=True)
        self.optimizer.set_rates(lr, beta1)
        rows = sum(plan.all_rows for plan in plans)
        shares = [len(plan.rows) / rows for plan in plans]
        if len(plans) == 1:
            self._run(("step", *plans[0].shape, shares[0]), self._whole, batches, plans[0], shares[0])
        else:
            for first, plan, share in zip([True] + [False] * len(plans), plans, shares, strict=False):
                self._run(("part", *plan.shape, share, first), self._part, batches, plan, share, first)
            self._run(("finish",), self._finish)
        self._steps += 1

    @torch.no_grad()
    def predict(self, batches: Batches, plan: Plan) -> tuple[Tensor, Tensor]:
        """The predicted classes of a batch [b] and the sum of its losses, float64; valid until the next
        call. A last batch with fewer rows goes through the plain code, which any size fits.
        """
        self._in_mode(training=False)
        if len(plan.rows) < batches.batch_size:
            return _prediction(self.model, self.config.precision, *Step._inputs(self, batches, plan))
        return self._run(("predict", *plan.shape), self._predict, batches, plan)

    def loss(self, batches: Batches, plan: Plan) -> Tensor:
        """The training loss of a batch, for gradients that somebody else takes."""
        return self.loss_of(self.model, self.config.precision, *self._inputs(batches, plan))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[b num_classes] in float32, under the precision of the run, of a batch gathered already."""
        return _logits(self.model, self.config.precision, batch.inputs, batch.layout)

    def read(self) -> tuple[float, int | None]:
        """The mean loss of the steps since the last call, and the first step of the run whose loss was no
        number, if any. Waits for the device.
        """
        total = parallel.sum_(self._total.clone()).item()
        mean = total / self._steps if self._steps else float("nan")
        self._total.zero_()
        self._steps = 0
        return mean, self.first_bad()

    def first_bad(self) -> int | None:
        """The first step of the run whose loss was no number, if any. Waits for the device."""
        found = parallel.gather_rows(self._bad[None], [1] * parallel.world().size).tolist()
        steps = [int(step) for step in found if step >= 0]
        return min(steps) if steps else None

    def reset(self) -> None:
        """As before the first step; weights are left as they are."""
        self.optimizer.reset()
        for tensor, value in ((self._total, 0), (self._clock, 0), (self._bad, -1)):
            tensor.fill_(value)
        self._steps = 0

    def state(self) -> dict:
        """What a checkpoint must hold beside the model; the meter is that of all processes together."""
        bad = self.first_bad()
        bad = torch.full_like(self._bad, -1 if bad is None else bad)
        meter = {"total": parallel.sum_(self._total.clone()), "clock": self._clock, "bad": bad}
        return {"optimizer": self.optimizer.state(), "meter": meter, "steps": self._steps}

    def load(self, state: dict) -> None:
        self.optimizer.load(state["optimizer"])
        meter = state["meter"]
        for tensor, name in ((self._total, "total"), (self._clock, "clock"), (self._bad, "bad")):
            tensor.copy_(meter[name])
        if not parallel.is_first():
            self._total.zero_()  # `read` adds up all of them
        self._steps = state["steps"]

    def _compile(self, compiled: bool) -> None:
        self.compiled = compiled
        self.loss_of, self.prediction_of = _loss, _prediction
        if compiled:
            self.loss_of, self.prediction_of = compile_once(_loss), compile_once(_prediction)
        self.optimizer.compile(compiled)

    def _run(self, key: tuple, function: Callable, *arguments):
        """Calls one of the functions below; the first call of a key is where compilation takes its time.

        All of that call counts as compiling, the one step or prediction that it makes included.
        """
        if not self.compiled or key in self._known:
            return function(*self._resolved(arguments))
        synchronize(self.device)
        started = time.perf_counter()
        result = function(*self._resolved(arguments))
        synchronize(self.device)
        self._known.add(key)
        self.compile_s += time.perf_counter() - started
        return result

    def _resolved(self, arguments: tuple) -> tuple:
        """(batches, plan, ...) -> (inputs of `assemble`, ...)."""
        if not arguments:
            return ()
        batches, plan, *rest = arguments
        return (self._inputs(batches, plan), *rest)

    def _inputs(self, batches: Batches, plan: Plan) -> tuple[Form, Tensor, Tensor, Tensor]:
        tokens = batches.source.tokens_of(plan.stored)
        numbers = pinned(plan.numbers, self.device).to(self.device, non_blocking=True)
        return batches.form, tokens, numbers, self._template(plan.num_rows)

    def _template(self, num_rows: int) -> Tensor:
        """A tensor of so many rows, which tells compiled code the size of a batch."""
        if num_rows not in self._templates:
            template = torch.empty(num_rows, dtype=torch.uint8, device=self.device)
            if self.compiled:
                torch._dynamo.maybe_mark_dynamic(template, 0)
            self._templates[num_rows] = template
        return self._templates[num_rows]

    def _in_mode(self, *, training: bool) -> None:
        if self.model.training != training:
            self.model.train(training)

    # What is captured: no shape, branch or number here may depend on what a tensor holds.

    def _whole(self, inputs: tuple, share: float) -> None:
        self._part(inputs, share, True)
        self._finish()

    def _part(self, inputs: tuple, share: float, first: bool) -> None:
        loss = self.loss_of(self.model, self.config.precision, *inputs) * share
        scaled = loss * self.optimizer.scale if self.optimizer.scaled else loss
        gradients = torch.autograd.grad(scaled, self.optimizer.parameters, allow_unused=True)
        self.optimizer.collect(gradients, first=first)
        self._loss.copy_(loss.detach() if first else self._loss + loss.detach())

    def _finish(self) -> None:
        parallel.sum_(self.optimizer.gradients)
        self.optimizer.step()
        self._bad.copy_(torch.where((self._bad < 0) & ~torch.isfinite(self._loss), self._clock, self._bad))
        self._total += self._loss
        self._clock += 1

    def _predict(self, inputs: tuple) -> tuple[Tensor, Tensor]:
        return self.prediction_of(self.model, self.config.precision, *inputs)


def _logits(model: Backbone, precision: str, inputs: Tensor, layout: Layout) -> Tensor:
    with autocast(precision, inputs.device):
        return model(inputs, layout).float()


def _loss(
    model: Backbone, precision: str, form: Form, tokens: Tensor, numbers: Tensor, rows: Tensor
) -> Tensor:
    """Mean cross-entropy of a batch and what the mechanisms add to it; arguments as `assemble` takes them."""
    inputs, labels, layout = assemble(form, tokens, numbers, rows)
    loss = F.cross_entropy(_logits(model, precision, inputs, layout), labels)
    extra = model.aux_loss()
    return loss if extra is None else loss + extra


def _prediction(
    model: Backbone, precision: str, form: Form, tokens: Tensor, numbers: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    inputs, labels, layout = assemble(form, tokens, numbers, rows)
    logits = _logits(model, precision, inputs, layout)
    return logits.argmax(-1), F.cross_entropy(logits, labels, reduction="sum").double()


def compile_once(function: Callable) -> Callable:
    """`function` through torch.compile, for the few batch shapes of a run.

    The number of packed rows is the size of a tensor that may stay symbolic, so that one compiled form
    serves all of them. Past the limit dynamo raises: left to itself it would go on uncompiled, and the record
    would say otherwise.
    """
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=None, fullgraph=True)
