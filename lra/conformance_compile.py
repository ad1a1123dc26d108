"""Checks of compilation and capture: whether a mechanism's step can leave Python, with the same numbers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lra.conformance_subject import (
    Outcome,
    Probe,
    Subject,
    check,
    failed,
    largest,
    not_applicable,
    passed,
    tensors_of,
    within,
)

COMPILED = 1e-4  # float32, where a compiler may reorder sums


@check(
    "compilation", "torch.compile(fullgraph=True) traces it without a break and matches eager, gradients too"
)
def compiles(subject: Subject) -> Outcome:
    return compiled_like_eager(subject, "aot_eager")


def compiled_like_eager(subject: Subject, backend: str) -> Outcome:
    """The check `compiles` with any compiler of torch; `inductor` is the one that training uses."""
    probe, (length,) = subject.probe(dtype=torch.float32, max_len=64), subject.lengths(33)
    real = [length, length // 2]
    mask = subject.prefix(real, length)
    x = subject.inputs(2, length, dtype=torch.float32)
    calls = {"a mask": (probe, x, (mask,)), "no mask": (probe, x, (None,))}
    if subject.traits.packed:
        cu_seqlens = torch.tensor([0, *real], device=x.device).cumsum(0).to(torch.int32)
        calls["packed rows"] = (probe.forward_packed, x[mask], (cu_seqlens, length))
    errors = {}
    for name, (call, given, others) in calls.items():
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        results = [_outputs_and_gradients(one, probe, given, others) for one in (call, compiled)]
        errors[name] = largest([_error_beside(a, b, results[0][1:]) for a, b in zip(*results, strict=True)])
    torch._dynamo.reset()
    return within(largest(list(errors.values())), COMPILED, f"{backend}; {', '.join(errors)}")


def _outputs_and_gradients(
    call: Callable[..., Tensor], probe: Probe, x: Tensor, others: tuple
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = call(x, *others)
    if isinstance(others[0], Tensor) and others[0].dtype == torch.bool:
        out = out[others[0]]
    loss = (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()
    grads = (
        torch.autograd.grad(loss, [x, *probe.parameters()], allow_unused=True) if loss.requires_grad else ()
    )
    return [out.detach(), *(g for g in grads if g is not None)]


@check("compilation", "a training step reads no value back from the device, so that it can be captured")
def capturable(subject: Subject) -> Outcome:
    if not subject.traits.capturable:
        return not_applicable("capturable=False; the harness runs its steps uncaptured")
    probe, (length,) = subject.probe(dtype=torch.float32).train(), subject.lengths(100)
    real = [length, length // 2]
    x, mask = subject.inputs(2, length, dtype=torch.float32), subject.prefix(real, length)
    calls = {"a mask": (probe, x, (mask,))}
    if subject.traits.packed:
        cu_seqlens = torch.tensor([0, *real], device=x.device).cumsum(0).to(torch.int32)
        calls["packed rows"] = (PackedRows(probe), x[mask], (cu_seqlens, length))
    if x.is_cuda:
        errors = [_captured_beside_eager(*call) for call in calls.values()]
        return within(largest(errors), COMPILED, f"captured and replayed; {', '.join(calls)}")
    for name, call in calls.items():
        try:
            _step_without_values(*call)
        except DataDependentOutputException as error:
            return failed(f"with {name} the step depends on a value read back: {error}")
    return passed(f"on CPU: no operation asks for a value; {', '.join(calls)}; capture itself needs a GPU")


class PackedRows(nn.Module):
    """A probe called on packed rows: (x [t d], cu_seqlens, max_len) -> [t d]."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self.probe.forward_packed(x, cu_seqlens, max_len)


def _step_without_values(module: nn.Module, x: Tensor, others: tuple) -> None:
    """Forward and backward on tensors that have shapes but no values."""
    fake = FakeTensorMode()
    state = {
        name: fake.from_tensor(value.detach()).requires_grad_(value.requires_grad)
        for name, value in tensors_of(module)
    }
    given = [fake.from_tensor(one) if isinstance(one, Tensor) else one for one in (x, *others)]
    with fake:
        out = torch.func.functional_call(module, state, tuple(given))
        if out.requires_grad:
            out.sum().backward()


def _captured_beside_eager(module: nn.Module, x: Tensor, others: tuple) -> float:
    """The error of forward and backward recorded as a CUDA graph and replayed on new input."""
    x = x.clone().requires_grad_()
    parameters = [x, *module.parameters()]

    def step() -> list[Tensor]:
        out = module(x, *others)
        return (
            [out, *torch.autograd.grad(out[..., :2, :].sum(), parameters, allow_unused=True)]
            if out.requires_grad
            else [out]
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(x.flip(-2))
    torch.manual_seed(5)  # what is drawn in training is drawn alike
    graph.replay()
    torch.manual_seed(5)
    pairs = [(a, b) for a, b in zip(step(), captured, strict=True) if a is not None]
    return largest([_error_beside(a, b, [p for p, _ in pairs]) for a, b in pairs])


def _error_beside(expected: Tensor, found: Tensor, others: list[Tensor]) -> float:
    """Difference over the size of `expected`, or over a hundredth of the largest of `others` if that is more.

    A gradient that is zero by algebra (of a key bias under softmax) is rounding noise, which differs anyway.
    """
    scale = max([expected.abs().max().item(), *(0.01 * t.abs().max().item() for t in others), 1e-300])
    return (found - expected).abs().max().item() / scale
