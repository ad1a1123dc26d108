"""Hedgehog: its three feature maps, its start, and what its stabiliser may not do."""

import pytest
import torch

from models import Place, build
from models.hedgehog import features, hedgehog_attention

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
    torch.testing.assert_close(features(y, torch.tensor(0.0), "exp"), exp, **EXACT)
    halves = torch.cat([exp[:2] / exp[:2].sum(), exp[2:] / exp[2:].sum()])
    torch.testing.assert_close(features(y, torch.tensor(0.0), "softmax"), halves, **EXACT)
    torch.testing.assert_close(features(y, torch.tensor(0.0), "joint"), exp**2 / (exp**2).sum(), **EXACT)


@pytest.mark.parametrize("feature_map", MAPS)
def test_maps_start_as_the_identity(feature_map):
    mechanism = build("hedgehog", PLACE, feature_map=feature_map).double()
    q, k, v = qkv()
    kernel = features(q, torch.tensor(0.0), feature_map) @ features(k, torch.tensor(0.0), feature_map).mT
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


def test_padding_takes_no_part_in_the_stabiliser():
    q, k, v = qkv()
    mask, own = torch.arange(13) < torch.tensor([13, 9])[:, None], maps()
    k[1, :, 9:] *= 30  # would raise the maximum, and with it the weight of eps
    cut = hedgehog_attention(q[1:, :, :9], k[1:, :, :9], v[1:, :, :9], maps=own, eps=1e-2)
    found = hedgehog_attention(q, k, v, mask, maps=own, eps=1e-2)[1:, :, :9]
    torch.testing.assert_close(found, cut, **EXACT)


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
    mechanism = build("hedgehog", PLACE, feature_map=feature_map, eps=1e-2).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 40), alone, **EXACT)


@pytest.mark.parametrize(
    ("own", "said"), [({"feature_map": "elu"}, "choose from: exp"), ({"eps": 0.0}, "eps > 0")]
)
def test_values_that_make_no_sense_are_refused(own, said):
    with pytest.raises(ValueError, match=said):
        build("hedgehog", PLACE, **own)
