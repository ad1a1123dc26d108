"""Gated DeltaNet: its two directions, what it starts from, its options."""

import pytest
import torch

from models import Place, build
from models.gated_deltanet import log_decays

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=80)


def layer(place=PLACE, **own):
    torch.manual_seed(0)
    return build("gated_deltanet", place, **own).double()


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
