"""S5: where it starts from, what is tagged, which poles may grow, what it refuses."""

import math

import pytest
import torch

from models import Place, build
from models.common import own_parameters
from models.diagonal import diagonal_system
from models.s5 import hippo_normal

PLACE = Place(d_model=8, num_heads=2, max_len=64)


def hippo(size):
    """HiPPO-LegS entry by entry, plus the product that makes it normal."""
    a = torch.zeros(size, size, dtype=torch.float64)
    for n in range(size):
        for k in range(size):
            root = math.sqrt((2 * n + 1) * (2 * k + 1))
            a[n, k] = (-root if n > k else -(n + 1) if n == k else 0) + math.sqrt((n + 0.5) * (k + 0.5))
    return a


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_state_matrix_is_the_normal_part_of_hippo(size):
    a, vectors = hippo_normal(size)
    assert (a.imag < 0).all()
    half = vectors @ torch.diag(a) @ vectors.mH
    torch.testing.assert_close(2 * half.real, hippo(size), rtol=0, atol=1e-10)


def test_poles_start_in_equal_blocks():
    mechanism = build("s5", PLACE, d_state=24, num_blocks=3)
    a, _ = hippo_normal(8)
    torch.testing.assert_close(mechanism.a_imag, a.imag.float().repeat(3))
    assert (mechanism.a_real == -0.5).all()


def test_inputs_start_as_a_real_matrix_in_the_eigenbasis():
    place = Place(d_model=64, num_heads=2, max_len=64)
    mechanism = build("s5", place, d_state=64, num_blocks=4)
    vectors = torch.block_diag(*[hippo_normal(16)[1]] * 4)
    b = 2 * (vectors @ torch.view_as_complex(mechanism.b).to(vectors)).real  # [64 64], as it was drawn
    assert b.abs().max() <= 2 / 8 / 0.879 and abs(b.std() - 1 / 8) < 0.01


@pytest.mark.parametrize(
    ("init_c", "variance"), [("truncated", 1 / 32), ("lecun", 1 / 32 / 48), ("complex", 0.5)]
)
def test_outputs_start_with_the_variance_of_the_released_code(init_c, variance):
    place = Place(d_model=48, num_heads=2, max_len=64)
    c = build("s5", place, d_state=32, num_blocks=2, init_c=init_c).c
    assert c.shape == (2, 16, 48, 2)
    assert 0.85 < c.square().mean() / variance < 1.15  # 3,072 numbers


def test_steps_start_in_their_range():
    step = build("s5", PLACE, dt_min=1e-4, dt_max=1e-2).log_step.exp()
    assert (step >= 0.99e-4).all() and (step <= 1.01e-2).all() and step.max() > 10 * step.min()


