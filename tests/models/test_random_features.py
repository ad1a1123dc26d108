"""Attention through random features by kernels equals torch in float64, gradients of stabilisers too."""

import pytest
import torch
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import performer
from models.performer import favor_attention, favor_attention_packed, orthogonal_features
from models.random_features import LEAST_EPS, fits_kernels


def test_products_of_kernels_are_counted_once_each():
    """Those in exponents as often as those with values; a gradient of the features is not computed."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k = (torch.empty(100, 2, 8, requires_grad=True) for _ in range(2))
        v, features = torch.empty(100, 2, 5, requires_grad=True), torch.empty(6, 8)
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        out, *_ = torch.ops.lra.feature_rows(q, k, v, None, features, cu_seqlens, 60, 1e-4, 0.25, 1e-9)
        torch.autograd.grad(out.sum(), (q, k, v))
    exponents, values = 2 * 2 * 100 * 2 * 8 * 6, 2 * 2 * 100 * 2 * 6 * (5 + 1)
    assert counter.get_total_flops() == 2 * exponents + 3 * values


def test_kernels_are_not_for_what_they_do_not_hold(monkeypatch):
    monkeypatch.setattr("models.random_features.runs_kernels", lambda *tensors: True)
    half, features = torch.zeros(7, 2, 64).half(), torch.zeros(512, 64)
    assert fits_kernels(half, half, half, features, 1e-8)
    assert not fits_kernels(half, half.float(), half, features, 1e-4)
    assert not fits_kernels(half, half, torch.zeros(7, 2, 65).half(), features, 1e-4)
    assert not fits_kernels(half, half, half, torch.zeros(513, 64), 1e-4)
    assert not fits_kernels(half, half, half, features.half(), 1e-4)
    for dtype, fit in ((torch.float16, False), (torch.bfloat16, False), (torch.float32, True)):
        x = half.to(dtype)
        assert fits_kernels(x, x, x, features, 9e-9) == fit


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_kernels_get_the_eps_that_decides_whether_they_can_hold_it(packed, held, monkeypatch):
    eps = LEAST_EPS * (1 if held else 0.9)
    taken = []
    stand_in = lambda q, k, v, *rest, **rule: taken.append(rule) or v  # noqa: E731
    monkeypatch.setattr("models.random_features.runs_kernels", lambda *tensors: True)
    monkeypatch.setattr(performer, "feature_attention", stand_in)
    q, features = torch.randn(9, 2, 8).half(), torch.randn(12, 8)
    if packed:
        bounds = torch.tensor([0, 9], dtype=torch.int32)
        favor_attention_packed(q, q, q, bounds, 9, features=features, eps=eps)
    else:
        favor_attention(*[q.transpose(0, 1)[None]] * 3, features=features, eps=eps)
    assert [rule["eps"] for rule in taken] == [eps] * held


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_are_for_features_of_softmax_alone(packed, kernel, monkeypatch):
    taken = []
    monkeypatch.setattr(performer, "fits_kernels", lambda *given: True)
    monkeypatch.setattr(performer, "feature_attention", lambda q, k, v, *rest, **rule: taken.append(1) or v)
    q, options = torch.randn(9, 2, 8), {"features": torch.randn(12, 8), "kernel": kernel}
    if packed:
        favor_attention_packed(q, q, q, torch.tensor([0, 9], dtype=torch.int32), 9, **options)
    else:
        favor_attention(*[q.transpose(0, 1)[None]] * 3, **options)
    assert len(taken) == (kernel == "softmax")


@pytest.mark.parametrize("coupled", [False, True])
def test_kernels_get_a_padded_batch_as_rows_unless_its_stabiliser_is_coupled(coupled, monkeypatch):
    """The stand-in for the kernels is torch on rows, real ones alone."""
    seen = []

    def stand_in(q, k, v, features, cu_seqlens, max_len, *, eps, power, floor, real):
        seen.append(real)
        monkeypatch.setattr(performer, "fits_kernels", lambda *tensors: False)
        out = torch.zeros_like(v)
        for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            part = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
            kept = [part[0], *(x[:, :, real[first:last]] for x in part[1:])]
            found = favor_attention(*kept, features=features, eps=eps, double_scaling=power == 0.5)
            out[first:last] = found[0].transpose(0, 1)
        return out

    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64).unbind(0)
    mask, features = torch.arange(9) < torch.tensor([[9], [4]]), torch.randn(12, 8, dtype=torch.float64)
    options = {"features": features, "double_scaling": True, "coupled_stabiliser": coupled}
    expected = favor_attention(q, k, v, mask, **options)
    monkeypatch.setattr(performer, "fits_kernels", lambda *tensors: True)
    monkeypatch.setattr(performer, "feature_attention", stand_in)
    torch.testing.assert_close(favor_attention(q, k, v, mask, **options), expected, rtol=0, atol=1e-12)
    assert len(seen) == (not coupled)


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Operands and results in half precision are rounded to it."""
    found = interpreted("random_features")
    assert len(found) == 9
    limits = {"float32": 5e-6, "float16": 2e-3, "opcheck": 0}
    for name, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (name, differences)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("d", "e", "r"), [(32, 32, 256), (64, 64, 130), (5, 7, 3), (33, 20, 512)])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("mean", [0.0, 3.0])  # of the values
