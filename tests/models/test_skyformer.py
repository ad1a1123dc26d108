"""Skyformer: what is drawn and when, what the draw may not depend on, and its options."""

import math

import pytest
import torch
from proofs import PROOFS

from models import Place, build
from models.kernelized import kernelized_attention
from models.landmarks import random_numbers, real_positions
from models.skyformer import largest_numbers, skyformer_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=50)


def qkv(length=13, d=8, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, d, dtype=dtype).unbind(0)


def numbers(count=4, draw=0, seed=0, layer=0):
    counter = torch.arange(2 * count).view(2, count)
    return random_numbers(counter, torch.tensor(draw), seed=seed, layer=layer)


def test_random_numbers_are_uniform_and_apart_for_every_seed_layer_and_draw():
    counter = torch.arange(20_000)
    streams = [
        random_numbers(counter, torch.tensor(draw), seed=seed, layer=layer).double() / 2**32
        for draw, seed, layer in (
            (0, 0, 0),
            (1, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
            (0, 2**32, 0),
            (7, 2**63 - 1, 3),
        )
    ]
    for i, x in enumerate(streams):
        assert 0 <= x.min() < 1e-3 and 1 - 1e-3 < x.max() < 1
        assert x.mean() == pytest.approx(0.5, abs=0.01)  # five standard errors: 5 * sqrt(1 / 12 / 20000)
        assert (x * 16).long().bincount().sub(1250).abs().max() < 175  # five times sqrt(1250)
        assert torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1].abs() < 0.035
        for y in streams[:i]:
            assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.035  # five standard errors
            assert len(set(x.tolist()) & set(y.tolist())) < 20  # no stream is another one shuffled


def test_positions_are_among_real_tokens_each_equally_often():
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, False, False, False, False]])
    drawn = real_positions(numbers(20_000).flatten(), mask, 6)
    counts = drawn[0].bincount(minlength=6)
    assert counts[[1, 4]].tolist() == [0, 0]
    assert (counts[mask[0]] - 10_000).abs().max() < 450  # five standard errors
    assert drawn[1].unique().tolist() == [1]


def test_positions_without_mask_are_those_of_a_mask_that_is_true():
    everywhere = real_positions(numbers(), torch.ones(3, 9, dtype=torch.bool), 9)
    assert torch.equal(real_positions(numbers(), None, 9).expand(3, -1, -1), everywhere)


def test_distinct_positions_are_the_largest_numbers_of_real_tokens():
    ranked = torch.tensor([[5, 9, 1, 7], [2, 8, 6, 4]])
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    positions, used = largest_numbers(ranked, mask, 2)
    assert positions[0].tolist() == [[3, 0], [2, 3]]
    assert positions[1, :, 0].tolist() == [2, 2]
    assert used.tolist() == [[[True, True]] * 2, [[True, False]] * 2]


@pytest.mark.parametrize("distinct", [False, True])
def test_landmarks_change_with_every_training_step_and_not_in_evaluation(distinct):
    mechanism = build("skyformer", PLACE, num_landmarks=8, distinct=distinct)
    fixed, address, seen = mechanism.eval().numbers(50), mechanism.draw.index.data_ptr(), []
    for step in range(4):
        mechanism.training_update(step)
        assert torch.equal(mechanism.eval().numbers(50), fixed)
        seen.append(mechanism.train().numbers(50))
    assert all(not torch.equal(a, b) for i, a in enumerate([fixed, *seen]) for b in seen[i:])
    assert mechanism.draw.index.data_ptr() == address
    resumed = build("skyformer", PLACE, num_landmarks=8, distinct=distinct)
    resumed.training_update(3)
    assert torch.equal(resumed.numbers(50), seen[3])
    assert not any("draw" in name for name in resumed.state_dict())


@pytest.mark.parametrize("distinct", [False, True])
def test_training_outputs_equal_the_reference_of_their_draw(distinct):
    mechanism = build("skyformer", PLACE, num_landmarks=8, distinct=distinct).double().train()
    x, mask = torch.randn(2, 20, 16, dtype=torch.float64), torch.arange(20) < torch.tensor([[20], [3]])
    outputs = []
    for step in (0, 41):
        mechanism.training_update(step)
        outputs.append(mechanism(x, mask)[mask])
        torch.testing.assert_close(
            outputs[-1], PROOFS["skyformer"].reference(mechanism, x, mask)[mask], **EXACT
        )
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_landmarks_of_a_token_number_do_not_depend_on_the_length():
    mechanism = build("skyformer", PLACE, num_landmarks=8, distinct=True)
    assert torch.equal(mechanism.numbers(50)[:, :20], mechanism.numbers(20))


