"""Performer: its error against softmax falls as r^(-1/2); its features and redraws are as they should be."""

import math

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.performer import favor_attention, orthogonal_features

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)


def qkv(length=13, d=8, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, d, dtype=dtype).unbind(0)


def features(r=24, d=8, seed=0):
    return orthogonal_features(r, d, torch.Generator().manual_seed(seed)).double()


def test_error_against_softmax_falls_as_the_root_of_the_number_of_features():
    q, k, v = qkv(length=32)
    q, k = 0.4 * q, 0.4 * k  # at norms of 3 and more the estimate has a tail that 2048 features do not reach
    exact, sizes, errors = dense_attention(q, k, v), (32, 128, 512, 2048), []
    for r in sizes:
        draws = [favor_attention(q, k, v, features=features(r, seed=s)) - exact for s in range(40)]
        errors.append(torch.stack(draws).square().mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])
    assert -0.55 < slope < -0.45, errors  # -0.5 up to the noise of 40 draws
    assert errors == sorted(errors, reverse=True)


def test_features_are_orthogonal_in_blocks_and_as_long_as_gaussian_rows():
    w = features(r=20, d=8)
    for block in w.split(8):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-5)  # float32 rounding
    squares = features(r=8 * 4000, d=8).square().sum(dim=-1)  # chi squared with 8 degrees of freedom
    assert squares.mean().item() == pytest.approx(
        8, rel=0.02
    )  # four standard errors: 4 * sqrt(16 / 32000) = 0.09
    assert squares.var().item() == pytest.approx(16, rel=0.1)


def test_each_feature_row_is_standard_normal():
    draws = torch.stack([features(r=3, d=3, seed=s) for s in range(4000)])
    covariance = torch.einsum("ndi,ndj->dij", draws, draws) / len(draws)
    torch.testing.assert_close(
        covariance, torch.eye(3).double().expand(3, 3, 3), rtol=0, atol=0.12
    )  # 5 errors
    assert draws.mean(dim=0).abs().max() < 0.08  # a basis without its signs is off by 0.4 here


def test_parity_with_performer_pytorch():
    package = pytest.importorskip("performer_pytorch", exc_type=ImportError)
    q, k, v = qkv(length=50)
    oracle = package.FastAttention(8, nb_features=24).double()
    oracle.projection_matrix.copy_(features())
    found = favor_attention(q, k, v, features=features(), eps=1e-4)
    torch.testing.assert_close(found, oracle(q, k, v), **EXACT)


def test_padding_takes_part_neither_in_the_stabiliser_nor_in_the_normaliser():
    q, k, v = qkv()
    mask = torch.arange(13) < torch.tensor([13, 9])[:, None]
    k[1, :, 9:] *= 30  # would raise the maximum, and with it the weight of eps
    cut = favor_attention(q[1:, :, :9], k[1:, :, :9], v[1:, :, :9], features=features(), eps=1e-2)
    found = favor_attention(q, k, v, mask, features=features(), eps=1e-2)[1:, :, :9]
    torch.testing.assert_close(found, cut, **EXACT)


def test_large_queries_and_keys_stay_finite():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = favor_attention(100 * q, 100 * k, v, features=features())
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = favor_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]), features=features(), eps=1e-6)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
def test_gradcheck(eps):
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in qkv(length=3)]
    w = features()
    attend = lambda q, k, v: favor_attention(q, k, v, mask, features=w, eps=eps)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves)


def test_autocast_leaves_the_sums_in_float32():
    q, k, v = qkv(length=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = favor_attention(q, k, v, features=features())
    torch.testing.assert_close(found, favor_attention(q, k, v, features=features()), rtol=0, atol=1e-6)


def test_packed_path_equals_each_sequence_alone():
    mechanism = build("performer", PLACE, eps=1e-2).double()
    x = torch.randn(167, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 166, 167], dtype=torch.int32)
    alone = [mechanism(part[None])[0] for part in x.split(cu_seqlens.diff().tolist()) if len(part)]
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), torch.cat(alone), **EXACT)


def test_features_are_decided_by_seed_and_layer_and_saved():
    first = build("performer", PLACE)
    assert torch.equal(first.features, build("performer", PLACE).features)
    assert not torch.equal(first.features, build("performer", PLACE, feature_seed=1).features)
    later = Place(d_model=16, num_heads=2, max_len=200, layer_index=1, num_layers=2)
    assert not torch.equal(first.features, build("performer", later).features)
    assert "features" in first.state_dict()


def test_features_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    orthogonal_features(24, 8, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_redraws_happen_every_so_many_steps_in_place_and_are_decided_by_the_step():
    mechanism = build("performer", PLACE, redraw_every=10)
    address, seen = mechanism.features.data_ptr(), []
    for step in range(30):
        mechanism.training_update(step)
        seen.append(mechanism.features.clone())
    assert mechanism.features.data_ptr() == address
    changed = [step for step in range(1, 30) if not torch.equal(seen[step], seen[step - 1])]
    assert changed == [10, 20]
    resumed = build("performer", PLACE, redraw_every=10)
    resumed.training_update(20)
    assert torch.equal(resumed.features, seen[20])


def test_features_are_never_redrawn_by_default():
    mechanism = build("performer", PLACE)
    before = mechanism.features.clone()
    for step in (0, 1, 1000):
        mechanism.training_update(step)
    assert torch.equal(before, mechanism.features)


@pytest.mark.parametrize("own", [{"eps": 0.0}, {"num_features": 0}, {"redraw_every": -1}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="performer needs"):
        build("performer", PLACE, **own)
