"""DeltaNet: its two directions, what it starts from, its options."""

import pytest
import torch

import models.deltanet
from models import Place, build

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=80)


def layer(place=PLACE, **own):
    torch.manual_seed(0)
    return build("deltanet", place, **own).double()


def test_tied_is_the_causal_layer_on_the_sequence_and_on_the_reversed_one():
    x, place = torch.randn(2, 70, 16, dtype=torch.float64), Place(16, 2, 80, bias=False)
    causal, both = layer(place, directions="forward"), layer(place)
    both.load_state_dict(causal.state_dict())
    torch.testing.assert_close(both(x), causal(x) + causal(x.flip(1)).flip(1), **EXACT)


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


@pytest.mark.parametrize("width", [64, 256])
def test_at_first_a_branch_is_neither_silent_nor_loud(width, monkeypatch):
    """Also for the norm of a head's output: its eps is small beside the mean square."""
    normed, honest = [], models.deltanet.rms_norm
    keep = lambda *args: normed.append(honest(*args)) or normed[-1]  # noqa: E731
    monkeypatch.setattr(models.deltanet, "rms_norm", keep)
    module = layer(Place(width, width // 32, max_len=128)).float()
    out = module(torch.randn(2, 128, width))
    assert 0.1 < out.std() < 1
    assert 0.9 < normed[0].square().mean().sqrt() < 1


def test_it_starts_as_torch_starts_linear_layers():
    module = layer(Place(d_model=64, num_heads=16, max_len=80), expand_v=2.0)
    for linear in (module.project, module.out, module.rates):
        bound = linear.in_features**-0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert not any(bias.any() for name, bias in module.named_parameters() if name.endswith(".bias"))
    assert 0.45 < module.conv.abs().max() <= 0.5 and (module.norm == 1).all()


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
