"""Learning-rate schedules against PyTorch's and against the published formulas."""

import math

import pytest
import torch

from lra.schedule import Schedule
from lra.schema import TrainConfig


def rates(**config) -> list[float]:
    train = TrainConfig(**config)
    schedule = Schedule(train)
    return [schedule.lr(step) for step in range(train.num_steps)]


def test_onecycle_is_torchs_with_linear_annealing_and_cycled_momentum():
    config = TrainConfig(num_steps=50, warmup_steps=10, lr=1e-4, schedule="onecycle", cycle_momentum=True)
    ours = Schedule(config)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-4, pct_start=10 / 50, anneal_strategy="linear", total_steps=50
    )
    for step in range(50):
        group = optimizer.param_groups[0]
        assert ours.lr(step) == pytest.approx(group["lr"], rel=1e-9, abs=1e-15)
        assert ours.beta1(step) == pytest.approx(group["betas"][0], rel=1e-9)
        optimizer.step()
        if step < 49:
            theirs.step()


def test_rsqrt_peaks_at_base_over_root_warmup():
    lr = rates(schedule="rsqrt", lr=0.05, warmup_steps=1000, num_steps=3000)
    assert max(lr) == pytest.approx(1.58e-3, rel=2e-3)  # lra-protocol: ListOps of the original benchmark
    assert lr.index(max(lr)) == 999
    assert lr[2999] == pytest.approx(0.05 / math.sqrt(3000))


def test_inverse_sqrt_starts_at_its_initial_rate_and_falls_as_the_root():
    lr = rates(schedule="inverse_sqrt", lr=1e-3, warmup_init_lr=1e-7, warmup_steps=100, num_steps=500)
    assert lr[0] == pytest.approx(1e-7 + (1e-3 - 1e-7) / 100)
    assert lr[99] == pytest.approx(1e-3)
    assert lr[399] == pytest.approx(1e-3 * math.sqrt(100 / 400))


def test_linear_decay_ends_at_zero_and_its_warmup_may_be_a_power():
    lr = rates(schedule="linear", lr=1e-2, warmup_steps=10, warmup_power=2.0, num_steps=100)
    assert lr[4] == pytest.approx(1e-2 * 0.25)
    assert lr[9] == pytest.approx(1e-2)
    assert lr[99] == pytest.approx(0.0)


def test_cosine_is_half_way_down_in_the_middle():
    lr = rates(schedule="cosine", lr=1.0, warmup_steps=20, num_steps=120)
    assert lr[69] == pytest.approx(0.5)
    assert lr[119] == pytest.approx(0.0, abs=1e-12)


def test_cosine_cycle_restarts():
    lr = rates(schedule="cosine_cycle", lr=1.0, warmup_steps=10, cycle_steps=50, num_steps=200)
    assert lr[9] == pytest.approx(1.0)
    assert lr[59] == pytest.approx(1.0)  # a full cycle after warm-up
    assert lr[34] == pytest.approx(0.5)


def test_constant_stays_after_warmup():
    lr = rates(schedule="constant", lr=0.3, warmup_steps=3, num_steps=6)
    assert lr == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])


def test_plateau_cuts_the_rate_after_patience_evaluations_without_improvement():
    schedule = Schedule(TrainConfig(schedule="plateau", lr=1.0, plateau_patience=1, plateau_factor=0.1))
    for accuracy in (0.5, 0.4, 0.6, 0.6, 0.6):
        schedule.observe(accuracy)
    assert schedule.lr(7) == pytest.approx(0.1)
    again = Schedule(schedule.config, **schedule.state())
    assert again.lr(7) == schedule.lr(7)
