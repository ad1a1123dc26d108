"""YOSO: the sample and its gradient tend to the expectation and its bound; gradients, padding and options."""

import math
from functools import wraps

import pytest
import torch

from lra.conformance import ALL_CHECKS, subject
from models import Place, build
from models.common import Traits
from models.yoso import Yoso, collect, hash_codes, weighted, yoso_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)
CHECKS = {check.__name__: check for check in ALL_CHECKS}


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(length=30, d=8):
    return drawn(3, 2, 2, length, d).unbind(0)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def slope(sizes, errors):
    return math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])


def test_error_of_the_sample_falls_as_the_root_of_the_number_of_hashes():
    (q, k, v), bits, sizes, errors = qkv(), 3, (8, 32, 128, 512), []
    exact = (1 - (unit(q) @ unit(k).mT).acos() / math.pi) ** bits @ v
    for number in sizes:
        draws = []
        for _ in range(6):
            planes = drawn(2, 8, number * bits)
            codes = [hash_codes(x, planes, bits) for x in (k, q)]
            draws.append(collect(v, *codes, bits) - exact)
        errors.append(torch.stack(draws).square().mean().sqrt().item())
    assert -0.6 < slope(sizes, errors) < -0.4, errors  # -0.5 up to the noise of six draws
    assert errors == sorted(errors, reverse=True)


def test_sampled_gradients_tend_to_those_of_the_bound_and_are_unbiased():
    (q, k, v), bits, sizes, errors = qkv(length=12), 2, (16, 256, 4096), []
    q, k, grad = unit(q), unit(k), drawn(2, 2, 12, 8)
    chance = (1 - (q @ k.mT).acos() / math.pi) ** bits
    exact = (grad @ v.mT * chance) @ k
    for number in sizes:
        planes = drawn(2, 8, number * bits)
        codes = [hash_codes(x, planes, bits) for x in (k, q)]
        errors.append((weighted(grad, v, k, *codes, bits) - exact).square().mean().sqrt().item())
    assert -0.6 < slope(sizes, errors) < -0.4, errors


def test_the_sample_as_a_layer_tends_to_the_expectation():
    (q, k, v), errors = qkv(), []
    exact = yoso_attention(q, k, v, bits=3)
    for number in (16, 1024):
        found = yoso_attention(q, k, v, bits=3, planes=drawn(2, 8, number * 3))
        errors.append((found - exact).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 4  # by 8 in the mean


def test_hash_codes_are_numbers_of_sign_bits():
    x, planes = drawn(1, 1, 5, 4), drawn(1, 4, 2 * 3)
    codes = hash_codes(x, planes, 3)
    for m in range(2):
        for i in range(5):
            bits = [float(x[0, 0, i] @ planes[0, :, 3 * m + t]) > 0 for t in range(3)]
            assert codes[m, 0, 0, i] == sum(2**t for t, one in enumerate(bits) if one)


def test_the_bound_lies_below_the_derivative():
    x = torch.linspace(-0.999, 0.999, 999, dtype=torch.float64)
    for bits in (1, 2, 9, 16):
        chance = (1 - x.acos() / math.pi) ** bits
        derivative = bits / math.pi * (1 - x.acos() / math.pi) ** (bits - 1) / (1 - x.square()).sqrt()
        assert (bits / 2 * chance <= derivative + 1e-12).all()


def test_parallel_and_opposite_vectors_have_finite_values_and_gradients():
    q, _, v = (x.float().requires_grad_() for x in qkv())
    for sign in (1, -1):
        for exact in (True, False):
            out = yoso_attention(q, sign * 2 * q, v, bits=9, exact_gradient=exact)
            grads = torch.autograd.grad(out.square().sum() + out.sum(), (q, v))
            assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 11), (torch.float32, 16), (torch.float64, 16)])
def test_outputs_of_queries_nearly_opposite_to_their_keys_have_length_one_too(dtype, bits):
    """The only key is met with a chance of down to 1e-32, and |y| is as small."""
    for cosine in (-0.5, -0.9, -0.99, -0.9995):
        q = torch.tensor([[[[1.0, 0.0]]]], dtype=dtype)
        k = torch.tensor([[[[cosine, (1 - cosine**2) ** 0.5]]]], dtype=dtype)
        v = torch.tensor([[[[3.0, 4.0]]]], dtype=dtype).requires_grad_()
        found = yoso_attention(q, k, v, bits=bits)
        torch.testing.assert_close(found, v.detach() / 5, rtol=1e-6, atol=0)  # float32 rounding
        (grad,) = torch.autograd.grad(found[..., 0].sum(), v)
        expected = torch.tensor([0.128, -0.096], dtype=dtype)  # (1 - 0.6^2) / 5, -0.6 * 0.8 / 5
        torch.testing.assert_close(grad[0, 0, 0], expected, rtol=1e-5, atol=1e-7)