def test_kernels_equal_float64_in_outputs_and_gradients(packed, d, e, r, dtype, limit, mean):
    features = orthogonal_features(r, d, torch.Generator().manual_seed(0)).cuda()
    made = torch.randn(1000, 2, 2 * d + e, device="cuda")
    made[..., 2 * d :] += mean
    leaves = made.to(dtype).split([d, d, e], dim=-1)
    if packed:
        cu_seqlens = torch.tensor([0, 600, 600, 601, 990], dtype=torch.int32, device="cuda")
        attend = lambda *x, w: favor_attention_packed(*x, cu_seqlens, 600, features=w)  # noqa: E731
    else:
        leaves = [x.unflatten(0, (4, 250)).transpose(1, 2) for x in leaves]
        mask = torch.rand(4, 250, device="cuda") < 0.6
        attend = lambda *x, w: favor_attention(*x, mask, features=w)  # noqa: E731
    assert fits_kernels(*leaves, features, 1e-4)
    found = []
    for to in (dtype, dtype, torch.float64):
        given = [x.detach().to(to).requires_grad_() for x in leaves]
        out = attend(*given, w=features.to(torch.promote_types(to, torch.float32)))
        weights = torch.linspace(-1, 2, out.numel(), device="cuda", dtype=torch.float64).view(out.shape)
        found.append([out, *torch.autograd.grad((out.double() * weights).sum(), given)])
    for a, again, b in zip(*found, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= limit * b.norm()
        assert torch.equal(a, again)  # bit by bit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_are_compiled_whole_for_any_number_of_rows(dtype):
    torch._dynamo.reset()
    features = orthogonal_features(256, 32, torch.Generator().manual_seed(0)).cuda()
    call = torch.compile(favor_attention_packed, fullgraph=True, dynamic=True)
    for lengths in ((300, 0, 64), (2, 500, 0, 129), (1, 9, 0, 4)):
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        found = []
        made = torch.randn(sum(lengths) + 3, 3, 2, 32, device="cuda", dtype=dtype)
        for f in (favor_attention_packed, call):
            leaf = made.clone().requires_grad_()
            out = f(*leaf.unbind(1), cu_seqlens, max(lengths), features=features)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), leaf)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_kernels_run_in_a_captured_graph_on_other_rows_and_lengths():
    def offsets(*lengths):
        return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()

    features = orthogonal_features(256, 32, torch.Generator().manual_seed(0)).cuda()
    leaves = [torch.randn(400, 2, 32, device="cuda").half().requires_grad_() for _ in range(3)]
    cu_seqlens = offsets(300, 0, 70, 9)

    def step():
        out = favor_attention_packed(*leaves, cu_seqlens, 300, features=features)
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
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
            leaf[379:] = torch.nan
        cu_seqlens.copy_(offsets(9, 290, 0, 80))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
