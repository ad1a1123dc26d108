"""What S4 and S4D have in common: outputs and skips at the start, the size of the state, learning rates."""

import pytest

from models import Place, build

PLACE = Place(d_model=4, num_heads=2, max_len=64)
pytestmark = pytest.mark.parametrize("name", ["s4", "s4d"])


def test_outputs_and_skips_start_normal_and_of_both_directions_differently(name):
    mechanism = build(name, Place(d_model=200, num_heads=2, max_len=8))
    assert mechanism.c.shape == (2, 200, 32, 2)
    assert abs(mechanism.c.mean()) < 0.02 and abs(mechanism.skip.mean()) < 0.3
    assert 0.48 < mechanism.c.var() < 0.52  # real and imaginary parts of variance 1 / 2: 25,600 numbers
    assert 0.7 < mechanism.skip.var() < 1.4  # 200 numbers
    assert (mechanism.c[0] != mechanism.c[1]).all()


@pytest.mark.parametrize(("directions", "ways"), [("forward", 1), ("tied", 2), ("untied", 2)])
def test_the_state_is_counted_in_real_numbers_of_each_direction(name, directions, ways):
    mechanism = build(name, PLACE, d_state=6, directions=directions)
    assert mechanism.state_size(10) == mechanism.state_size(1000) == ways * 6 * 4


def test_the_step_may_learn_at_another_rate(name):
    mechanism = build(name, PLACE, ssm_lr_scale=0.25, dt_lr_scale=1.0)
    assert mechanism.log_step.lr_scale == 1.0 and mechanism.log_step.no_weight_decay
    assert mechanism.log_decay.lr_scale == mechanism.b.lr_scale == 0.25
    assert build(name, PLACE, ssm_lr_scale=0.25, dt_lr_scale=0.0).log_step.lr_scale == 0.0
