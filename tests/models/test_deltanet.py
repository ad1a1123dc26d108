"""DeltaNet: its two directions, what it starts from, its options."""

import pytest
import torch

from models import Place, build

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=80)


def layer(place=PLACE, **own):
    torch.manual_seed(0)
    return build("deltanet", place, **own).double()


def test_untied_with_equal_parameters_is_tied():
    x, mask = torch.randn(2, 70, 16, dtype=torch.float64), torch.arange(70) < torch.tensor([[70], [33]])
    tied, untied = layer(), layer(directions="untied")
    own = tied.state_dict()
    for name in ("rates.weight", "rates.bias", "conv", "norm"):
        own[name] = torch.cat([own[name]] * 2)
    untied.load_state_dict(own)
    torch.testing.assert_close(untied(x, mask)[mask], tied(x, mask)[mask], **EXACT)


def test_each_direction_of_untied_has_its_own_rates_and_filters():
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    module = layer(directions="untied")
    before = module(x)
    for part in (module.conv[1], module.norm[1], module.rates.weight[2:]):
        with torch.no_grad():
            part += 0.5
        after = module(x)
        assert not torch.allclose(after, before)
        before = after


@pytest.mark.parametrize("feature_map", ["relu", "elu", "identity"])
@pytest.mark.parametrize("qk_norm", ["l2", "l1"])
def test_features_of_any_size_keep_the_state_bounded(feature_map, qk_norm):
    module = layer(feature_map=feature_map, qk_norm=qk_norm).float()
    x = 1e3 * torch.randn(1, 400, 16)
    x.requires_grad_()
    out = module(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert out.abs().max() < 16  # two root mean squares of 1 through a map of small weights


def test_neg_eigval_doubles_beta():
    """Which is what a larger first beta does: sigmoid(0) is 1/2, sigmoid(large) is 1."""
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    doubled, whole = layer(neg_eigval=True), layer()
    with torch.no_grad():
        doubled.rates.weight[:] = whole.rates.weight[:] = 0
        whole.rates.bias[:] = 60.0
    torch.testing.assert_close(doubled(x), whole(x), **EXACT)


def test_the_state_counts_both_directions():
    assert layer().state_size(1000) == 2 * 2 * 8 * 8
    assert layer(directions="forward", expand_k=0.5, expand_v=2.0).state_size(1000) == 2 * 4 * 16


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"directions": "both"},
            "unknown directions 'both' for deltanet; choose from: tied, untied, forward",
        ),
        ({"feature_map": "exp"}, "unknown feature_map 'exp' for deltanet; choose from: silu, relu, elu"),
        ({"qk_norm": "l3"}, "unknown qk_norm 'l3' for deltanet; choose from: l2, l1"),
        ({"kernel": "cuda"}, "unknown kernel 'cuda' for deltanet; choose from: auto, torch, fla"),
        (
            {"expand_k": 0.3},
            "needs expand_k times the head width 8 to be a whole number above 0, got expand_k",
        ),
        ({"expand_v": -1.0}, "whole number above 0, got expand_v=-1.0"),
        ({"kernel_size": 0}, "deltanet needs kernel_size >= 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused_with_what_is_possible(own, message):
    with pytest.raises(ValueError, match=message):
        build("deltanet", PLACE, **own)
