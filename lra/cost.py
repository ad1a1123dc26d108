"""What one training step costs beside time: floating-point operations and peak memory.

On a GPU memory is read from PyTorch's allocator. On the CPU no such counter exists and the process size says
little (the C library keeps freed memory), so the allocations of one step are followed by the profiler
instead.
"""

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lra import registry
from lra.data.batch import Batches, Plan
from lra.step import Step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its progress lines would land in the middle of ours

MIB = 2**20
CPU_METHOD = "weights, gradients and optimizer state, plus the peak of live allocations in one profiled step"
CPU_INFER_METHOD = "weights, plus the peak of live allocations in one profiled forward pass"
CUDA_METHOD = "peak of PyTorch's CUDA allocator after warm-up, without the data kept on the device"


class Trial:
    """A copy of a step that can be run without touching the training run: other weights, same random state
    after.
    """

    def __init__(self, step: Step) -> None:
        self.device = step.device
        self.step = Step(copy.deepcopy(step.model), step.config, step.device)

    def flops(self, batches: Batches, plans: list[Plan]) -> int | None:
        """Floating-point operations of one step as PyTorch counts them: products and attention, not
        elementwise. Layers that activation checkpointing runs twice count twice, and so do scores that the
        gradients of fused attention, torch's or ours, compute again; what our other kernels compute again
        does not. None if kernels ran that it cannot see into.
        """
        return self._count(lambda: self.step.train(batches, plans, lr=0.0))

    def forward_flops(self, batches: Batches, plan: Plan) -> int | None:
        """The same of one forward pass in evaluation mode."""
        return self._count(lambda: self.step.predict(batches, plan))

    def _count(self, call: Callable[[], object]) -> int | None:
        counter = FlopCounterMode(display=False)
        # The counter knows the fused kernels of a GPU but not the CPU's, so there attention runs as products.
        explicit = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        kernels = registry.load_models().fla_kernels
        with self._fork(), explicit, counter, kernels.choices() as made:
            call()
        return None if kernels.taken(made) else counter.get_total_flops()

    def cpu_peak_mib(self, batches: Batches, plans: list[Plan]) -> float:
        """Peak MiB of a step on the CPU: what stays (weights, optimizer state) and the most that is live at
        once.
        """
        with self._fork():
            self.step.train(batches, plans, lr=0.0)
            peak = peak_bytes(lambda: self.step.train(batches, plans, lr=0.0))
            return (weight_bytes(self.step) + optimizer_bytes(self.step) + peak) / MIB

    def _fork(self):
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])


def weight_bytes(step: Step) -> int:
    """Of the parameters and buffers of the model, as they lie in memory."""
    trained = {id(p) for p in step.optimizer.parameters}
    others = [p for p in step.model.parameters() if id(p) not in trained]
    return sum(x.nbytes for x in [step.optimizer.weights, *others, *step.model.buffers()])


def optimizer_bytes(step: Step) -> int:
    """Of the gradients and of what the optimizer keeps for each weight."""
    optimizer = step.optimizer
    tensors = [optimizer.gradients, *optimizer.state().values(), optimizer.lr_scale, optimizer.decay]
    return sum(x.nbytes for x in tensors if x is not None)


def moved_bytes_at_least(step: Step, mode: str, activations: float) -> float:
    """A lower bound of the bytes that one call reads and writes; `activations` are bytes of its peak.

    The update of a training step reads and writes each trained weight, its gradient and its moments, and
    reads the factors of its rate; a forward pass reads the weights. Buffers and weights that are not trained
    are left out: a call may use none of them. What is live at the peak was written once and is read
    once. What was freed before the peak and what is read again come on top, so that the true traffic is
    larger, often several times. No counter gives it. Memory that a library reserves and leaves alone is the
    one part that may not move.
    """
    optimizer = step.optimizer
    if mode != "train":
        return sum(p.nbytes for p in optimizer.parameters) + 2 * activations
    state = optimizer.state()
    changed = optimizer.weights.nbytes + optimizer.gradients.nbytes
    changed += sum(state[name].nbytes for name in ("mean", "square"))
    read = 0 if optimizer.lr_scale is None else optimizer.lr_scale.nbytes
    return 2 * changed + read + 2 * activations


def peak_bytes(function) -> int:
    """The most bytes of CPU tensors that calling `function` holds at once, beyond what is held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def cuda_peak_mib(device: torch.device, aside: int, step: Step) -> float:
    """The peak without `aside` bytes of what does not count.

    Of a captured step it is that of its capture: replays use its memory without telling.
    """
    return (max(torch.cuda.max_memory_allocated(device), step.peak_bytes or 0) - aside) / MIB


def reserved_mib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else None
