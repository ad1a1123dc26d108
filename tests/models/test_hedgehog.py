"""Hedgehog: its three feature maps, its start, and what its stabiliser may not do."""

import pytest
import torch

from models import Place, build
from models.hedgehog import hedgehog_attention, hedgehog_attention_packed, log_features

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=8, num_heads=2, max_len=40)
MAPS = ("exp", "softmax", "joint")


def qkv(length=13, d=4):
    return torch.randn(3, 2, 2, length, d, dtype=torch.float64).unbind(0)


def maps(d=4, dtype=torch.float64):
    return tuple(torch.randn(*shape, dtype=dtype) for shape in [(2, d, d), (2, d)] * 2)


def test_feature_maps_by_hand():
    y = torch.tensor([1.0, -2.0]).double()
    exp = torch.tensor([1.0, -2.0, -1.0, 2.0]).double().exp()
    torch.testing.assert_close(log_features(y, "exp").exp(), exp, **EXACT)
    halves = torch.cat([exp[:2] / exp[:2].sum(), exp[2:] / exp[2:].sum()])
    torch.testing.assert_close(log_features(y, "softmax").exp(), halves, **EXACT)
    torch.testing.assert_close(log_features(y, "joint").exp(), exp**2 / (exp**2).sum(), **EXACT)


@pytest.mark.parametrize("feature_map", MAPS)
def test_maps_start_as_the_identity(feature_map):
    mechanism = build("hedgehog", PLACE, feature_map=feature_map).double()
    q, k, v = qkv()
    kernel = log_features(q, feature_map).exp() @ log_features(k, feature_map).exp().mT
    torch.testing.assert_close(
        mechanism.attend(q, k, v, None), kernel / kernel.sum(dim=-1, keepdim=True) @ v, **EXACT
    )


def test_the_stabiliser_of_exp_cancels():
    q, k, v = qkv()
    weight_q, bias_q, weight_k, bias_k = own = maps()
    y_q, y_k = (q @ weight_q + bias_q[:, None])[:, :, :, None], (k @ weight_k + bias_k[:, None])[:, :, None]
    kernel = torch.cosh(y_q + y_k).sum(dim=-1)
    expected = kernel / kernel.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(hedgehog_attention(q, k, v, maps=own), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("feature_map", MAPS)
def test_large_queries_and_keys_stay_finite(feature_map):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = hedgehog_attention(1e4 * q, 1e4 * k, v, maps=maps(dtype=torch.float32), feature_map=feature_map)
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))


def exact_weights(q, k, own, feature_map):
    """[b h l l] in logarithms throughout, row by row of the kernel's sum over features."""
    weight_q, bias_q, weight_k, bias_k = own
    f_q = log_features(q @ weight_q + bias_q[:, None], feature_map)
    f_k = log_features(k @ weight_k + bias_k[:, None], feature_map)
    return torch.logsumexp(f_q[:, :, :, None] + f_k[:, :, None], dim=-1).softmax(dim=-1)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("size", [1, 20, 200])
def test_large_activations_follow_the_formula(feature_map, size):
    q, k, v = qkv(length=40)
    q, k, own = size * q, size * k, maps()
    expected = exact_weights(q, k, own, feature_map) @ v
    found = hedgehog_attention(q, k, v, maps=own, feature_map=feature_map)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # exponents of 1e3 and rounding of 1e-16
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, 40, 80], dtype=torch.int32)
    for max_len in (40, 300):  # one chunk a sequence, and chunks of 64
        packed = hedgehog_attention_packed(*rows, cu_seqlens, max_len, maps=own, feature_map=feature_map)
        packed = packed.unflatten(0, (2, 40)).transpose(1, 2)
        torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("feature_map", MAPS)
def test_large_activations_keep_float32_precision(feature_map):
    q, k, v = qkv(length=40)
    own = maps()
    expected = exact_weights(20 * q, 20 * k, own, feature_map) @ v
    half = tuple(x.float() for x in own)
    found = hedgehog_attention(20 * q.float(), 20 * k.float(), v.float(), maps=half, feature_map=feature_map)
    assert (found - expected).square().mean().sqrt() < 1e-4  # exponents of 1e2 round at 1e-5


def test_padding_takes_no_part_in_the_stabiliser():
    q, k, v = (x.float() for x in qkv())
    mask, own = torch.arange(13) < torch.tensor([13, 9])[:, None], maps(dtype=torch.float32)
    k[1, :, 9:] *= 1e4  # a maximum over these would leave nothing of the others
    cut = hedgehog_attention(q[1:, :, :9], k[1:, :, :9], v[1:, :, :9], maps=own)
    found = hedgehog_attention(q, k, v, mask, maps=own)[1:, :, :9]
    torch.testing.assert_close(found, cut, rtol=0, atol=1e-6)


@pytest.mark.parametrize("feature_map", MAPS)
def test_row_without_real_keys_gives_zeros_and_finite_gradients(feature_map):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    mask = torch.tensor([[True] * 13, [False] * 13])
    out = hedgehog_attention(q, k, v, mask, maps=maps(dtype=torch.float32), feature_map=feature_map)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("feature_map", MAPS)
def test_packed_path_equals_each_sequence_alone(feature_map):
    mechanism = build("hedgehog", PLACE, feature_map=feature_map).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 40), alone, **EXACT)


def test_an_unknown_feature_map_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown feature_map 'elu' for hedgehog; choose from: exp, softmax"):
        build("hedgehog", PLACE, feature_map="elu")