def test_poles_steps_and_inputs_train_by_themselves():
    mechanism = build("s5", PLACE, ssm_lr_scale=0.3)
    tagged = {n: p.lr_scale for n, p in mechanism.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert tagged == dict.fromkeys(("a_real", "a_imag", "log_step", "b"), 0.3)


@pytest.mark.parametrize("clip_eigs", [True, False])
def test_a_pole_in_the_right_half_plane_grows_only_where_poles_are_not_clipped(clip_eigs):
    place = Place(d_model=2, num_heads=1, max_len=2000)
    mechanism = build(
        "s5", place, d_state=2, num_blocks=1, clip_eigs=clip_eigs, directions="forward", dt_min=0.1
    )
    torch.nn.init.constant_(mechanism.a_real, 1.0)
    x = torch.zeros(1, 200, 2)
    x[:, 0] = 1.0
    y = []
    mechanism.output.register_forward_pre_hook(lambda module, given: y.append(given[0]))
    mechanism(x)
    early, late = y[0][:, 1:51].abs().max(), y[0][:, 150:].abs().max()
    assert (late < 1.1 * early) if clip_eigs else (late > 1e3 * early)


def test_the_state_is_counted_in_real_numbers_of_both_directions():
    assert build("s5", PLACE).state_size(1000) == 2 * 64
    assert build("s5", PLACE, directions="forward").state_size(10) == 64


def test_the_defaults_are_those_of_the_released_code():
    own = {n: p.default for n, p in own_parameters(type(build("s5", PLACE))).items()}
    assert own == {
        "d_state": 64,
        "num_blocks": 8,
        "init_c": "truncated",
        "clip_eigs": True,
        "directions": "untied",
        "dt_min": 1e-3,
        "dt_max": 0.1,
        "output": "half_glu1",
        "ssm_lr_scale": 0.25,
        "dt_lr_scale": None,
    }


def test_inputs_start_with_the_number_of_states_as_their_fan_in():
    b = build("s5", Place(d_model=256, num_heads=2, max_len=64), d_state=16, num_blocks=2).b
    assert b.shape == (8, 256, 2)
    assert 0.9 < 2 * b.square().mean() * 16 < 1.1  # unitary: real entries of variance 1 / 16; 4,096 numbers


@pytest.mark.parametrize("init_c", ["truncated", "lecun", "complex"])
def test_outputs_of_both_directions_start_differently_and_skips_normal(init_c):
    mechanism = build("s5", Place(d_model=200, num_heads=2, max_len=64), init_c=init_c)
    assert (mechanism.c[0] != mechanism.c[1]).all()
    assert abs(mechanism.skip.mean()) < 0.3 and 0.7 < mechanism.skip.var() < 1.4  # 200 numbers


def test_the_step_may_learn_at_another_rate():
    mechanism = build("s5", PLACE, ssm_lr_scale=0.3, dt_lr_scale=1.0)
    assert mechanism.log_step.lr_scale == 1.0 and mechanism.log_step.no_weight_decay
    assert mechanism.a_real.lr_scale == mechanism.b.lr_scale == 0.3
    assert build("s5", PLACE, ssm_lr_scale=0.3, dt_lr_scale=0.0).log_step.lr_scale == 0.0


def test_slow_poles_keep_float32_precision_over_16384_tokens():
    mechanism = build("s5", Place(d_model=4, num_heads=2, max_len=16_384))
    torch.nn.init.constant_(mechanism.a_real, -1e-3)
    mechanism.output = torch.nn.Identity()
    x = torch.randn(1, 16_384, 4)
    with torch.no_grad():
        found = mechanism(x)
        mechanism, x = mechanism.double(), x.double()
        log_decay = mechanism.log_step.exp() * torch.complex(mechanism.a_real, mechanism.a_imag)
        b, c = torch.view_as_complex(mechanism.b), torch.view_as_complex(mechanism.c)
        inputs = (mechanism.log_step.exp() * log_decay.expm1() / log_decay)[:, None] * b
        exact = diagonal_system(x, log_decay, inputs, 2 * c) + mechanism.skip * x
    assert (found - exact).abs().max() < 1.2e-6 * exact.abs().max()  # found 4e-7; of float32 poles: 1e-4


def test_a_pole_at_zero_sums_its_inputs():
    mechanism = build("s5", PLACE, d_state=2, num_blocks=1, clip_eigs=False, directions="forward", dt_min=0.1)
    for pole in (mechanism.a_real, mechanism.a_imag):
        torch.nn.init.zeros_(pole)
    y, x = [], torch.randn(1, 20, 8)
    mechanism.output.register_forward_pre_hook(lambda module, given: y.append(given[0]))
    mechanism(x).sum().backward()
    b, c = (torch.view_as_complex(part.detach()) for part in (mechanism.b, mechanism.c))
    sums = (x.to(b.dtype) @ b.mT).cumsum(1) * 0.1
    torch.testing.assert_close(
        y[0].detach(), 2 * (sums @ c[0]).real + mechanism.skip * x, rtol=1e-4, atol=1e-5
    )
    assert all(p.grad.isfinite().all() for p in mechanism.parameters())


@pytest.mark.parametrize("output", ["half_glu1", "half_glu2", "glu", "linear"])
def test_all_outputs_are_in_the_dtype_of_autocast(output):
    with torch.autocast("cpu", torch.bfloat16):
        assert build("s5", PLACE, output=output)(torch.randn(1, 40, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"d_state": 24, "num_blocks": 8}, "got d_state=24, num_blocks=8; choose a d_state that"),
        ({"num_blocks": 0}, "got d_state=64, num_blocks=0"),
        ({"dt_min": 0.2}, "needs 0 < dt_min <= dt_max, got dt_min=0.2, dt_max=0.1"),
        ({"init_c": "zero"}, "unknown init_c 'zero' for s5; choose from: truncated, lecun, complex"),
        ({"directions": "both"}, "unknown directions 'both' for s5; choose from: tied, untied, forward"),
        ({"output": "relu"}, "unknown output 'relu' for s5; choose from: half_glu1, half_glu2, glu"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(own, message):
    with pytest.raises(ValueError, match=message):
        build("s5", PLACE, **own)
