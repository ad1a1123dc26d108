"""Random feature attention: its error against softmax, its draws, and a normaliser that may be negative."""

import math

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.rfa import fourier_attention, fourier_features

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)


def qkv(length=13, d=8):
    return torch.randn(3, 2, 2, length, d, dtype=torch.float64).unbind(0)


def test_error_against_softmax_of_unit_vectors_falls_as_the_root_of_the_number_of_features():
    q, k, v = qkv(length=32)
    unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    exact, sizes, errors = dense_attention(unit_q, unit_k, v, scale=1.0), (32, 128, 512, 2048), []
    for r in sizes:
        draws = [fourier_attention(q, k, v, projections=torch.randn(2, r, 8).double()) for _ in range(40)]
        errors.append((torch.stack(draws) - exact).square().mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])
    assert -0.55 < slope < -0.45, errors  # -0.5 up to the noise of 40 draws
    assert errors == sorted(errors, reverse=True)


def test_temperature_sharpens_as_one_over_its_square():
    q, k, v = qkv(length=16)
    unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    widths = build("rfa", PLACE, temperature=0.5).widths.double().detach()
    assert torch.equal(widths, torch.full((2, 8), 2.0, dtype=torch.float64))
    w = torch.randn(2, 40_000, 8, dtype=torch.float64) * widths[:, None]
    exact = dense_attention(unit_q, unit_k, v, scale=1 / 0.5**2)
    assert (fourier_attention(q, k, v, projections=w) - exact).abs().max() < 0.1
    assert (exact - dense_attention(unit_q, unit_k, v, scale=1.0)).abs().max() > 0.5


def test_features_of_a_vector_have_norm_one_whatever_its_length():
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64) * torch.logspace(-3, 3, 5)[:, None]
    norms = fourier_features(x, torch.randn(2, 6, 8, dtype=torch.float64)).square().sum(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), **EXACT)


def test_features_of_short_vectors_are_those_of_their_direction():
    x, w = torch.randn(3, 2, 5, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(fourier_features(1e-5 * x, w), fourier_features(x, w), **EXACT)


def test_a_negative_normaliser_is_replaced_by_eps():
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    w = torch.full((1, 1, 1), math.pi / 2, dtype=torch.float64)  # cos(w (1 - -1)) = -1
    found = fourier_attention(q, -q, q, projections=w, eps=0.25)
    torch.testing.assert_close(found, -q / 0.25, **EXACT)


def test_zero_queries_and_keys_give_finite_outputs_and_gradients():
    leaves = [torch.zeros(1, 1, 3, 4, requires_grad=True) for _ in range(3)]
    fourier_attention(*leaves, projections=torch.randn(1, 5, 4)).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    mask = torch.tensor([[True] * 13, [False] * 13])
    out = fourier_attention(q, k, v, mask, projections=torch.randn(2, 6, 8))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_every_step_picks_other_matrices_for_training_in_place_and_decided_by_the_step():
    mechanism = build("rfa", PLACE, num_draws=7)
    address, seen = mechanism.drawn.data_ptr(), []
    for step in range(20):
        mechanism.training_update(step)
        seen.append(mechanism.drawn.clone())
    assert mechanism.drawn.data_ptr() == address
    assert len({tuple(x.flatten().tolist()) for x in seen}) > 10  # of 42 ordered pairs
    for drawn in seen:
        rows = [(mechanism.pool == matrix).flatten(1).all(dim=1).nonzero().item() for matrix in drawn]
        assert len(set(rows)) == 2  # heads never share one
    resumed = build("rfa", PLACE, num_draws=7)
    resumed.training_update(19)
    assert torch.equal(resumed.drawn, seen[19])


def test_matrices_stay_for_redraw_every_steps_and_are_numbered_from_one():
    mechanism = build("rfa", PLACE, redraw_every=3)
    for step in range(7):
        mechanism.training_update(step)
        picked = torch.randperm(200, generator=mechanism._generator(1 + step // 3))[:2]
        assert torch.equal(mechanism.drawn, mechanism.pool[picked])


def test_evaluation_uses_the_first_matrices_of_the_pool_and_training_the_drawn_ones():
    mechanism = build("rfa", PLACE).double()
    mechanism.training_update(3)
    x, first = torch.randn(1, 9, 16, dtype=torch.float64), mechanism.pool[:2] * mechanism.widths[:, None]
    assert torch.equal(mechanism.eval().projections, first)
    assert torch.equal(mechanism.train().projections, mechanism.drawn * mechanism.widths[:, None])
    assert not torch.equal(mechanism.train()(x), mechanism.eval()(x))


def test_zero_redraws_keep_one_set_of_matrices_for_training_and_evaluation():
    mechanism = build("rfa", PLACE, redraw_every=0)
    for step in (0, 1, 1000):
        mechanism.training_update(step)
    assert torch.equal(mechanism.train().projections, mechanism.eval().projections)


def test_the_pool_is_decided_by_seed_and_layer_and_not_saved():
    first = build("rfa", PLACE)
    assert torch.equal(first.pool, build("rfa", PLACE).pool)
    assert not torch.equal(first.pool, build("rfa", PLACE, feature_seed=1).pool)
    later = Place(d_model=16, num_heads=2, max_len=200, layer_index=1, num_layers=2)
    assert not torch.equal(first.pool, build("rfa", later).pool)
    assert set(first.state_dict()) >= {"drawn", "widths"} and "pool" not in first.state_dict()


def test_packed_path_of_a_redrawn_model_in_training_equals_each_sequence_alone():
    mechanism = build("rfa", PLACE).double().train()
    mechanism.training_update(5)
    x = torch.randn(20, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), alone, **EXACT)


@pytest.mark.parametrize(
    "own",
    [
        {"num_features": 0},
        {"redraw_every": -1},
        {"redraw_every": 1.5},
        {"redraw_every": 0, "num_draws": 100},
        *({"temperature": value} for value in (0.0, math.nan, math.inf)),
        *({"eps": value} for value in (0.0, math.nan, math.inf)),
        {"num_draws": 1},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="rfa needs"):
        build("rfa", PLACE, **own)
