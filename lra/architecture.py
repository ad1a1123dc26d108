"""Training of what chooses between mechanisms: a step on a validation batch for the parameters tagged
`architecture`, between the steps on training batches for all others (the alternation of Liu et al. 2019,
arXiv 1806.09055, first order).
"""

from typing import Any

import torch

from lra.config import RunConfig
from lra.data.batch import Batches, Plan
from lra.errors import UserError
from lra.optimizer import is_architecture
from lra.step import Step

BETAS = (0.5, 0.999)  # of DARTS, without its weight decay: that is larger than these gradients
WARMUP_SHARE = 0.1  # of the run, in which the mixers alone learn: untrained ones say nothing about a task


class ArchitectureStep:
    """Called with the plans of a validation batch, updates the architecture parameters once, and nothing
    else: statistics that a forward pass in training keeps are put back.
    """

    def __init__(self, step: Step, config: RunConfig) -> None:
        if config.train.precision == "fp16":
            raise UserError(
                "a search needs gradients without a loss scale; use train.precision=bf16, tf32 or fp32"
            )
        if not config.train.arch_lr:
            raise UserError("train.arch_lr=0 would choose nothing; give a learning rate above 0")
        self.step, self.first = step, round(WARMUP_SHARE * config.train.num_steps)
        self.parameters = [p for p in step.model.parameters() if is_architecture(p)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.train.arch_lr, betas=BETAS)

    @staticmethod
    def of(step: Step, config: RunConfig) -> "ArchitectureStep | None":
        """None for a model in which nothing is sought."""
        sought = any(is_architecture(p) for p in step.model.parameters())
        return ArchitectureStep(step, config) if sought else None

    def __call__(self, batches: Batches, plans: list[Plan]) -> None:
        buffers = list(self.step.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        rows = sum(len(plan.rows) for plan in plans)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for plan in plans:
            loss = self.step.loss(batches, plan) * (len(plan.rows) / rows)
            for parameter, gradient in zip(
                self.parameters, torch.autograd.grad(loss, self.parameters), strict=True
            ):
                parameter.grad += gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
