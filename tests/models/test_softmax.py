"""Softmax attention: both kernels and every packed path are the same function."""

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.softmax import LOOP_PAYS_FROM, softmax_by_sequence, softmax_fused, softmax_math, softmax_varlen

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
CU_SEQLENS = torch.tensor([0, 5, 5, 36, 37], dtype=torch.int32)  # one sequence is empty


def qkv(length=13, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, 4, dtype=dtype).unbind(0)


def masks(length=13):
    prefix = torch.arange(length) < torch.tensor([length, 4])[:, None]
    holes = torch.rand(2, length) < 0.6
    return [None, prefix, holes]


@pytest.mark.parametrize("kernel", [softmax_math, softmax_fused])
def test_kernel_equals_dense_attention(kernel):
    q, k, v = qkv()
    for mask in masks():
        torch.testing.assert_close(kernel(q, k, v, mask), dense_attention(q, k, v, mask), **EXACT)


@pytest.mark.parametrize("kernel", [softmax_math, softmax_fused])
def test_row_without_real_keys_gives_zeros_and_finite_gradients(kernel):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = kernel(q, k, v, torch.tensor([[True] * 13, [False] * 13]))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("kernel", [softmax_math, softmax_fused])
def test_gradcheck(kernel):
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in qkv(length=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: kernel(q, k, v, mask), leaves)


@pytest.mark.parametrize("kernel", ["fused", "math"])
def test_packed_path_equals_each_sequence_alone(kernel):
    mechanism = build("softmax", Place(d_model=8, num_heads=2, max_len=40), kernel=kernel).double()
    x = torch.randn(37, 8, dtype=torch.float64)
    packed = mechanism.forward_packed(x, CU_SEQLENS, 40)
    alone = [mechanism(part[None])[0] for part in x.split(CU_SEQLENS.diff().tolist()) if len(part)]
    torch.testing.assert_close(packed, torch.cat(alone), **EXACT)


@pytest.mark.parametrize("kernel", ["fused", "math"])
def test_dropout_acts_on_weights_and_in_training_only(kernel):
    mechanism = build("softmax", Place(d_model=8, num_heads=2, max_len=9), kernel=kernel, attn_dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(mechanism(x), mechanism(x))
    mechanism.eval()
    assert torch.equal(mechanism(x), mechanism(x))


def test_the_loop_over_sequences_drops_weights_in_training_only():
    place = Place(d_model=8, num_heads=2, max_len=LOOP_PAYS_FROM)
    mechanism = build("softmax", place, kernel="fused", attn_dropout=0.5)
    x = torch.randn(37, 8)
    first, second = (mechanism.forward_packed(x, CU_SEQLENS, LOOP_PAYS_FROM) for _ in range(2))
    assert not torch.equal(first, second)
    mechanism.eval()
    first, second = (mechanism.forward_packed(x, CU_SEQLENS, LOOP_PAYS_FROM) for _ in range(2))
    assert torch.equal(first, second)
    q = torch.zeros(400, 1, 4)  # weights of 1 / 400, read off with a unit vector for each value
    v = torch.eye(400).unsqueeze(1)
    weights = softmax_by_sequence(q, q, v, torch.tensor([0, 400]), dropout=0.5)
    assert (weights == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_loop_over_sequences_leaves_zeros_in_filler_rows():
    q, k, v = torch.randn(3, 45, 2, 4).unbind(0)
    out = softmax_by_sequence(q, k, v, CU_SEQLENS)
    assert out.shape == v.shape and not out[37:].any() and out[:37].all()


def test_the_explicit_kernel_alone_claims_quadratic_memory():
    place = Place(d_model=8, num_heads=2, max_len=9)
    assert not build("softmax", place, kernel="fused").traits.quadratic_memory
    assert "quadratic_memory" in build("softmax", place, kernel="math").traits.exceptions()


def test_unknown_kernel_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown kernel 'flash'.*fused, math"):
        build("softmax", Place(d_model=8, num_heads=2, max_len=9), kernel="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_kernel_equals_one_call_per_sequence(dtype):
    q, k, v = torch.randn(3, 37, 2, 64, device="cuda", dtype=dtype).unbind(0)
    cu_seqlens = CU_SEQLENS.cuda()
    expected = softmax_by_sequence(q.double(), k.double(), v.double(), cu_seqlens)
    found = softmax_varlen(q, k, v, cu_seqlens, 31).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)  # bfloat16 keeps 8 bits of values near 3
