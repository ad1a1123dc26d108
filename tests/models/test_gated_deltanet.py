"""Gated DeltaNet: its two directions, what it starts from, its options."""

import pytest
import torch

import models.gated_deltanet
from models import Place, build
from models.gated_deltanet import log_decays

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=80)


def layer(place=PLACE, **own):
    torch.manual_seed(0)
    return build("gated_deltanet", place, **own).double()


def test_tied_is_the_causal_layer_on_the_sequence_and_on_the_reversed_one():
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    causal, both = (
        layer(Place(16, 2, 80, bias=False), directions="forward"),
        layer(Place(16, 2, 80, bias=False)),
    )
    both.load_state_dict(causal.state_dict())
    torch.testing.assert_close(both(x), causal(x) + causal(x.flip(1)).flip(1), **EXACT)


def test_untied_with_equal_parameters_is_tied():
    x, mask = torch.randn(2, 70, 16, dtype=torch.float64), torch.arange(70) < torch.tensor([[70], [33]])
    tied, untied = layer(), layer(directions="untied")
    own = tied.state_dict()
    for name in ("rates.weight", "rates.bias", "conv", "log_rate", "step_bias", "norm"):
        own[name] = torch.cat([own[name]] * 2)
    untied.load_state_dict(own)
    torch.testing.assert_close(untied(x, mask)[mask], tied(x, mask)[mask], **EXACT)


def test_each_direction_of_untied_has_its_own_rates_and_filters():
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    module = layer(directions="untied")
    before = module(x)
    own = [getattr(module, name)[1] for name in ("conv", "log_rate", "step_bias", "norm")]
    own += module.rates.weight[4:].split(2)  # of beta and of the decay, two heads
    for part in own:
        with torch.no_grad():
            part += 0.5
        after = module(x)
        assert not torch.allclose(after, before)
        before = after


@pytest.mark.parametrize("width", [64, 256])
def test_at_first_a_branch_is_neither_silent_nor_loud(width, monkeypatch):
    """Also for the norm of a head's output: its eps is small beside the mean square."""
    normed, honest = [], models.gated_deltanet.rms_norm
    keep = lambda *args: normed.append(honest(*args)) or normed[-1]  # noqa: E731
    monkeypatch.setattr(models.gated_deltanet, "rms_norm", keep)
    module = layer(Place(width, width // 32, max_len=128)).float()
    out = module(torch.randn(2, 128, width))
    assert 0.1 < out.std() < 1
    assert 0.6 < normed[0].square().mean().sqrt() < 1


def test_it_starts_as_torch_starts_linear_layers():
    module = layer(Place(d_model=64, num_heads=16, max_len=80))
    for linear in (module.project, module.gate, module.out, module.rates):
        bound = linear.in_features**-0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert not any(bias.any() for name, bias in module.named_parameters() if name.endswith(".bias"))
    steps = torch.nn.functional.softplus(module.step_bias)
    assert 1e-3 * 0.999 <= steps.min() and steps.max() <= 0.1 * 1.001 and steps.max() > 2 * steps.min()
    rates = module.log_rate.exp()
    assert 1e-4 * 0.999 <= rates.min() < 4 < 12 < rates.max() <= 16
    assert 0.45 < module.conv.abs().max() <= 0.5 and (module.norm == 1).all()


def test_parameters_of_the_recurrence_are_tagged():
    module = layer(ssm_lr_scale=0.3)
    tagged = {name for name, p in module.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert tagged == {"log_rate", "step_bias"}
    assert module.log_rate.lr_scale == module.step_bias.lr_scale == 0.3


def test_decays_are_computed_in_float32_and_never_grow():
    raw = torch.tensor([-200.0, 0.0, 200.0]).bfloat16()
    found = log_decays(raw, torch.tensor(0.0), torch.tensor(0.0))
    torch.testing.assert_close(found, torch.tensor([0.0, -0.6931472, -200.0]))
    assert found.dtype == torch.float32 and (found <= 0).all()


def test_neg_eigval_doubles_beta():
    """Which is what a larger first beta does: sigmoid(0) is 1/2, sigmoid(large) is 1."""
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    doubled, whole = layer(neg_eigval=True), layer()
    with torch.no_grad():
        doubled.rates.weight[:2] = whole.rates.weight[:2] = 0
        whole.rates.bias[:2] = 60.0
    torch.testing.assert_close(doubled(x), whole(x), **EXACT)


def test_the_state_counts_both_directions():
    assert layer().state_size(1000) == 2 * 2 * 8 * 16
    assert layer(directions="forward", expand_v=0.5).state_size(1000) == 2 * 8 * 4


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"directions": "both"}, "unknown directions 'both' for gated_deltanet; choose from: tied, untied"),
        ({"kernel": "cuda"}, "unknown kernel 'cuda' for gated_deltanet; choose from: auto, torch, fla"),
        (
            {"expand_v": 0.3},
            "needs expand_v times the head width 8 to be a whole number above 0, got expand_v",
        ),
        ({"expand_v": 0.0}, "whole number above 0"),
        ({"kernel_size": 0}, "gated_deltanet needs kernel_size >= 1, got 0"),
        ({"ssm_lr_scale": -1.0}, "gated_deltanet needs ssm_lr_scale >= 0, got -1.0"),
    ],
)
def test_impossible_arguments_are_refused_with_what_is_possible(own, message):
    with pytest.raises(ValueError, match=message):
        build("gated_deltanet", PLACE, **own)
