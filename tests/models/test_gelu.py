"""GELU of fewer operations: beside float64, over every number of half precision."""

import pytest
import torch
import torch.nn.functional as F

from models.gelu import FewerOperations, gelu


def every(dtype, device="cpu"):
    """All finite numbers of a type of 16 bits."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def with_slope(call, x):
    x = x.detach().clone().requires_grad_()
    out = call(x)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def places(x):
    """The rank of each among the numbers of its type; both zeros have one."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def units_away(call, dtype, device="cpu"):
    """Of output and slope: how many numbers of the type lie between them and float64's, rounded."""
    x = every(dtype, device)
    pairs = zip(with_slope(call, x), with_slope(F.gelu, x.double()), strict=True)
    return [(places(a) - places(b.to(dtype))).abs() for a, b in pairs]


def test_it_is_within_one_unit_of_exact_for_every_float16():
    for fewer, torchs in zip(
        units_away(FewerOperations.apply, torch.float16), units_away(F.gelu, torch.float16), strict=True
    ):
        assert fewer.max() <= 1
        differs, torch_differs = ((away > 0).float().mean() for away in (fewer, torchs))
        assert differs <= torch_differs < 0.01


def test_it_is_exact_for_almost_every_bfloat16_and_at_most_a_rounding_of_float32_away():
    x = every(torch.bfloat16)
    x = x[x.abs() < 1e4]  # torch's float64 GELU is finite there, and so are its slopes
    pairs = zip(with_slope(FewerOperations.apply, x), with_slope(F.gelu, x.double()), strict=True)
    for found, exact in pairs:
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=3e-7)


def test_large_numbers_of_both_signs_give_themselves_and_zero():
    x = torch.tensor([-65504.0, -300.0, 300.0, 65504.0], dtype=torch.float16)
    out, slope = with_slope(FewerOperations.apply, x)
    assert out.tolist() == [0.0, 0.0, 300.0, 65504.0]
    assert slope.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_infinity_gives_infinity_and_minus_infinity_zero(dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    out, slope = with_slope(FewerOperations.apply, x)
    assert out[:2].tolist() == [torch.inf, 0.0] and out[2].isnan()
    assert slope.isnan().all() and with_slope(F.gelu, x)[1].isnan().all()  # torch's at infinity too


def test_the_compiler_traces_it_whole_for_any_number_of_rows():
    torch._dynamo.reset()
    call = torch.compile(FewerOperations.apply, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        x = torch.randn(rows, 5).half()
        for a, b in zip(with_slope(call, x), with_slope(FewerOperations.apply, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_cpu_it_is_the_gelu_of_torch(dtype):
    x = torch.randn(100, dtype=dtype)
    assert torch.equal(gelu(x), F.gelu(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_without_a_compiler_it_is_the_gelu_of_torch_bit_by_bit(dtype):
    x = torch.randn(3000, device="cuda", dtype=dtype)
    for found, expected in zip(with_slope(gelu, x), with_slope(F.gelu, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_compiled_on_a_gpu_it_is_within_one_unit_of_exact_for_every_float16():
    torch._dynamo.reset()
    call = torch.compile(gelu, fullgraph=True)
    assert all(away.max() <= 1 for away in units_away(call, torch.float16, "cuda"))
    torch._dynamo.reset()
