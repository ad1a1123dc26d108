"""cosFormer: weights fall with distance, are never negative, and do not depend on padding unless told to."""

import math

import pytest
import torch

from models import Place, build
from models.cosformer import cosine_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=8, num_heads=2, max_len=40)


def qkv(length=13, d=4):
    return torch.randn(3, 2, 2, length, d, dtype=torch.float64).unbind(0)


def test_weights_fall_with_distance_and_reach_zero_at_the_period():
    ones, values = torch.ones(1, 1, 20, 1).double(), torch.eye(20).double()[None, None]
    weights = cosine_attention(ones, ones, values, period=20)[0, 0, 0]
    assert (weights.diff() < 0).all() and (weights > 0).all()
    ratio = torch.tensor([math.cos(math.pi / 2 * j / 20) for j in range(20)], dtype=torch.float64)
    torch.testing.assert_close(weights / weights[0], ratio, **EXACT)


def test_shifting_all_positions_changes_nothing():
    q, k, v = qkv()
    padded = [torch.nn.functional.pad(x, (0, 0, 7, 0)) for x in (q, k, v)]
    mask = (torch.arange(20) >= 7).expand(2, 20)
    found = cosine_attention(*padded, mask, period=40)[:, :, 7:]
    torch.testing.assert_close(found, cosine_attention(q, k, v, period=40), **EXACT)


def test_a_query_without_a_positive_part_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = cosine_attention(-q.abs(), k, v, period=40)
    assert not out.any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = cosine_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]), period=40)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_padded_period_is_that_of_the_padded_length_and_the_traits_say_so():
    quirk = build("cosformer", PLACE, padded_period=True)
    q, k, v = qkv()
    mask = torch.arange(13) < torch.tensor([[13], [5]])
    torch.testing.assert_close(
        quirk.attend(q, k, v, mask), cosine_attention(q, k, v, mask, period=13), **EXACT
    )
    plain = build("cosformer", PLACE).attend(q, k, v, mask)
    torch.testing.assert_close(plain, cosine_attention(q, k, v, mask, period=40), **EXACT)
    cut = quirk.attend(*(x[1:, :, :5] for x in (q, k, v)), None)
    assert (quirk.attend(q, k, v, mask)[1:, :, :5] - cut).abs().max() > 1e-3
    assert set(quirk.traits.exceptions()) == {"length_invariant"} and not quirk.traits.packed


def test_without_mask_padding_is_attended_to_and_the_traits_say_so():
    blind = build("cosformer", PLACE, use_mask=False).double()
    x, mask = torch.randn(2, 13, 8, dtype=torch.float64), torch.arange(13) < torch.tensor([[5], [13]])
    torch.testing.assert_close(blind(x, mask), blind(x, None), **EXACT)
    assert (blind(x, mask)[0, :5] - blind(x[:1, :5])[0]).abs().max() > 1e-3
    assert set(blind.traits.exceptions()) == {"content_invariant", "length_invariant"}
    assert not blind.traits.packed


def test_positions_of_long_sequences_keep_float32_precision():
    q, k, v = qkv(length=16384, d=2)
    exact = cosine_attention(q, k, v, period=16384)
    found = cosine_attention(q.float(), k.float(), v.float(), period=16384)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_packed_path_equals_each_sequence_alone():
    mechanism = build("cosformer", PLACE).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 40), alone, **EXACT)


@pytest.mark.parametrize("eps", [0.0, math.nan, math.inf])
def test_an_eps_that_makes_no_sense_is_refused(eps):
    with pytest.raises(ValueError, match=f"cosformer needs eps > 0, got {eps}"):
        build("cosformer", PLACE, eps=eps)


def test_input_past_the_longest_length_is_refused():
    mechanism = build("cosformer", PLACE)
    with pytest.raises(ValueError, match="at most 40 positions and got 41"):
        mechanism(torch.randn(1, 41, 8))
    with pytest.raises(ValueError, match="at most 40 positions and got 41"):
        mechanism.forward_packed(torch.randn(41, 8), torch.tensor([0, 41], dtype=torch.int32), 41)
    assert build("cosformer", PLACE, padded_period=True)(torch.randn(1, 41, 8)).isfinite().all()
