"""Performer: its error against softmax falls as r^(-1/2); its features and redraws are as they should be."""

import math

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.performer import favor_attention, largest_of_sequence, orthogonal_features

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
    assert torch.equal(seen[20], resumed.draw(2)) and torch.equal(seen[0], resumed.draw(0))


def test_features_are_never_redrawn_by_default():
    mechanism = build("performer", PLACE)
    before = mechanism.features.clone()
    for step in (0, 1, 1000):
        mechanism.training_update(step)
    assert torch.equal(before, mechanism.features)


def test_double_scaling_gives_softmax_of_scores_over_d():
    """In place of d^(1/2): both sides are divided by d^(1/4) twice."""
    q, k, v = qkv(length=32)
    softer = dense_attention(q, k, v, scale=1 / 8)
    draws = [favor_attention(q, k, v, features=features(512, seed=s), double_scaling=True) for s in range(40)]
    error = (torch.stack(draws).mean(dim=0) - softer).square().mean().sqrt()
    other = (torch.stack(draws).mean(dim=0) - dense_attention(q, k, v)).square().mean().sqrt()
    assert error < 0.02 < 0.05 < other, (error, other)


def test_relu_kernel_of_the_benchmark_takes_queries_and_keys_as_they_are():
    q, k, v = qkv()
    expected = torch.zeros_like(v)
    for i in range(13):
        weights = [
            ((q[:, :, i].clamp(min=0) + 1e-3) * (k[:, :, j].clamp(min=0) + 1e-3)).sum(-1) for j in range(13)
        ]
        total = torch.stack(weights).sum(dim=0)
        expected[:, :, i] = sum((w / total)[..., None] * v[:, :, j] for j, w in enumerate(weights))
    found = favor_attention(q, k, v, features=None, eps=1e-3, kernel="relu")
    torch.testing.assert_close(found, expected, **EXACT)


def test_zero_padding_counts_padding_as_zero_keys_and_values():
    own = {"zero_padding": True, "num_features": 24}
    quirk, plain = build("performer", PLACE, **own), build("performer", PLACE, num_features=24)
    q, k, v = (x.float() for x in qkv())
    mask = torch.arange(13) < torch.tensor([13, 9])[:, None]
    found = quirk.attend(q, k, v, mask)
    k, v = k * mask[:, None, :, None], v * mask[:, None, :, None]
    torch.testing.assert_close(found, plain.attend(q, k, v, None), rtol=0, atol=1e-6)
    assert (found - plain.attend(q, k, v, mask))[1].abs().max() > 1e-2
    assert set(quirk.traits.exceptions()) == {"length_invariant"}
    assert not quirk.traits.packed


def test_coupled_stabiliser_is_one_maximum_over_all_rows_heads_and_keys_as_released_in_early_2021():
    q, k, v = qkv()
    w, k = features(), torch.cat([k[:1], 3 * k[1:]])  # the maximum is in the second row
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    scaled_q, scaled_k = q / 8**0.25, k / 8**0.25
    top = max((scaled_k[b, h, j] @ w.T).max() for b in (0, 1) for h in (0, 1) for j in range((13, 9)[b]))
    f_k = torch.exp(scaled_k @ w.T - scaled_k.square().sum(dim=-1, keepdim=True) / 2 - top) + 1e-2
    scores = scaled_q @ w.T
    energy = scaled_q.square().sum(dim=-1, keepdim=True) / 2
    f_q = torch.exp(scores - energy - scores.amax(dim=-1, keepdim=True)) + 1e-2
    kernel = (f_q @ f_k.mT) * mask[:, None, None, :]
    expected = kernel / kernel.sum(dim=-1, keepdim=True) @ v
    found = favor_attention(q, k, v, mask, features=w, eps=1e-2, coupled_stabiliser=True)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (favor_attention(q, k, v, mask, features=w, eps=1e-2) - expected).abs().max() > 1e-2
    quirk = build("performer", PLACE, coupled_stabiliser=True)
    assert set(quirk.traits.exceptions()) == {"batch_invariant"} and not quirk.traits.packed
    k[1, :, 9:] = 1e4
    found = favor_attention(q, k, v, mask, features=w, eps=1e-2, coupled_stabiliser=True)
    torch.testing.assert_close(found, expected, **EXACT)


def test_without_mask_padding_is_attended_to_and_the_traits_say_so():
    blind = build("performer", PLACE, use_mask=False).double()
    x, mask = torch.randn(2, 13, 16, dtype=torch.float64), torch.arange(13) < torch.tensor([[5], [13]])
    torch.testing.assert_close(blind(x, mask), blind(x, None), **EXACT)
    assert (blind(x, mask)[0, :5] - blind(x[:1, :5])[0]).abs().max() > 1e-3
    assert set(blind.traits.exceptions()) == {"content_invariant", "length_invariant"}
    assert not blind.traits.packed


@pytest.mark.parametrize("own", [{}, {"num_features": 0}])
def test_packed_path_of_the_relu_kernel_equals_each_sequence_alone(own):
    mechanism = build("performer", PLACE, kernel="relu", **own).double()
    x = torch.randn(20, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), alone, **EXACT)


@pytest.mark.parametrize(
    "own",
    [
        {"eps": 0.0},
        {"num_features": 0},
        {"redraw_every": -1},
        {"kernel": "relu", "double_scaling": True},
        {"kernel": "relu", "coupled_stabiliser": True},
        {"kernel": "relu", "num_features": 0, "redraw_every": 1},
        {"kernel": "relu", "num_features": 0, "feature_seed": 1},
        {"zero_padding": True, "use_mask": False},
        {"eps": math.nan},
        {"eps": math.inf},
        {"num_features": 8.0},
        {"redraw_every": 1.5},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="performer needs"):
        build("performer", PLACE, **own)


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel 'exp' for performer; choose from: softmax, relu"):
        build("performer", PLACE, kernel="exp")


def test_keys_at_padding_reach_neither_outputs_nor_gradients_however_large_they_are():
    q, k, v = (x.float() for x in qkv())
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    k[1, :, 9:] *= 1e3
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = favor_attention(*leaves, mask, features=100 * features().float())
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not grads[1][1, :, 9:].any()


def test_the_stabiliser_is_the_largest_of_its_sequence_and_its_gradient_goes_there():
    lengths, num_filler = (3, 0, 200, 70), 4
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(sum(lengths) + num_filler, 2, dtype=torch.float64)
    x[-num_filler:] = 1e3
    x.requires_grad_()
    found = largest_of_sequence(x, cu_seqlens, 200)
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad((found * weights).sum(), x)
    parts = [*lengths, num_filler]
    expected = [part.amax(dim=0) for part in x.split(parts)[:-1] if len(part)]
    torch.testing.assert_close(
        found[:-num_filler],
        torch.cat([top.expand(n, 2) for top, n in zip(expected, (3, 200, 70), strict=True)]),
    )
    assert torch.equal(found[-num_filler:], x[-num_filler:])
    total = sum(
        (top * w.sum(0)).sum() for top, w in zip(expected, weights[:273].split([3, 200, 70]), strict=True)
    )
    torch.testing.assert_close(grad, torch.autograd.grad(total, x)[0], rtol=0, atol=1e-12)
