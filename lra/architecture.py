"""Training of what chooses between mechanisms: a step on a validation batch for the parameters tagged
`architecture`, between the steps on training batches for all others (the alternation of Liu et al. 2019,
arXiv 1806.09055, first order).
"""

from typing import Any

import torch

from lra.config import RunConfig
from lra.data.batch import Batch
from lra.errors import UserError
from lra.step import Step, is_architecture

BETAS, WEIGHT_DECAY = (0.5, 0.999), 1e-3  # of DARTS, section A.1.1
WARMUP_SHARE = 0.1  # of the run, in which the mixers alone learn: untrained ones say nothing about a task


class ArchitectureStep:
    """Called with a validation batch, updates the architecture parameters once."""

    def __init__(self, step: Step, config: RunConfig) -> None:
        if config.train.precision == "fp16":
            raise UserError(
                "a search needs gradients without a loss scale; use train.precision=bf16, tf32 or fp32"
            )
        self.step, self.first = step, round(WARMUP_SHARE * config.train.num_steps)
        self.parameters = [p for p in step.model.parameters() if is_architecture(p)]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.train.arch_lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    @staticmethod
    def of(step: Step, config: RunConfig) -> "ArchitectureStep | None":
        """None for a model in which nothing is sought."""
        sought = any(is_architecture(p) for p in step.model.parameters())
        return ArchitectureStep(step, config) if sought else None

    def __call__(self, batch: Batch) -> None:
        gradients = torch.autograd.grad(self.step.loss(batch), self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
