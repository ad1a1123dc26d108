"""Softmax attention to few keys: in torch and by Triton kernels equal to the formula, gradients included."""

import importlib
from functools import partial

import flash_stand_in
import pytest
import torch
from few_keys_reference import explicit, kept, offsets
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import few_keys
from models.few_keys import few_keys_attention, fits

LENGTHS, FILLER = (300, 0, 1, 129, 5), 70
USED = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]).bool()
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def draw(lengths=LENGTHS, m=4, d=5, e=3, heads=2):
    """q, k, v as views of projections, NaN at filler rows."""
    rows = torch.randn(sum(lengths) + FILLER, heads, 2 * d, dtype=torch.float64)
    rows[sum(lengths) :] = torch.nan
    slots = torch.randn(len(lengths), heads, m, d + e, dtype=torch.float64).transpose(1, 2)
    return rows[..., d:], *slots.split([d, e], dim=-1)


def results(call, leaves, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves, **options)
    weights = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad((out.double() * weights).sum(), leaves)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("scale", [None, -2.0])
@pytest.mark.parametrize("used", [None, USED])
@pytest.mark.parametrize("lengths", [LENGTHS, (5, 0, 1, 3, 2)])
def test_torch_computes_the_formula_and_filler_and_unused_keys_reach_nothing(
    lengths, used, scale, flash, monkeypatch
):
    """`flash`: by a stand-in for FlashAttention, hostile where that promises nothing."""
    given = draw(lengths, e=5)
    if flash:
        monkeypatch.setattr(few_keys, "flash_runs", lambda q, k, v: True)
        monkeypatch.setattr(few_keys, "flash", flash_stand_in.explicit)
    if used is not None:
        given = [given[0], *(x.masked_fill(~used[..., None, None], torch.nan) for x in given[1:])]
    attend = partial(few_keys_attention, cu_seqlens=offsets(lengths), max_len=max(lengths))
    found = results(attend, given, used=used, scale=scale)
    clean = [x.nan_to_num() for x in given]
    expected = results(partial(explicit, lengths=lengths), clean, used=used, scale=scale)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_torch_drops_weights_at_the_rate_asked_for_and_scales_the_rest():
    q, k = torch.zeros(2000, 2, 4), torch.zeros(1, 16, 2, 4)
    v = torch.ones(1, 16, 2, 1)
    found = few_keys_attention(q, k, v, offsets((2000,)), 2000, dropout=0.25)
    counts = found * 16 * 0.75
    torch.testing.assert_close(counts, counts.round())
    assert abs(found.mean() - 1) < 0.012  # 64,000 draws: five standard errors


def test_what_the_hash_keeps_is_independent_of_rows_heads_keys_and_seeds():
    """Each frequency within five standard errors of that of independent draws."""
    shape, stay = (4096, 3, 16), 1 - 0.3
    draws = kept(0x1234_5678_9ABC_DEF0, *shape, 0.3)
    error = 5 * (0.3 * stay) ** 0.5
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        mean = draws.float().mean(dims)
        most = error * (mean.numel() / draws.numel()) ** 0.5
        assert (mean - stay).abs().max() < most
    others = [kept(s, *shape, 0.3) for s in (0x1234_5678_9ABC_DEF1, 0x1234_5679_9ABC_DEF0)]
    shifted = [draws.roll(by, dim) for dim in range(3) for by in (1, 2, 8, 13) if by < shape[dim]]
    variance = (stay**2 * (1 - stay**2) + 2 * stay**3 * (1 - stay)) / draws.numel()  # a draw is in two pairs
    for other in (*others, *shifted):
        assert ((draws & other).float().mean() - stay**2).abs() < 5 * variance**0.5
    assert kept(5, 100, 1, 1, 0.0).all()


def test_products_of_kernels_are_counted_as_those_of_fused_attention_are():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k = torch.empty(100, 2, 8, requires_grad=True), torch.empty(3, 16, 2, 8, requires_grad=True)
        v, cu_seqlens = torch.empty(3, 16, 2, 5, requires_grad=True), torch.empty(4, dtype=torch.int32)
        out, _ = torch.ops.lra.few_keys(q, k, v, None, None, cu_seqlens, 60, 0.0, 1.0)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert counter.get_total_flops() == 2 * 100 * 2 * 16 * (4 * 8 + 3 * 5)  # scores twice


def test_kernels_are_not_for_what_they_do_not_hold(monkeypatch):
    monkeypatch.setattr(few_keys, "runs_kernels", lambda *tensors: True)
    shapes = {"m": 256, "d": 64, "e": 64, "dtype": torch.float16}
    for change, fit in (
        ({}, True),
        ({"m": 257}, False),
        ({"d": 65}, False),
        ({"e": 65}, False),
        ({"dtype": torch.float32}, False),
    ):
        m, d, e, dtype = {**shapes, **change}.values()
        q, k, v = (torch.zeros(shape, dtype=dtype) for shape in ((9, 2, d), (3, m, 2, d), (3, m, 2, e)))
        assert fits(q, k, v) == fit, change


