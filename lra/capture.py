"""The training step as a CUDA graph: captured once per batch shape, replayed without the host.

A replay reads the batch's numbers, the learning rate and everything else that changes from buffers that stay
at their places; random numbers move on with every replay, as they would have without a graph.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lra.data.batch import Batches, Form, Plan
from lra.data.source import pinned
from lra.environment import out_of_memory
from lra.errors import one_line
from lra.step import Step

log = logging.getLogger(__name__)

WARMUP_CALLS = 2  # before a capture: kernels load and compile, workspaces are made


@dataclass
class Graph:
    graph: torch.cuda.CUDAGraph
    result: Any  # of the captured call; its tensors are written by every replay


class CapturedStep(Step):
    """A `Step` on a GPU whose calls are captured the first time and replayed from then on.

    One graph holds a whole step, or one part of it and one its end where a batch is cut into parts. All
    graphs share one pool of memory, so what `predict` returns is overwritten by the next call. What cannot be
    compiled is captured as it is, and what cannot be captured runs eagerly: each said once, in the log and in
    `notes`; or, if `strict`, an error.
    """

    mode = "captured"

    def __init__(self, *arguments, strict: bool = False, **settings) -> None:
        super().__init__(*arguments, **settings)
        self.strict = strict
        self._graphs: dict[tuple, Graph] = {}
        self._numbers: dict[int, Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.device)

    def _run(self, key: tuple, function: Callable, *arguments):
        inputs = self._resolved(arguments)  # also writes the batch into its buffers
        if inputs:
            form, tokens, *_ = inputs[0]
            key = (*key, form, tokens.data_ptr())
        if key not in self._graphs and self.mode == "captured":
            self._graphs[key] = self._captured(function, inputs)
        if self.mode != "captured":
            return function(*inputs)
        graph = self._graphs[key]
        graph.graph.replay()
        return graph.result

    def _inputs(self, batches: Batches, plan: Plan) -> tuple[Form, Tensor, Tensor, Tensor]:
        tokens = batches.source.tokens_of(plan.stored)
        size = len(plan.numbers)
        if size not in self._numbers:
            self._numbers[size] = torch.zeros(size, dtype=torch.int64, device=self.device)
        numbers = self._numbers[size]
        numbers.copy_(pinned(plan.numbers, self.device), non_blocking=True)
        return batches.form, tokens, numbers, self._template(plan.num_rows)

    def _captured(self, function: Callable, inputs: tuple) -> Graph | None:
        """A graph of `function(*inputs)`, compiled if that can be; None, and mode `eager`, if it cannot be
        captured.
        """
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        try:
            while True:
                try:
                    return self._capture(function, inputs)
                except Exception as error:
                    if self.strict or out_of_memory(error):
                        raise
                    self._step_down(error)
                    if self.mode == "eager":
                        return None
        finally:
            torch.cuda.synchronize(self.device)
            self.compile_s += time.perf_counter() - started

    def _step_down(self, error: Exception) -> None:
        """From a compiled capture to a plain one, from that to no capture."""
        what = "compiled" if self.compiled else "captured"
        note = f"could not be {what}: {type(error).__name__}: {one_line(error)}"
        log.warning("the step %s", note)
        self.notes.append(note)
        self._graphs.clear()
        if self.compiled:
            self._compile(False)
        else:
            self.mode = "eager"

    def _capture(self, function: Callable, inputs: tuple) -> Graph:
        """The calls that come before leave weights, optimizer, buffers and random numbers as they found
        them.
        """
        kept = [(tensor, tensor.clone()) for tensor in self._changing()]
        random_state = torch.cuda.get_rng_state(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUP_CALLS):
                    function(*inputs)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = function(*inputs)
            copies = sum(before.nbytes for _, before in kept)
            peak = torch.cuda.max_memory_allocated(self.device) - copies
            self.peak_bytes = max(self.peak_bytes or 0, peak)
        finally:
            torch.cuda.synchronize(self.device)
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)
            torch.cuda.set_rng_state(random_state, self.device)
            kept.clear()
            torch.cuda.reset_peak_memory_stats(self.device)
        return Graph(graph, result)

    def _changing(self) -> list[Tensor]:
        """Every tensor that a step writes and the next one reads."""
        optimizer = self.optimizer
        meter = [self._loss, self._total, self._clock, self._bad]
        return [
            optimizer.weights,
            optimizer.gradients,
            *optimizer.state().values(),
            *meter,
            *self.model.buffers(),
        ]
