"""Products over packed rows: in torch equal to loops, by Triton kernels equal to those in torch."""

import logging
from types import SimpleNamespace

import pytest
import torch
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from models import row_products, sums
from models.row_products import linear_sums, row_apply, row_sums

LENGTHS, FILLER = (7, 0, 1, 4), 3
LONG = (300, 0, 64, 5)  # so that rows lie in chunks shorter than the longest sequence
OPERATIONS = (linear_sums, row_sums, row_apply)


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw(operation, lengths=LENGTHS, d=5, e=3, heads=2, filler=torch.nan):
    """Arguments in float64: rows are views with other numbers between them, filler rows hold `filler`."""
    real = sum(lengths)

    def rows(width):
        made = torch.randn(real + FILLER, 3, heads, width, dtype=torch.float64)
        made[real:] = filler
        return made[:, 1]

    state = torch.randn(len(lengths), heads, e, d, dtype=torch.float64).mT
    q, k, v = rows(d), rows(d), rows(e)
    return {"linear_sums": (q, k, v), "row_sums": (k, v), "row_apply": (q, state)}[operation.__name__]


def by_loops(operation, arguments, lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    parts = [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
    if operation is row_sums:
        a, b = arguments
        return (torch.stack([torch.einsum("thd,the->hde", a[rows], b[rows]) for rows in parts]),)
    if operation is row_apply:
        a, state = arguments
        mixed = [torch.einsum("thd,hde->the", a[rows], s) for rows, s in zip(parts, state, strict=True)]
        return (torch.cat([*mixed, mixed[0].new_zeros(FILLER, *mixed[0].shape[1:])]),)
    q, k, v = arguments
    weights = [torch.einsum("ihd,jhd->hij", q[rows], k[rows]) for rows in parts]
    mixed = [torch.einsum("hij,jhe->ihe", w, v[rows]) for w, rows in zip(weights, parts, strict=True)]
    norm = [w.sum(-1).T[..., None] for w in weights]
    return tuple(torch.cat([*x, x[0].new_zeros(FILLER, *x[0].shape[1:])]) for x in (mixed, norm))


def results(operation, arguments, lengths, call=None):
    """Outputs and gradients, of a loss that reads the outputs at filler rows too."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    if call is by_loops:
        out = by_loops(operation, leaves, lengths)
    else:
        out = (call or operation)(*leaves, offsets(lengths, leaves[0].device), max(lengths))
        out = out if isinstance(out, tuple) else (out,)
    weights = [torch.linspace(-1, 1 + i, x.numel(), device=x.device).view_as(x) for i, x in enumerate(out)]
    total = sum((x.double() * weight).sum() for x, weight in zip(out, weights, strict=True))
    return [*out, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, (0, 0, 2)])
def test_equals_loops_in_outputs_and_gradients_whatever_filler_rows_hold(operation, lengths):
    arguments = draw(operation, lengths)
    found, expected = (results(operation, arguments, lengths, call) for call in (None, by_loops))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck(operation):
    leaves = [x.clone().requires_grad_() for x in draw(operation, (2, 0, 3), d=2, e=2, heads=1, filler=1.0)]
    assert gradcheck(lambda *x: operation(*x, offsets((2, 0, 3)), 3), leaves)


@pytest.mark.parametrize(
    ("operation", "out"),
    [(linear_sums, torch.float32), (row_sums, torch.float32), (row_apply, torch.float16)],
)
def test_half_precision_is_added_up_in_float32(operation, out):
    arguments = [x.half() for x in draw(operation, LONG)]
    found = results(operation, arguments, LONG)
    expected = results(operation, [x.double() for x in arguments], LONG, by_loops)
    num_leaves = len(arguments)
    assert {x.dtype for x in found[:-num_leaves]} == {out}
    assert {x.dtype for x in found[-num_leaves:]} == {torch.float16}
    for a, b in zip(found, expected, strict=True):
        limit = 1e-6 if a.dtype == torch.float32 else 1e-3
        assert (a - b).norm() < limit * b.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_a_padded_batch_is_packed_rows_of_sequences_of_one_length(masked, monkeypatch):
    mask = torch.arange(6) < torch.tensor([6, 0, 4])[:, None] if masked else None
    arguments = [torch.randn(3, 2, 6, width, dtype=torch.float64) for width in (5, 5, 3)]
    found = []
    for rows in (False, True):
        monkeypatch.setattr(sums, "runs_kernels", lambda *x, rows=rows: rows)  # torch computes both
        leaves = [x.clone().requires_grad_() for x in arguments]
        out = sums.kernel_sums(*leaves, mask)
        total = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in out)
        found.append([*out, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_products_of_kernels_are_counted_as_those_of_torch_are():
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        q, k = (torch.empty(100, 2, 8, requires_grad=True) for _ in range(2))
        v, cu_seqlens = torch.empty(100, 2, 5, requires_grad=True), torch.empty(4, dtype=torch.int32)
        mixed, norm, _ = torch.ops.lra.linear_sums(q, k, v, cu_seqlens, 60)
        torch.autograd.grad(mixed.sum() + norm.sum(), (q, k, v))
    assert counter.get_total_flops() == 3 * 2 * 2 * 100 * 2 * 8 * (5 + 1)  # backward: twice forward
    with mode, FlopCounterMode(display=False) as counter:
        state = torch.ops.lra.row_sums(q, v, cu_seqlens, 60)
        torch.ops.lra.row_apply(q, state, cu_seqlens, 60)
    assert counter.get_total_flops() == 2 * 2 * 100 * 2 * 8 * 5


def on_a_gpu(*dtypes):
    return [SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype) for dtype in dtypes]


def test_kernels_are_taken_on_a_gpu_for_float32_and_half_precision_alone(monkeypatch):
    monkeypatch.setattr(row_products, "_unavailable", lambda index: "")
    assert row_products.runs_kernels(*on_a_gpu(torch.float32, torch.bfloat16, torch.float16))
    assert not row_products.runs_kernels(*on_a_gpu(torch.float32, torch.float64))
    assert not row_products.runs_kernels(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("triton", "capability", "compiler", "said"),
    [
        (None, (9, 0), "cc", "torch, because triton is not installed"),
        ("it", (7, 5), "cc", "torch, because the kernels need compute capability 8.0"),
        ("it", (9, 0), "", "torch, because triton finds no C compiler: install one or set CC"),
        ("it", (9, 0), "cc", "Triton"),
    ],
)
def test_what_computes_on_a_gpu_is_told_once(triton, capability, compiler, said, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(row_products, "find_spec", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(row_products.shutil, "which", lambda name: None)
    row_products._unavailable.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "lra"):
            taken = {row_products.runs_kernels(*on_a_gpu(torch.float32)) for _ in range(3)}
    finally:
        row_products._unavailable.cache_clear()
    assert caplog.messages == [f"products over packed rows on cuda: {said}"]
    assert taken == {said == "Triton"}


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Gradients of half precision are rounded to it."""
    found = interpreted("row_products")
    assert len(found) == 3 * (6 + 2 + 2 + 1 + 1)
    limits = {"float32": 5e-7, "float16": 1e-3, "mixed": 5e-3, "compiled": 1e-12, "opcheck": 0}
    for operation, name, d, e, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (operation, name, d, e, differences)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("d", "e"), [(32, 32), (1, 3), (33, 130), (256, 64), (512, 512), (153, 33)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_kernels_equal_float64_in_outputs_and_gradients(operation, d, e, dtype, limit):
    lengths = (1000, 0, 1, 257, 64, 5)
    arguments = [x.to("cuda", dtype) for x in draw(operation, lengths, d, e)]
    assert row_products.runs_kernels(*arguments)
    found = results(operation, arguments, lengths)
    again = results(operation, arguments, lengths)
    expected = results(operation, [x.double() for x in arguments], lengths)
    for a, b, c in zip(found, expected, again, strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()
        assert torch.equal(a, c)  # bit by bit


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_are_compiled_whole_for_any_number_of_rows(operation):
    torch._dynamo.reset()
    call = torch.compile(operation, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (2, 300, 0, 129), (1, 9, 0, 4)):
        arguments = [x.to("cuda", torch.float32) for x in draw(operation, lengths, 32, 48)]
        pair = results(operation, arguments, lengths), results(operation, arguments, lengths, call)
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_run_in_a_captured_graph_on_other_rows_and_lengths(operation):
    lengths = (300, 0, 70, 9)
    arguments = [x.to("cuda", torch.float32) for x in draw(operation, lengths, 32, 48)]
    leaves, cu_seqlens = [x.clone().requires_grad_() for x in arguments], offsets(lengths, "cuda")

    def step():
        out = operation(*leaves, cu_seqlens, 300)
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad([x.sum() for x in out], leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, x in zip(leaves, draw(operation, (9, 290, 0, 80), 32, 48, filler=torch.inf), strict=True):
            leaf.copy_(x)
        cu_seqlens.copy_(offsets((9, 290, 0, 80), "cuda"))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
