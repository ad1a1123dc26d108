"""Stable exponentials of products: kernels equal torch in float64, gradients through the maximum included."""

import pytest
import torch
from interpreter import interpreted
from torch.utils.flop_counter import FlopCounterMode

from models import performer
from models.exponentials import stable_exponentials
from models.performer import favor_attention, favor_attention_packed, orthogonal_features


def test_exponentials_are_those_of_the_formula_and_at_most_one_and_eps_at_the_own_maximum():
    x, features = torch.randn(7, 2, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    energy = x.square().sum(dim=-1) / 2
    found = stable_exponentials(x, features, energy, lambda top: top, 1e-2)
    for t in range(7):
        for h in range(2):
            products = [float(w @ x[t, h]) for w in features]
            least = max(products) + float(energy[t, h])
            expected = torch.tensor([p - least for p in products], dtype=torch.float64).exp() + 1e-2
            torch.testing.assert_close(found[t, h], expected, rtol=0, atol=1e-12)
    assert found.max() <= 1 + 1e-2


def test_products_of_kernels_are_counted():
    with torch._subclasses.fake_tensor.FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, features = torch.empty(10, 2, 8, requires_grad=True), torch.empty(6, 8)
        top, _ = torch.ops.lra.row_top(x, features)
        out = torch.ops.lra.row_exponentials(x, features, top, 1e-2)
        torch.autograd.grad(out.sum(), x)
    assert counter.get_total_flops() == 4 * 2 * 10 * 2 * 8 * 6


@pytest.mark.slow
def test_performer_by_kernels_in_the_interpreter_equals_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Results in half precision are rounded to it."""
    found = interpreted("exponentials")
    assert len(found) == 7
    limits = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
    for name, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (name, differences)


@pytest.fixture
def without_fused_kernels(monkeypatch):
    """Performer takes these where those of models/random_features.py do not fit."""
    monkeypatch.setattr(performer, "fits_kernels", lambda *tensors: False)


@pytest.mark.gpu
@pytest.mark.usefixtures("without_fused_kernels")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("d", "r"), [(32, 256), (64, 130), (5, 3), (33, 64)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float16, 2e-3)])
def test_performer_by_kernels_equals_float64_in_outputs_and_gradients(packed, d, r, dtype, limit):
    features = orthogonal_features(r, d, torch.Generator().manual_seed(0)).cuda()
    if packed:
        made = torch.randn(1000, 3, 2, d, device="cuda").to(dtype).unbind(1)
        cu_seqlens = torch.tensor([0, 600, 600, 601, 990], dtype=torch.int32, device="cuda")
        attend = lambda *x, w: favor_attention_packed(*x, cu_seqlens, 600, features=w, eps=1e-2)  # noqa: E731
    else:
        made = torch.randn(3, 2, 3, 200, d, device="cuda").to(dtype).unbind(2)
        mask = torch.rand(3, 200, device="cuda") < 0.6
        attend = lambda *x, w: favor_attention(*x, mask, features=w, eps=1e-2)  # noqa: E731
    found = []
    for to in (dtype, dtype, torch.float64):
        leaves = [x.detach().to(to).requires_grad_() for x in made]
        out = attend(*leaves, w=features.to(torch.promote_types(to, torch.float32)))
        weights = torch.linspace(-1, 2, out.numel(), device="cuda", dtype=torch.float64).view(out.shape)
        found.append([out, *torch.autograd.grad((out.double() * weights).sum(), leaves)])
    for a, again, b in zip(*found, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= limit * b.norm()
        assert torch.equal(a, again)  # bit by bit


@pytest.mark.gpu
@pytest.mark.usefixtures("without_fused_kernels")
def test_performer_by_kernels_is_compiled_whole_for_any_number_of_rows():
    torch._dynamo.reset()
    features = orthogonal_features(256, 32, torch.Generator().manual_seed(0)).cuda()
    call = torch.compile(favor_attention_packed, fullgraph=True, dynamic=True)
    for lengths in ((300, 0, 64), (2, 500, 0, 129), (1, 9, 0, 4)):
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        found = []
        made = torch.randn(sum(lengths) + 3, 3, 2, 32, device="cuda")
        for f in (favor_attention_packed, call):
            leaf = made.clone().requires_grad_()
            out = f(*leaf.unbind(1), cu_seqlens, max(lengths), features=features)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
