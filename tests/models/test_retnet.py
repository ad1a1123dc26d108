"""RetNet: its rates, rotation and initialisation, its directions, what it refuses."""

import math

import pytest
import torch

from models import Place, build
from models.retnet import log_gammas, retention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=80)


def x_of(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_heads_forget_at_the_published_rates():
    torch.testing.assert_close(
        log_gammas(3).exp(), torch.tensor([31 / 32, 63 / 64, 127 / 128]).double(), **EXACT
    )


def test_rates_are_exact_under_bfloat16_weights():
    """A rate rounded to 8 bits would be 1 in head 4 and up."""
    layer = build("retnet", Place(d_model=16, num_heads=8, max_len=80)).bfloat16()
    assert not list(layer.buffers())
    assert log_gammas(8)[7] == torch.log1p(torch.tensor(-(2.0**-12)).double())


def test_scores_depend_on_distances_alone():
    """Content that is the same everywhere: the same prefix later in the sequence gives the same outputs."""
    layer, x = build("retnet", PLACE, directions="forward").double(), x_of(1, 40, 16)
    later = torch.cat([torch.zeros(1, 9, 16).double(), x], dim=1)
    mask = torch.arange(49)[None] >= 9
    torch.testing.assert_close(layer(later, mask)[:, 9:], layer(x), **EXACT)


def test_a_hole_stays_as_wide_as_it_is():
    q, k, v = torch.randn(3, 1, 20, 2, 4, dtype=torch.float64)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, [3, 11]] = True
    out = retention(q, k, v, log_gammas(2), mask)[0]
    gamma = log_gammas(2).exp()[:, None]
    expected = (
        (q[0, 11] * k[0, 11]).sum(-1, keepdim=True) * v[0, 11]
        + (q[0, 11] * k[0, 3]).sum(-1, keepdim=True) * v[0, 3] * gamma**8
    ) / 2
    torch.testing.assert_close(out[11], expected, **EXACT)


def test_projections_start_as_released():
    layer = build("retnet", Place(d_model=64, num_heads=2, max_len=80), directions="untied")
    inputs = [*layer.there.weight.split(layer.widths), *layer.back.weight.split(layer.widths)]
    assert not torch.equal(layer.there.weight, layer.back.weight)
    for weight, gain in [(x, 2**-2.5) for x in (*inputs, layer.gate.weight)] + [(layer.out.weight, 1)]:
        limit = gain * (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * limit < weight.abs().max() <= limit


def test_values_are_twice_as_wide_unless_asked_otherwise():
    assert build("retnet", PLACE).out.in_features == 32
    one = build("retnet", PLACE, expand_v=1.0)
    assert one.out.in_features == 16 and one.state_size(9) == 2 * 2 * 8 * 8
    assert build("retnet", PLACE, directions="forward").state_size(9) == 2 * 8 * 16


def test_forward_sees_no_later_token():
    layer, x = build("retnet", PLACE, directions="forward").double(), x_of(1, 70, 16)
    torch.testing.assert_close(layer(x[:, :41]), layer(x)[:, :41], **EXACT)


@pytest.mark.parametrize("directions", ["tied", "forward"])
def test_slow_heads_in_bf16_equal_float64_on_the_same_rounded_inputs(directions):
    """Head 7 forgets a 4,096th a token: rates, their sums or states in bf16 would be far off."""
    q, k, v = torch.randn(3, 1, 600, 8, 4).bfloat16()
    found = retention(q, k, v, log_gammas(8), directions=directions)
    expected = retention(*(x.double() for x in (q, k, v)), log_gammas(8), directions=directions)
    assert found.dtype == torch.bfloat16
    error = (found.double() - expected)[:, :, 7].square().mean() / expected[:, :, 7].square().mean()
    assert error.sqrt() < 5e-3  # the rounding of the result


def test_the_token_itself_is_taken_away_as_exactly_as_it_was_added():
    """Alone it is what both ways give: in bf16 the sum less itself is one rounding from float64."""
    q, k, v = torch.randn(3, 50, 1, 8, 16).bfloat16()
    expected = retention(*(x.double() for x in (q, k, v)), log_gammas(8)).bfloat16()
    assert (retention(q, k, v, log_gammas(8)) == expected).float().mean() > 0.99


def test_untied_projections_of_the_way_back_reach_earlier_tokens_alone():
    layer, x = build("retnet", PLACE, directions="untied").double(), x_of(1, 70, 16)
    before = layer(x)
    with torch.no_grad():
        layer.back.weight.mul_(3)
    after = layer(x)
    torch.testing.assert_close(after[:, -1], before[:, -1], **EXACT)  # nothing comes after the last
    assert (after - before)[:, :-1].abs().amin(dim=1).max() > 1e-6


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"directions": "both"}, "unknown directions 'both' for retnet; choose from: tied, untied, forward"),
        ({"head_norm": "batch"}, "unknown head_norm 'batch' for retnet; choose from: rms, layer"),
        ({"kernel": "triton"}, "unknown kernel 'triton' for retnet; choose from: auto, torch, fla"),
        ({"expand_v": 0.3}, "a whole head width of at least 1; got 2.4 for heads of 8"),
        ({"expand_v": math.inf}, "a whole head width of at least 1; got inf for heads of 8"),
        ({"expand_v": 0.125}, "retnet with head_norm=layer would make heads of 1 value zero"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("retnet", PLACE, **own)


def test_heads_of_odd_width_are_refused():
    with pytest.raises(ValueError, match="turns pairs of keys, got heads of 5; change num_heads or d_head"):
        build("retnet", Place(d_model=10, num_heads=2, max_len=9))
