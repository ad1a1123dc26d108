"""Kernelized attention: what has no normaliser behaves so; its scale; padding; large inputs."""

import pytest
import torch

from models import Place, build
from models.kernelized import kernelized_attention
from models.landmarks import gaussian_kernel

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=50)


def qkv(length=13, d=8, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, d, dtype=dtype).unbind(0)


def test_kernel_is_one_on_the_diagonal_and_below_one_elsewhere():
    x = torch.randn(9, 4, dtype=torch.float64)
    kernel = gaussian_kernel(x, x)
    torch.testing.assert_close(kernel.diagonal(), torch.ones(9, dtype=torch.float64), **EXACT)
    assert (kernel - kernel.diagonal().diag() < 1).all()
    torch.testing.assert_close(kernel, kernel.mT, **EXACT)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6])
def test_kernel_of_large_float32_inputs_stays_between_zero_and_one(size):
    x = (size * torch.randn(64, 32)).requires_grad_()
    kernel = gaussian_kernel(x, x)
    assert kernel.min() >= 0 and kernel.max() <= 1
    kernel.square().sum().backward()
    assert x.grad.isfinite().all()


def test_kernel_keeps_nothing_but_its_inputs_and_itself_for_the_gradient():
    x, y = torch.randn(50, 4, requires_grad=True), torch.randn(60, 4, requires_grad=True)
    kept = set()

    def keep(saved):
        if saved.numel() == 50 * 60:
            kept.add(saved.untyped_storage().data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        kernel = gaussian_kernel(x, y)
    assert kept == {kernel.untyped_storage().data_ptr()}


def test_tokens_all_alike_give_the_sum_of_values_and_not_their_mean():
    q, _, v = qkv()
    q = q[:, :, :1].expand_as(q)
    expected = v.sum(dim=2, keepdim=True).expand_as(v)
    torch.testing.assert_close(kernelized_attention(q, q, v), expected, **EXACT)


def test_more_tokens_make_the_output_larger():
    q, k, v = qkv()
    twice = kernelized_attention(q, *(torch.cat([x, x], dim=2) for x in (k, v)))
    torch.testing.assert_close(twice, 2 * kernelized_attention(q, k, v), **EXACT)


def test_scale_width_32_is_the_constant_of_the_skyformer_code_whatever_the_head():
    q, k, v = qkv()
    squares = (q[:, :, :, None] - k[:, :, None]).square().sum(dim=-1) * 32**-0.5
    expected = torch.exp(-squares / 2) @ v
    torch.testing.assert_close(kernelized_attention(q, k, v, scale_width=32), expected, **EXACT)
    assert (kernelized_attention(q, k, v) - expected).abs().max() > 1e-2


def test_masked_row_equals_the_row_cut_to_its_length():
    q, k, v = qkv()
    mask = torch.arange(13) < torch.tensor([13, 6])[:, None]
    cut = kernelized_attention(*(x[1:, :, :6] for x in (q, k, v)))
    torch.testing.assert_close(kernelized_attention(q, k, v, mask)[1:, :, :6], cut, **EXACT)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = kernelized_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_far_tokens_at_padding_neither_overflow_nor_count():
    q, k, v = qkv(dtype=torch.float32)
    mask = torch.arange(13) < torch.tensor([[13], [6]])
    clean = kernelized_attention(q, k, v, mask)
    poison = [torch.where(mask[:, None, :, None], x, 1e15) for x in (q, k, v)]  # their squares are infinite
    torch.testing.assert_close(kernelized_attention(*poison, mask), clean, rtol=0, atol=0)


def test_gradcheck():
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in qkv(length=3, d=4)]
    assert torch.autograd.gradcheck(lambda q, k, v: kernelized_attention(q, k, v, mask), leaves)


def test_autocast_leaves_the_exponents_in_float32():
    q, k, v = (3 * x for x in qkv(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = kernelized_attention(q, k, v)
    expected = kernelized_attention(q, k, v)
    assert (
        found - expected
    ).abs().max() < 2e-2 * expected.abs().max()  # the last product alone is in bfloat16


@pytest.mark.parametrize("scale_width", [0, -4, 1.5])
def test_values_that_make_no_sense_are_refused(scale_width):
    with pytest.raises(ValueError, match="kernelized needs scale_width"):
        build("kernelized", PLACE, scale_width=scale_width)
