"""Packed paths are compiled once for any number of rows: a step compiled for one batch serves the next."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import models
from lra.conformance import subject

MAX_LEN = 300  # above what stays in one chunk
NAMES = [name for name in models.names() if models.get(name).traits.packed]
FAST = ("identity", "softmax", "global_mean")  # tracing the others takes a second and more
LIMIT = 1e-5  # float32, relative to the largest


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in NAMES]
)
def test_packed_path_is_compiled_once_for_any_number_of_rows(name):
    chosen = subject(name)
    probe = chosen.probe(max_len=MAX_LEN, dtype=torch.float32).train()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(probe.forward_packed, fullgraph=True, backend=counter)
    for lengths, filler in (((5, 300, 0, 64), 13), ((300, 299, 300, 150), 1), ((1, 0, 3, 2), 0)):
        real = sum(lengths)
        x = chosen.inputs(1, real + filler, dtype=torch.float32)[0].clone()
        torch._dynamo.mark_dynamic(x, 0)
        x.requires_grad_()
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        results = []
        for call in (compiled, probe.forward_packed):
            torch.manual_seed(1)
            out = call(x, cu_seqlens, MAX_LEN)[:real]
            weight = torch.linspace(-1, 1, out.numel()).view_as(out)
            grads = torch.autograd.grad((out * weight).sum(), x) if out.requires_grad else ()
            results.append((out.detach(), *grads))
        for found, expected in zip(*results, strict=True):
            assert (found - expected).abs().max() <= LIMIT * expected.abs().max()
    torch._dynamo.reset()
    assert counter.frame_count == 1
