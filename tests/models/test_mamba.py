"""Mamba: its start, what each direction sees, and the selective scan with its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import Place, build
from models import mamba as file
from models.mamba import recur_, selective_scan
from models.scan import scan

PLACE = Place(d_model=16, num_heads=2, max_len=200)


def mamba(place=PLACE, **own):
    torch.manual_seed(0)
    return build("mamba", place, **own).double()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def streams(length, dtype=torch.float64):
    """x, B, C, dt, rate of `selective_scan`, two sets of parameters."""
    x, B, C, dt = (draw(2, 3, length, n, seed=i) for i, n in enumerate((5, 4, 4, 5)))
    rate = draw(2, 4, 5, seed=4).abs()
    return [part.to(dtype).requires_grad_() for part in (x, B, C, dt.abs(), rate)]


def plain(x, B, C, dt, rate):
    decay = (-dt.unsqueeze(-2) * rate[:, None, None]).exp()
    return (scan(decay, x.unsqueeze(-2) * B.unsqueeze(-1), dim=2) * C.unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 65])
@pytest.mark.parametrize("part", [2**22, 100])
def test_the_selective_scan_equals_the_shared_scan_with_gradients_in_any_parts(length, part, monkeypatch):
    monkeypatch.setattr(file, "PART_ON_CPU", part)
    inputs, weight = streams(length), draw(2, 3, length, 5, seed=9)
    outputs = [scanned(*inputs) for scanned in (plain, selective_scan)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in outputs]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 37])
def test_the_recurrence_in_place_equals_the_loop_from_either_end(length):
    update, dt, rate = draw(1, 2, length, 4, 3), draw(1, 2, length, 3, seed=1).abs(), draw(1, 4, 3).abs()
    for from_end in (False, True):
        state, expected = torch.zeros(1, 2, 4, 3).double(), torch.empty_like(update)
        for t in reversed(range(length)) if from_end else range(length):
            state = (-dt[:, :, t, None] * rate[:, None]).exp() * state + update[:, :, t]
            expected[:, :, t] = state
        found = recur_(update.clone(), dt, rate, from_end=from_end)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_of_the_size_of_the_states_is_kept_for_the_gradients():
    layer, x, sizes = mamba(d_state=64), draw(2, 100, 16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert 0 < max(sizes) < 2 * 2 * 100 * (2 * 64 + 2 * 32) < 2 * 2 * 100 * 32 * 64


def test_large_steps_forget_and_give_finite_gradients_in_single_precision():
    x, B, C, dt, rate = streams(200, dtype=torch.float32)
    steps = torch.where(torch.arange(200)[:, None] % 7 == 3, 1e4, 1e-3) * torch.ones_like(dt)
    leaves = [part.detach().requires_grad_() for part in (x, B, C, steps, rate)]
    out = selective_scan(*leaves)
    out.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    alone = selective_scan(*(part[:, :, 3:10] for part in leaves[:4]), rate)
    torch.testing.assert_close(out[:, :, 3:10], alone, rtol=0, atol=1e-5)


def test_it_starts_as_published():
    layer = mamba(Place(d_model=64, num_heads=2, max_len=8))
    dt = F.softplus(layer.dt_bias)
    assert 1e-3 - 1e-9 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1 + 1e-9
    torch.testing.assert_close(
        layer.A_log.exp(), torch.arange(1.0, 17).double().expand(2, 128, 16), rtol=1e-6, atol=0
    )
    assert (layer.D == 1).all() and not layer.in_proj.bias.any() and not layer.out_proj.bias.any()
    spreads = {"conv_weight": 4**-0.5, "conv_bias": 4**-0.5, "x_proj": 128**-0.5, "dt_proj": 4**-0.5}
    for name, spread in spreads.items():
        largest = getattr(layer, name).abs().max()
        assert 0.95 * spread < largest <= spread
    assert layer.dt_proj.shape == (2, 128, 4)  # rank: 64 / 16


def test_the_rank_of_the_step_is_a_sixteenth_of_the_width_rounded_up():
    assert [mamba(Place(width, 1, 8)).rank for width in (16, 17, 40, 64)] == [1, 2, 3, 4]


def test_step_sizes_of_bf16_weights_are_taken_in_float32(monkeypatch):
    """In bf16 a step near 0.1 is rounded by up to 0.4 %."""
    given = []
    monkeypatch.setattr(
        file, "selective_scan", lambda x, B, C, dt, rate: given.append(dt) or torch.zeros_like(x)
    )
    layer, x = mamba(directions="forward", dt_min=0.05).float(), draw(2, 50, 16, dtype=torch.float32)
    with torch.no_grad():
        layer.dt_proj.zero_()  # steps are the bias alone
        layer.dt_bias.copy_(layer.dt_bias.bfloat16())
    layer(x)
    layer.bfloat16()(x.bfloat16())
    single, half = given
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=1e-6, atol=0)


def test_it_cannot_be_differentiated_twice_and_says_so():
    inputs = streams(3)
    gradients = torch.autograd.grad(selective_scan(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


def test_both_directions_draw_their_own_start():
    layer = mamba()
    assert not torch.equal(layer.conv_weight[0], layer.conv_weight[1])
    assert not torch.equal(layer.dt_bias[0], layer.dt_bias[1])


def test_recurrence_parameters_are_tagged_and_others_are_not():
    parameters = dict(mamba(ssm_lr_scale=0.1).named_parameters())
    tagged = {name for name, p in parameters.items() if getattr(p, "no_weight_decay", False)}
    assert tagged == {"A_log", "D", "dt_bias"}
    assert {parameters[name].lr_scale for name in tagged} == {0.1}
    assert mamba().A_log.lr_scale == 1.0


def test_untied_directions_with_equal_parameters_are_the_tied_ones():
    tied, untied = mamba(directions="tied"), mamba()
    shared = {
        name: value if "_proj." in name else torch.cat([value] * 2)
        for name, value in tied.state_dict().items()
    }
    untied.load_state_dict(shared)
    x, mask = draw(2, 70, 16), torch.arange(70) < torch.tensor([70, 33])[:, None]
    torch.testing.assert_close(untied(x, mask), tied(x, mask), rtol=0, atol=1e-12)


def test_a_hole_keeps_the_state_and_is_a_zero_to_the_convolution():
    layer, x = mamba(directions="forward"), draw(1, 20, 16)
    mask = (torch.arange(20) < 5) | (torch.arange(20) >= 15)
    found = layer(x, mask[None])
    wider = torch.cat([x[:, :10], torch.full((1, 30, 16), 7.0).double(), x[:, 10:]], dim=1)
    still = torch.cat([mask[:10], torch.zeros(30, dtype=torch.bool), mask[10:]])
    torch.testing.assert_close(layer(wider, still[None])[0, still], found[0, mask], rtol=0, atol=1e-12)
    joined = layer(x[:, mask])[0]  # the convolution reaches 3 tokens back, and there it read zeros
    assert (joined - found[0, mask])[5:8].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"directions": "both"}, "unknown directions 'both' for mamba"),
        ({"d_state": 0}, "d_state, expand and dt_rank >= 1, got 0, 2 and 1"),
        ({"dt_rank": -1}, "d_state, expand and dt_rank >= 1, got 16, 2 and -1"),
        ({"d_state": 2.5}, "whole d_state, expand and dt_rank >= 1, got 2.5, 2 and 1"),
        ({"expand": 1.5}, "whole d_state, expand and dt_rank >= 1, got 16, 1.5 and 1"),
        ({"dt_rank": True}, "whole d_state, expand and dt_rank >= 1, got 16, 2 and True"),
        ({"dt_min": 0.2}, "finite 0 < dt_min <= dt_max, got dt_min=0.2, dt_max=0.1"),
        ({"dt_max": math.inf}, "finite 0 < dt_min <= dt_max, got dt_min=0.001, dt_max=inf"),
        ({"ssm_lr_scale": -1}, "finite number >= 0, got lr_scale=-1"),
    ],
)
def test_bad_settings_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        mamba(**own)


def test_the_state_is_counted_for_both_directions():
    assert mamba().state_size(100) == 2 * 32 * 16
    assert mamba(directions="forward", d_state=8).state_size(1) == 32 * 8
