"""Linear attention: dense attention with its own kernel, normalised, and summed in full precision."""

import torch

from models import Place, build
from models.linear import feature_map, linear_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=13, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, 4, dtype=dtype).unbind(0)


def test_equals_dense_attention_with_its_kernel():
    q, k, v = qkv()
    mask = torch.rand(2, 13) < 0.6
    kernel = (feature_map(q) @ feature_map(k).mT) * mask[:, None, None, :]
    expected = kernel / kernel.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(linear_attention(q, k, v, mask), expected, **EXACT)


def test_weights_sum_to_one():
    q, k, _ = qkv()
    torch.testing.assert_close(linear_attention(q, k, torch.ones_like(q)), torch.ones_like(q), **EXACT)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = linear_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradcheck():
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in qkv(length=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: linear_attention(q, k, v, mask), leaves)


def test_half_precision_sums_do_not_drift_over_a_long_sequence():
    q, k, v = (x.half() for x in qkv(length=8000))
    found = linear_attention(q, k, v + 1).double()
    exact = linear_attention(q.double(), k.double(), (v + 1).double())
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)  # one rounding of the result to 11 bits


def test_autocast_leaves_the_sums_in_float32():
    q, k, v = qkv(length=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_attention(q, k, v)
    torch.testing.assert_close(found, linear_attention(q, k, v), rtol=0, atol=1e-6)


def test_packed_path_equals_each_sequence_alone():
    mechanism = build("linear", Place(d_model=8, num_heads=2, max_len=200)).double()
    x = torch.randn(167, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 166, 167], dtype=torch.int32)
    alone = [mechanism(part[None])[0] for part in x.split(cu_seqlens.diff().tolist()) if len(part)]
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), torch.cat(alone), **EXACT)
