"""The iterated inverse by Triton kernels: equal to torch's products, in outputs and gradients."""

import functools
from functools import partial

import pytest
import torch
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import landmarks
from models.landmarks import SAFE_ITERATIONS, iterated_inverse
from models.nystrom import start_norm


def matrices(size, sharpness, batch_size=2, heads=2):
    """As nystrom's, one without its last third of landmarks, and their norms; ill-conditioned if dull."""
    generator = torch.Generator().manual_seed(size)
    a = (sharpness * torch.randn(batch_size, heads, size, size, generator=generator)).softmax(dim=-1)
    if size > 2:
        a[0, :, size - size // 3 :] = a[0, :, :, size - size // 3 :] = 0
    return a, start_norm(a)


def results(a, norm, num_iterations, call=None):
    leaves = [x.detach().requires_grad_() for x in (a, norm)]
    out = (call or iterated_inverse)(*leaves, num_iterations)
    weight = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out).mT
    grads = torch.autograd.grad((out.double() * weight).sum(), leaves)
    assert [x.dtype for x in (out, *grads)] == [a.dtype] * 3
    return [out, *grads]


def differences(a, norm, num_iterations):
    """Of float32 from float64, over the latter: of the inverse, the gradients of a and of norm."""
    found = results(a, norm, num_iterations)
    expected = results(a.double(), norm.double(), num_iterations)
    return [((b - a).norm() / a.norm()).item() for a, b in zip(expected, found, strict=True)]


def quick_results(a, num_iterations, scale=1.0):
    """The inverse of quick kernels and the gradient of a."""
    a = a.detach().requires_grad_()
    out = iterated_inverse(a, start_norm(a.detach()), num_iterations, exact=False)
    weight = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out).mT * scale
    return [out, *torch.autograd.grad((out.double() * weight).sum(), a)]


def quick_differences(a, num_iterations, scale=1.0):
    found, again = (quick_results(a, num_iterations, scale) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))  # bit by bit
    expected = quick_results(a.double(), num_iterations, scale)
    return [((b - a).norm() / a.norm()).item() for a, b in zip(expected, found, strict=True)]


def test_is_taken_for_float32_up_to_64_rows(monkeypatch):
    taken = []
    monkeypatch.setattr(landmarks, "runs_kernels", lambda *x: True)
    monkeypatch.setattr(
        landmarks, "_iterated_inverse", lambda a, start, n, exact: [start, taken.append(a.shape)]
    )
    for shape in ((2, 3, 64, 64), (64, 64), (2, 65, 65)):
        iterated_inverse(torch.ones(shape), torch.ones(shape[:-2]), 2)
        iterated_inverse(torch.ones(shape).double(), torch.ones(shape[:-2]).double(), 2)
    assert taken == [(6, 64, 64), (1, 64, 64)]


def test_the_quick_one_refuses_iterations_whose_iterates_may_leave_float16():
    a, norm = matrices(6, 1.0)
    iterated_inverse(a, norm, SAFE_ITERATIONS, exact=False)
    with pytest.raises(AssertionError):
        iterated_inverse(a, norm, SAFE_ITERATIONS + 1, exact=False)


def test_its_products_are_counted_as_those_of_torch_are():
    counts = []
    by_kernels = [partial(torch.ops.lra.iterated_inverse, exact=exact) for exact in (True, False)]
    for call in (*by_kernels, iterated_inverse):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            a, other = (torch.empty(3, 8, 8, requires_grad=True) for _ in range(2))
            out = call(a, other, 5)[0] if call is not iterated_inverse else call(a, other[:, 0, 0], 5)
            out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] == 3 * 5 * 4 * 2 * 8**3 * 3


@functools.cache
def in_the_interpreter():
    return interpreted("inverse")


@pytest.mark.slow
def test_in_the_interpreter_it_is_as_near_to_float64_as_torch_in_float32():
    """Needs Triton but no GPU."""
    *cases, (compiled, *away), opcheck = (line for line in in_the_interpreter() if line[0] != "half")
    assert len(cases) == 7 and compiled == "compiled" and opcheck == ["opcheck"]
    assert all(float(x) < 1e-12 for x in away)
    for case in cases:
        by_kernel, by_torch = ([float(x) for x in part] for part in (case[3:6], case[6:9]))
        assert all(a <= 2 * b + 1e-6 for a, b in zip(by_kernel, by_torch, strict=True)), case


@pytest.mark.slow
def test_in_the_interpreter_the_quick_one_is_as_near_as_operands_of_11_bits_let_it():
    """Needs Triton but no GPU."""
    cases = [line[1:] for line in in_the_interpreter() if line[0] == "half"]
    assert len(cases) == 7
    assert all(float(x) < 5e-3 for case in cases for x in case[3:]), cases


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("size", [6, 16, 33, 64])
def test_on_a_gpu_the_quick_one_is_near_whatever_the_size_of_its_gradient(size, scale):
    a, _ = matrices(size, 2.0, batch_size=40)
    assert all(x < 5e-3 for x in quick_differences(a.cuda(), 6, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [6, 16, 33, 64])
def test_on_a_gpu_it_equals_float64_in_outputs_and_gradients(size):
    given = [x.cuda() for x in matrices(size, 2.0, batch_size=40)]
    assert landmarks.runs_kernels(*given)
    assert all(x < 1e-4 for x in differences(*given, 6))
    for a, b in zip(results(*given, 6), results(*given, 6), strict=True):
        assert torch.equal(a, b)  # bit by bit


@pytest.mark.gpu
def test_it_runs_compiled_and_in_a_captured_graph():
    a, norm = (x.cuda() for x in matrices(33, 2.0))
    torch._dynamo.reset()
    call = torch.compile(iterated_inverse, fullgraph=True)
    for x, y in zip(results(a, norm, 6), results(a, norm, 6, call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(a, norm, 6)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(a, norm, 6)
    a.copy_(a.flip(0).contiguous())
    norm.copy_(start_norm(a))
    graph.replay()
    for x, y in zip(captured, results(a, norm, 6), strict=True):
        assert torch.equal(x, y)