@pytest.mark.slow
@pytest.mark.parametrize(("m", "d", "e"), [(257, 8, 8), (16, 65, 8), (16, 8, 65)])
def test_kernels_refuse_what_they_would_leave_out(m, d, e):
    """Needs Triton but no GPU."""
    kernels = pytest.importorskip("triton") and importlib.import_module("models.kernels.few_keys")
    with pytest.raises(AssertionError):
        kernels.options_of(torch.zeros(3, m, 2, d), torch.zeros(3, m, 2, e), None, 0.0)
    assert kernels.options_of(torch.zeros(3, 256, 2, 64), torch.zeros(3, 256, 2, 64), None, 0.0)["M"] == 256


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Weights and results are rounded to half precision."""
    found = interpreted("few_keys")
    assert [name for name, *_ in found] == [*["float16"] * 8, "compiled", "opcheck"]
    limits = {"float16": 1e-3, "compiled": 1e-12, "opcheck": 0}
    for name, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (name, differences)


GPU_LENGTHS = (1000, 0, 1, 257, 64, 5)


def on_gpu(m, d, e, dtype):
    return [x.to("cuda", dtype) for x in draw(GPU_LENGTHS, m, d, e)]


def assert_near(found, expected, limit):
    """A gradient that is but rounding is compared with the others' size."""
    floor = 1e-3 * max(b.norm() for b in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= limit * torch.maximum(b.norm(), floor)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("m", "d", "e"),
    [
        (1, 3, 20),
        (16, 32, 32),
        (33, 64, 40),
        (64, 32, 32),
        (128, 3, 64),
        (200, 16, 5),
        (256, 32, 32),
        (256, 64, 64),
    ],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_kernels_equal_float64_in_outputs_and_gradients(m, d, e, dtype, limit, masked):
    given = on_gpu(m, d, e, dtype)
    used = torch.rand(len(GPU_LENGTHS), m, device="cuda") < 0.6 if masked else None
    assert fits(*given)
    attend = partial(few_keys_attention, cu_seqlens=offsets(GPU_LENGTHS, "cuda"), max_len=1000, used=used)
    found, again = results(attend, given), results(attend, given)
    expected = results(attend, [x.double() for x in given])
    assert_near(found, expected, limit)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)  # bit by bit


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "d"), [(16, 32), (256, 32), (256, 64)])
def test_kernels_drop_what_the_hash_says_in_both_directions(m, d):
    given = on_gpu(m, d, d, torch.float16)
    attend = partial(few_keys_attention, cu_seqlens=offsets(GPU_LENGTHS, "cuda"), max_len=1000, dropout=0.3)
    torch.manual_seed(1)
    seed = torch.randint(2**62, (1,), device="cuda").item()
    torch.manual_seed(1)
    found = results(attend, given)
    keep = kept(seed, len(given[0]), 2, m, 0.3).cuda()
    reference = partial(explicit, lengths=GPU_LENGTHS, kept=keep, dropout=0.3)
    expected = results(reference, [x.double().nan_to_num() for x in given])
    assert_near(found, expected, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 256])
def test_kernels_run_in_a_captured_graph_on_other_rows_lengths_and_draws(m):
    leaves = [x.requires_grad_() for x in on_gpu(m, 32, 32, torch.float16)]
    cu_seqlens, draws = offsets(GPU_LENGTHS, "cuda"), torch.Generator(device="cuda").manual_seed(0)

    def step(dropout=0.0):
        out = few_keys_attention(*leaves, cu_seqlens, 1000, dropout=dropout)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(), step(0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, dropped = step(), step(0.5)[0]
    with torch.no_grad():
        leaves[0].copy_(torch.randn(leaves[0].shape, device="cuda", generator=draws))
        leaves[0][1071:] = torch.inf
        cu_seqlens.copy_(offsets((9, 990, 0, 70, 1, 1), "cuda"))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
    before = dropped.clone()
    graph.replay()
    assert not torch.equal(before, dropped)


@pytest.mark.gpu
def test_kernels_are_compiled_whole_for_any_number_of_rows():
    torch._dynamo.reset()
    call = torch.compile(few_keys_attention, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (2, 300, 0, 129, 4), (1, 9, 0, 4, 4)):
        given = [x.to("cuda", torch.float16) for x in draw(lengths, 16, 32, 32)]
        bounds = {"cu_seqlens": offsets(lengths, "cuda"), "max_len": max(lengths)}
        pairs = zip(*(results(partial(f, **bounds), given) for f in (few_keys_attention, call)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()