def test_more_landmarks_come_closer_to_the_dense_kernel():
    q, k, v = qkv(length=200, d=4)
    dense, errors = kernelized_attention(q, k, v), []
    for m in (8, 32, 128):
        found = skyformer_attention(
            q, k, v, numbers=numbers(m // 2), num_landmarks=m, gamma=1e-3, num_iterations=30
        )
        errors.append((found - dense).square().mean().sqrt().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_start_coupled_to_the_batch_is_one_over_the_largest_column_sum_of_all():
    q, k, v = qkv()
    drawn, options = numbers(), {"num_landmarks": 8, "num_iterations": 1}
    found = skyformer_attention(q, k, v, numbers=drawn, coupled_start=True, **options)
    places = drawn * 13 // 2**32
    s = torch.cat([q[:, :, places[0]], k[:, :, places[1]]], dim=2)

    def kernel(x, y):
        return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * 8**0.5))

    eye = torch.eye(8, dtype=torch.float64)
    m = kernel(s, s) + 0.1 * eye
    d = m.sum(dim=-1) ** -0.5
    a = d[..., None] * m * d[..., None, :]
    z = a / a.sum(dim=-2).max()
    az = a @ z
    z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    expected = kernel(q, s) @ (d[..., None] * z * d[..., None, :]) @ kernel(s, k) @ v
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    apart = skyformer_attention(q, k, v, numbers=drawn, **options)
    assert (apart - expected).abs().max() > 1e-3


def test_coupled_start_ties_a_row_to_its_batch_and_says_so():
    assert build("skyformer", PLACE).traits.batch_invariant
    assert "batch_invariant" in build("skyformer", PLACE, coupled_start=True).traits.exceptions()


@pytest.mark.parametrize(("num_landmarks", "expected"), [(98, True), (100, False)])
def test_order_is_of_no_account_if_every_token_is_a_landmark_of_both_kinds(num_landmarks, expected):
    mixer = build("skyformer", PLACE, num_landmarks=num_landmarks, distinct=True).double()
    assert mixer.traits.uses_order == expected
    x, turned = torch.randn(1, 50, 16, dtype=torch.float64), torch.randperm(50)
    assert ((mixer(x[:, turned]) - mixer(x)[:, turned]).abs().max() > 1e-9) == expected
    assert build("skyformer", PLACE, num_landmarks=100).traits.uses_order


def test_scale_width_32_is_the_constant_of_the_released_code_whatever_the_head():
    q, k, v = qkv()
    options = {"numbers": numbers(), "num_landmarks": 8}
    by_hand = skyformer_attention(*(x * 8**0.25 / 32**0.25 for x in (q, k)), v, **options)
    torch.testing.assert_close(skyformer_attention(q, k, v, scale_width=32, **options), by_hand, **EXACT)


@pytest.mark.parametrize("distinct", [False, True])
def test_row_without_real_keys_gives_zeros_and_finite_gradients(distinct):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    options = {"numbers": numbers(13 if distinct else 4), "num_landmarks": 8, "distinct": distinct}
    out = skyformer_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]), **options)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("distinct", [False, True])
def test_gradcheck(distinct):
    mask = torch.arange(7) < torch.tensor([7, 2])[:, None]
    leaves = [x.requires_grad_() for x in qkv(length=7, d=4)]
    options = {"numbers": numbers(7 if distinct else 3), "num_landmarks": 6, "distinct": distinct}
    attend = lambda q, k, v: skyformer_attention(q, k, v, mask, **options)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_autocast_leaves_kernels_and_inverse_in_float32():
    q, k, v = qkv(dtype=torch.float32)
    options = {"numbers": numbers(), "num_landmarks": 8}
    with torch.autocast("cpu", torch.bfloat16):
        found = skyformer_attention(q, k, v, **options)
    torch.testing.assert_close(found, skyformer_attention(q, k, v, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "own",
    [
        *({"num_landmarks": value} for value in (0, 7, 8.0)),
        *({"gamma": value} for value in (-0.1, math.nan, math.inf)),
        *({"num_iterations": value} for value in (0, 1.5)),
        *({"scale_width": value} for value in (0, 1.5)),
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="skyformer needs"):
        build("skyformer", PLACE, **own)
