"""LaS attention: its decays, and what the mean of weights reads at padding and at the ends."""

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.las import decays, las_attention, smooth

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=4, max_len=40)


def qkv(length=13):
    return torch.randn(3, 2, 4, length, 4, dtype=torch.float64).unbind(0)


def test_first_head_does_not_decay_and_the_others_spread_geometrically():
    series = decays(9, 1e-3, 1.0)
    assert series[0] == 0
    ratio = series[2:] / series[1:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand(7), **EXACT)
    assert 1e-3 < series[1] and series[-1] < 1.0
    assert decays(2, 1e-2, 1.0).tolist() == pytest.approx([0, 0.1])
    assert decays(1, 1e-2, 1.0).tolist() == pytest.approx([0.1])


def test_strong_decay_leaves_each_query_its_own_key_beside_scores_of_zero():
    q, k, v = qkv(5)
    found = las_attention(q, k, v, decay=torch.full((4,), 1e3), smoothing=1)
    scores = torch.diag_embed((q * k).sum(dim=-1) / 2)
    torch.testing.assert_close(found, scores.softmax(dim=-1) @ v, **EXACT)


def test_mean_of_weights_equals_mean_of_values_with_zeros_past_the_ends():
    q, k, v = qkv()
    weights = (q @ k.mT / 2).softmax(dim=-1)
    padded = torch.nn.functional.pad(weights, (2, 2))
    mean = sum(padded[..., t : t + 13] for t in range(5)) / 5
    found = las_attention(q, k, v, decay=torch.zeros(4), smoothing=5)
    torch.testing.assert_close(found, mean @ v, **EXACT)


def test_weight_next_to_padding_is_lost_and_no_padding_is_read():
    v = torch.ones(1, 1, 6, 1, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False, False]])
    q = k = torch.zeros_like(v)
    found = las_attention(q, k, v.masked_fill(~mask[:, None, :, None], 1e4), mask, decay=torch.zeros(1))
    # weights of 1/4 on four keys; the two at the ends keep two thirds of their neighbourhood
    expected = (2 / 3 + 1 + 1 + 2 / 3) / 4
    torch.testing.assert_close(found[:, :, :4], torch.full_like(found[:, :, :4], expected), **EXACT)


def test_smooth_is_a_mean_of_neighbours():
    v = torch.tensor([3.0, 0.0, 6.0]).view(1, 1, 3, 1)
    assert smooth(v, 3).flatten().tolist() == [1.0, 3.0, 2.0]
    assert torch.equal(smooth(v, 1), v)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = las_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]), decay=torch.ones(4))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_one_head_alone_is_local_and_its_decay_can_be_set():
    place = Place(d_model=16, num_heads=1, max_len=40)
    module = build("las", place, smoothing=1)
    assert module.traits.uses_order
    q, k, v = (x[:, :1] for x in qkv())
    assert (module.attend(q, k, v, None) - dense_attention(q, k, v)).abs().max() > 1e-3
    for name, value in (("smallest_decay", 0.01), ("largest_decay", 0.5)):
        assert not torch.equal(build("las", place, **{name: value}).decay, module.decay)


def test_scores_of_bfloat16_are_decayed_in_float32():
    q, k = (torch.randn(1, 1, 600, 4).bfloat16() for _ in range(2))
    v, decay = torch.eye(600, dtype=torch.bfloat16).expand(1, 1, -1, -1), torch.tensor([2e-3])
    scores = torch.einsum("bhid,bhjd->bhij", q * 0.5, k).double()
    distance = (torch.arange(600)[:, None] - torch.arange(600)).abs()
    expected = (scores * torch.exp(-decay.double() * distance)).softmax(dim=-1)
    found = las_attention(q, k, v, decay=decay, smoothing=1)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)  # the weights are rounded once


def test_state_is_a_key_and_a_value_for_each_token():
    assert build("las", PLACE).state_size(40) == 2 * 40 * 16


def test_decays_are_no_parameters():
    mechanism = build("las", PLACE)
    assert {name.split(".")[0] for name, _ in mechanism.named_parameters()} == {"qkv", "out"}
    assert "decay" not in mechanism.state_dict()


@pytest.mark.parametrize(
    "own",
    [
        {"smoothing": 2},
        {"smoothing": 0},
        {"smallest_decay": 0.0},
        {"smallest_decay": 0.5, "largest_decay": 0.1},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="las needs smoothing odd"):
        build("las", PLACE, **own)
