"""LRU: where it starts from, what is tagged, what it refuses."""

import math

import pytest
import torch

from models import Place, build
from models.common import own_parameters
from models.lru import ring

PLACE = Place(d_model=8, num_heads=2, max_len=64)


def test_decays_start_evenly_over_the_area_of_the_ring():
    nu, theta, log_gamma = ring(20_000, 0.5, 0.9, math.pi / 4)
    radius = torch.exp(-torch.exp(nu))
    assert (radius >= 0.5).all() and (radius <= 0.9).all()
    middle = math.sqrt((0.5**2 + 0.9**2) / 2)  # halves the area
    assert abs((radius < middle).double().mean() - 0.5) < 0.02
    angle = theta.exp()
    assert (angle <= math.pi / 4).all() and abs(angle.mean() - math.pi / 8) < 0.01
    torch.testing.assert_close(log_gamma.exp() ** 2 + radius**2, torch.ones_like(radius))


def test_white_noise_keeps_states_of_size_one_at_the_start():
    place = Place(d_model=64, num_heads=2, max_len=4000)
    mechanism = build("lru", place, d_state=128, r_min=0.5, r_max=0.99, directions="forward", output="linear")
    torch.nn.init.zeros_(mechanism.skip)
    y = []
    mechanism.output.register_forward_pre_hook(lambda module, given: y.append(given[0]))
    mechanism(torch.randn(1, 4000, 64))
    assert 0.8 < y[0][:, 1000:].square().mean() < 1.25  # 128 states of variance 1 by C of variance 1 / 128


def test_a_whole_disc_starts_finite_even_at_its_centre(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.zeros(*shape, **kwargs))
    mechanism = build("lru", PLACE, r_min=0.0, r_max=1.0)
    mechanism(torch.randn(2, 40, 8)).sum().backward()
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in mechanism.parameters())


def test_recurrence_parameters_train_by_themselves():
    mechanism = build("lru", PLACE, ssm_lr_scale=0.3)
    tagged = {n: p.lr_scale for n, p in mechanism.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert tagged == dict.fromkeys(("nu", "theta", "log_gamma", "b"), 0.3)


def test_the_state_is_counted_in_real_numbers_of_both_directions():
    assert build("lru", PLACE).state_size(1000) == 4 * 64
    assert build("lru", PLACE, directions="forward").state_size(10) == 2 * 64


def test_the_defaults_are_slow_states():
    own = {n: p.default for n, p in own_parameters(type(build("lru", PLACE))).items()}
    assert own == {
        "d_state": 64,
        "r_min": 0.9,
        "r_max": 0.999,
        "max_phase": 2 * math.pi,
        "directions": "untied",
        "output": "glu",
        "ssm_lr_scale": 0.5,
    }


def test_outputs_of_both_directions_start_differently_and_skips_normal():
    mechanism = build("lru", Place(d_model=200, num_heads=2, max_len=64))
    assert (mechanism.c[0] != mechanism.c[1]).all()
    assert abs(mechanism.skip.mean()) < 0.3 and 0.7 < mechanism.skip.var() < 1.4  # 200 numbers


def test_slow_states_keep_float32_precision_over_16384_tokens():
    mechanism = build("lru", Place(d_model=4, num_heads=2, max_len=16_384))
    torch.nn.init.constant_(mechanism.nu, -10.0)
    mechanism.output = torch.nn.Identity()
    x = torch.randn(1, 16_384, 4)
    with torch.no_grad():
        found = mechanism(x)
        exact = mechanism.double()(x.double())
    assert (found - exact).abs().max() < 2e-6 * exact.abs().max()  # found 7e-7; of float32 angles: 4e-4


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"d_state": 0}, "needs d_state >= 1, got 0"),
        ({"r_min": 0.9, "r_max": 0.9}, "needs 0 <= r_min < r_max <= 1, got r_min=0.9, r_max=0.9"),
        ({"r_max": 1.1}, "r_max=1.1"),
        ({"max_phase": 0.0}, "needs 0 < max_phase <= 2 pi, got 0.0"),
        ({"directions": "both"}, "unknown directions 'both' for lru; choose from: tied, untied, forward"),
        ({"output": "half_glu1"}, "unknown output 'half_glu1' for lru; choose from: glu, linear, none"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(own, message):
    with pytest.raises(ValueError, match=message):
        build("lru", PLACE, **own)
