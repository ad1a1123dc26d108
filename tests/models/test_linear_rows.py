"""Normalised linear attention on rows: in torch equal to rows taken alone, by Triton kernels to torch."""

import pytest
import torch
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import sums
from models.linear import linear_attention_packed
from models.linear_rows import fits_kernels, normalised_sums

LENGTHS, FILLER = (300, 0, 1, 129, 5), 70
ELU = {"eps": 1e-6, "feature": "elu"}


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw(lengths=LENGTHS, d=4, e=3, heads=2):
    """q, k, v as views of one projection."""
    made = torch.randn(sum(lengths) + FILLER, heads, 2 * d + e, dtype=torch.float64)
    return made.split([d, d, e], dim=-1)


def results(leaves, lengths, call=normalised_sums, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves, offsets(lengths, leaves[0].device), max(lengths), **options)
    weights = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad((out.double() * weights).sum(), leaves)]


def test_rows_that_are_not_real_take_part_as_if_they_were_not_there():
    q, k, v = draw((6, 4), d=4)
    real = torch.ones(len(q), dtype=torch.bool)
    real[[1, 7, 8, 9]] = False
    fewer = (
        torch.cat([k[:6][real[:6]], k[6:10][real[6:10]]]),
        torch.cat([v[:6][real[:6]], v[6:10][real[6:10]]]),
    )
    one = normalised_sums(q, k, v, offsets((6, 4)), 6, real=real, **ELU)
    first = linear_attention_packed(torch.cat([q[:5], q[6:7]]), *fewer, offsets((5, 1)), 5)
    torch.testing.assert_close(torch.cat([one[:5], one[6:7]]), first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"eps": 1e-6}, {"eps": 0.5, "add_eps": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_a_padded_batch_is_rows_of_sequences_of_one_length(masked, options, monkeypatch):
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]]) if masked else None
    given = [x.unflatten(0, (3, 4)).transpose(1, 2) for x in (y[:12] for y in draw((12,)))]
    found = []
    for rows in (False, True):
        monkeypatch.setattr(sums, "fits_kernels", lambda *x, rows=rows: rows)  # torch computes both
        leaves = [x.clone().requires_grad_() for x in given]
        out = sums.kernel_attention(*leaves, mask, feature="elu", **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_output_has_the_dtype_of_the_values_and_is_summed_in_float32():
    q, k, v = (x[:429].half() for x in draw())
    found = normalised_sums(q, k, v, offsets((429,)), 429, **ELU)
    exact = normalised_sums(q.double(), k.double(), v.double(), offsets((429,)), 429, **ELU)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=5e-4, atol=1e-6)  # rounded once to 11 bits


def test_products_of_kernels_are_counted_as_those_of_torch_are():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k = (torch.empty(100, 2, 8, requires_grad=True) for _ in range(2))
        v, cu_seqlens = torch.empty(100, 2, 5, requires_grad=True), torch.empty(4, dtype=torch.int32)
        out, _ = torch.ops.lra.linear_rows(q, k, v, None, cu_seqlens, 60, "elu", 1e-6, False)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert counter.get_total_flops() == 3 * 2 * 2 * 100 * 2 * 8 * (5 + 1)  # backward: twice forward


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Results in half precision are rounded to it."""
    found = interpreted("linear_rows")
    assert len(found) == 12
    limits = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "compiled": 1e-12, "opcheck": 0}
    for name, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (name, differences)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [ELU, {"eps": 1e-6}, {**ELU, "eps": 0.5, "add_eps": True}])
@pytest.mark.parametrize(("d", "e"), [(32, 32), (3, 3), (33, 64), (64, 64)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_equal_float64_in_outputs_and_gradients(options, d, e, dtype, limit, masked):
    lengths = (1000, 0, 1, 257, 64, 5)
    q, k, v = draw(lengths, d, e)
    if "feature" not in options:
        q, k = q.abs(), k.abs()
    arguments = [x.to("cuda", dtype) for x in (q, k, v)]
    real = (torch.rand(len(q), device="cuda") < 0.6) if masked else None
    assert fits_kernels(*arguments)
    found, again = (results(arguments, lengths, real=real, **options) for _ in range(2))
    expected = results([x.double() for x in arguments], lengths, real=real, **options)
    for a, b, c in zip(found, expected, again, strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()
        assert torch.equal(a, c)  # bit by bit


@pytest.mark.gpu
def test_kernels_are_compiled_whole_for_any_number_of_rows():
    torch._dynamo.reset()
    call = torch.compile(normalised_sums, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (2, 300, 0, 129), (1, 9, 0, 4)):
        arguments = [x.to("cuda", torch.float16) for x in draw(lengths, 32, 32)]
        for a, b in zip(
            *(results(arguments, lengths, f, **ELU) for f in (normalised_sums, call)), strict=True
        ):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_kernels_run_in_a_captured_graph_on_other_rows_and_lengths():
    lengths = (300, 0, 70, 9)
    leaves = [x.to("cuda", torch.float32).requires_grad_() for x in draw(lengths, 32, 48)]
    cu_seqlens = offsets(lengths, "cuda")

    def step():
        out = normalised_sums(*leaves, cu_seqlens, 300, **ELU)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    others = draw((9, 290, 0, 80), 32, 48)
    with torch.no_grad():
        for leaf, x in zip(leaves, others, strict=True):
            leaf.copy_(x)
            leaf[379:] = torch.inf
        cu_seqlens.copy_(offsets((9, 290, 0, 80), "cuda"))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
