"""Softmax attention from few queries: in torch and by Triton kernels equal to the formula, gradients too."""

import importlib
from functools import partial

import flash_stand_in
import pytest
import torch
from few_keys_reference import explicit_queries, kept, offsets
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import few_queries
from models.few_queries import few_queries_attention, fits

LENGTHS, FILLER = (300, 0, 1, 129, 5), 70
GPU_LENGTHS = (1000, 0, 1, 257, 64, 5)
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def draw(lengths=LENGTHS, m=4, d=5, e=3, heads=2, masked=False):
    """(real, [q, k, v]), these views of projections, NaN at filler rows and at those that are not real."""
    rows = torch.randn(sum(lengths) + FILLER, heads, d + e, dtype=torch.float64)
    real = None
    if masked:
        real = torch.rand(len(rows)) < 0.6
        real[lengths[0] : lengths[0] + lengths[1] + lengths[2]] = False  # a sequence without a real row
        rows[~real] = torch.nan
    rows[sum(lengths) :] = torch.nan
    slots = torch.randn(len(lengths), heads, m, d, dtype=torch.float64).transpose(1, 2)
    return real, [slots, *rows.split([d, e], dim=-1)]


def results(call, leaves, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves, **options)
    weights = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad((out.double() * weights).sum(), leaves)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (5, 0, 1, 3, 2)])
def test_torch_computes_the_formula_and_filler_and_rows_that_are_not_real_reach_nothing(
    lengths, masked, flash, monkeypatch
):
    """`flash`: by a stand-in for FlashAttention, hostile where that promises nothing; it is for real rows."""
    real, given = draw(lengths, e=5, masked=masked)
    if flash:
        monkeypatch.setattr(few_queries, "flash_runs", lambda q, k, v: True)
        monkeypatch.setattr(few_queries, "flash", flash_stand_in.explicit)
        monkeypatch.delattr(few_queries, "sum_chunks") if real is None else None
    attend = partial(few_queries_attention, cu_seqlens=offsets(lengths), max_len=max(lengths), real=real)
    clean = [x.nan_to_num() for x in given]
    expected = results(partial(explicit_queries, lengths=lengths, real=real), clean)
    for a, b in zip(results(attend, given), expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_dropout_reaches_flash(monkeypatch):
    seen = []
    monkeypatch.setattr(few_queries, "flash_runs", lambda q, k, v: True)
    monkeypatch.setattr(few_queries, "flash", lambda q, *rest, dropout: seen.append(dropout) or q)
    _, given = draw(e=5)
    few_queries_attention(*given, offsets(LENGTHS), max(LENGTHS), dropout=0.3)
    assert seen == [0.3]


def test_products_of_kernels_are_counted_as_those_of_fused_attention_are():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k = torch.empty(3, 16, 2, 8, requires_grad=True), torch.empty(100, 2, 8, requires_grad=True)
        v, cu_seqlens = torch.empty(100, 2, 5, requires_grad=True), torch.empty(4, dtype=torch.int32)
        out, _ = torch.ops.lra.few_queries(q, k, v, None, None, cu_seqlens, 60, 0.0, 1.0)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert counter.get_total_flops() == 2 * 100 * 2 * 16 * (4 * 8 + 3 * 5)  # scores twice


def test_kernels_are_not_for_what_they_do_not_hold(monkeypatch):
    monkeypatch.setattr(few_queries, "runs_kernels", lambda *tensors: True)
    shapes = {"m": 64, "d": 64, "e": 64, "dtype": torch.float16}
    for change, fit in (
        ({}, True),
        ({"m": 65}, False),
        ({"d": 65}, False),
        ({"e": 65}, False),
        ({"dtype": torch.float32}, False),
    ):
        m, d, e, dtype = {**shapes, **change}.values()
        q, k, v = (torch.zeros(shape, dtype=dtype) for shape in ((3, m, 2, d), (9, 2, d), (9, 2, e)))
        assert fits(q, k, v) == fit, change


@pytest.mark.slow
def test_kernels_refuse_more_queries_than_they_hold():
    """Needs Triton but no GPU."""
    kernels = pytest.importorskip("triton") and importlib.import_module("models.kernels.few_queries")
    q, k = torch.zeros(1, 65, 2, 8).half(), torch.zeros(9, 2, 8).half()
    with pytest.raises(AssertionError):
        kernels.forward(q, k, k, None, None, offsets((9,)), 9, 0.0, 1.0)


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Weights and results are rounded to half precision."""
    found = interpreted("few_queries")
    assert [name for name, *_ in found] == [*["float16"] * 6, "compiled", "opcheck"]
    limits = {"float16": 1e-3, "compiled": 1e-12, "opcheck": 0}
    for name, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (name, differences)


def on_gpu(m, d, e, dtype, masked=False):
    real, given = draw(GPU_LENGTHS, m, d, e, masked=masked)
    return None if real is None else real.cuda(), [x.to("cuda", dtype) for x in given]


def assert_near(found, expected, limit):
    """A gradient that is but rounding is compared with the others' size."""
    floor = 1e-3 * max(b.norm() for b in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= limit * torch.maximum(b.norm(), floor)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("m", "d", "e"), [(1, 3, 20), (16, 32, 32), (16, 64, 5), (33, 32, 32), (64, 64, 64)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_kernels_equal_float64_in_outputs_and_gradients(m, d, e, dtype, limit, masked):
    real, given = on_gpu(m, d, e, dtype, masked)
    assert fits(*given)
    bounds = {"cu_seqlens": offsets(GPU_LENGTHS, "cuda"), "max_len": 1000}
    attend = partial(few_queries_attention, **bounds, real=real)
    found, again = results(attend, given), results(attend, given)
    assert_near(found, results(attend, [x.double() for x in given]), limit)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)  # bit by bit


@pytest.mark.gpu
def test_kernels_drop_what_the_hash_says_in_both_directions():
    _, given = on_gpu(16, 32, 32, torch.float16)
    bounds = {"cu_seqlens": offsets(GPU_LENGTHS, "cuda"), "max_len": 1000}
    torch.manual_seed(1)
    seed = torch.randint(2**62, (1,), device="cuda").item()
    torch.manual_seed(1)
    found = results(partial(few_queries_attention, **bounds, dropout=0.3), given)
    keep = kept(seed, len(given[1]), 2, 16, 0.3).cuda()
    reference = partial(explicit_queries, lengths=GPU_LENGTHS, kept=keep, dropout=0.3)
    assert_near(found, results(reference, [x.double().nan_to_num() for x in given]), 2e-3)


@pytest.mark.gpu
def test_kernels_run_in_a_captured_graph_on_other_rows_and_lengths():
    leaves = [x.requires_grad_() for x in on_gpu(16, 32, 32, torch.float16)[1]]
    cu_seqlens = offsets(GPU_LENGTHS, "cuda")

    def step():
        out = few_queries_attention(*leaves, cu_seqlens, 1000, dropout=0.0)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[1].copy_(torch.randn(leaves[1].shape, device="cuda"))
        leaves[1][1071:] = torch.inf
        cu_seqlens.copy_(offsets((9, 990, 0, 70, 1, 1), "cuda"))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