def test_the_convolution_starts_as_torch_starts_one_of_its_shape():
    place = Place(d_model=128, num_heads=64, max_len=20)
    found = build("yoso", place, kernel_size=25).conv_weight
    usual = torch.nn.Conv2d(64, 64, (25, 1), groups=64).weight
    assert found.shape == usual.shape
    for weight in (found, usual):
        assert 0.19 < weight.abs().max() <= 0.2  # the root of 1 / 25; of 1600 numbers one is near it


def test_cosines_are_of_full_precision_under_autocast():
    """bfloat16 would make 1 of a cosine of 0.9985, whose p of 16 bits is 0.75."""
    q, k = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0], [0.9985, 0.0548]]]])
    with torch.autocast("cpu", torch.bfloat16):
        found = yoso_attention(q.expand(1, 1, 2, 2), k, torch.eye(2)[None, None], bits=16)[0, 0, 0]
    assert abs(found[1] / found[0] - (1 - math.acos(0.9985) / math.pi) ** 16) < 0.01  # p itself is rounded


def test_outputs_have_length_one_before_the_convolution():
    q, k, v = qkv()
    for planes in (None, drawn(2, 8, 40 * 2)):
        found = yoso_attention(q, k, v, bits=2, planes=planes)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 2, 30, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("sampled", [False, True])
def test_row_without_real_keys_gives_zeros_and_finite_gradients(sampled):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    mask = torch.tensor([[True] * 30, [False] * 30])
    out = yoso_attention(q, k, v, mask, bits=3, planes=torch.randn(2, 8, 15) if sampled else None)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradcheck():
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    leaves = [*(x.requires_grad_() for x in qkv(length=7, d=4)), drawn(2, 1, 3, 1).requires_grad_()]

    def attend(q, k, v, weight):
        return yoso_attention(q, k, v, mask, bits=9, exact_gradient=True, conv_weight=weight)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_values_of_the_sample_have_their_own_derivative():
    (q, k, v), planes = qkv(length=7, d=4), drawn(2, 4, 6)
    assert torch.autograd.gradcheck(
        lambda v: yoso_attention(q, k, v, bits=2, planes=planes), [v.requires_grad_()]
    )


@pytest.mark.parametrize("own", [{}, {"expectation": False, "num_hashes": 3}])
def test_a_surrogate_gradient_is_claimed_and_seen(own):
    assert "surrogate_gradient" in build("yoso", PLACE, **own).traits.exceptions()
    assert CHECKS["gradcheck"](subject("yoso", own)).status == "pass"


def test_a_surrogate_gradient_that_is_none_is_a_false_claim(monkeypatch):
    honest = Yoso.__init__

    def boast(self, place, **own):
        honest(self, place, **own)
        self.traits = Traits(surrogate_gradient=True)

    monkeypatch.setattr(Yoso, "__init__", wraps(honest)(boast))
    found = CHECKS["gradcheck"](subject("yoso", {"exact_gradient": True}))
    assert found.status == "fail" and "yet all derivatives match" in found.detail


def test_the_sampled_form_compiles_without_a_break():
    layer = build("yoso", PLACE, expectation=False, bits=2, num_hashes=3, redraw_every=0)
    x, grads = torch.randn(2, 9, 16), []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch._dynamo.reset()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)  # float32 in another order


def test_only_the_expectation_is_quadratic():
    assert build("yoso", PLACE).traits.quadratic_memory
    assert not build("yoso", PLACE, expectation=False).traits.quadratic_memory


def test_planes_change_in_training_and_are_those_of_the_seed_in_evaluation():
    layer = build("yoso", PLACE, expectation=False, num_hashes=2)
    layer.training_update(0)
    first = layer.directions.clone()
    layer.training_update(1)
    assert not torch.equal(first, layer.directions)
    assert torch.equal(
        layer.eval().directions, build("yoso", PLACE, expectation=False, num_hashes=2).fixed_directions
    )
    assert not list(build("yoso", PLACE).buffers())


@pytest.mark.parametrize(
    "own",
    [
        {"num_hashes": 5},
        {"hash_seed": 3},
        {"redraw_every": 5},
        {"expectation": False, "exact_gradient": True},
    ],
)
def test_options_that_would_do_nothing_are_refused(own):
    with pytest.raises(ValueError, match="yoso with expectation"):
        build("yoso", PLACE, **own)


@pytest.mark.parametrize(
    "own", [{"bits": 0}, {"bits": 17}, {"num_hashes": 0}, {"kernel_size": 4}, {"redraw_every": -1}]
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="yoso needs"):
        build("yoso", PLACE, **own)
