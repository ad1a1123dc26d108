"""Mamba-2: its start, its heads, what each direction sees, and its chunks."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import Place, build
from models.mamba2 import gated_norm, head_width, ssd

PLACE = Place(d_model=16, num_heads=2, max_len=200)


def mamba2(place=PLACE, **own):
    torch.manual_seed(0)
    return build("mamba2", place, **own).double()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_it_starts_as_published():
    layer = mamba2(Place(d_model=64, num_heads=2, max_len=8), head_dim=2)
    dt, rates = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert layer.num_heads == 64
    assert 1e-3 - 1e-9 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1 + 1e-9
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert (layer.D == 1).all() and (layer.norm_weight == 1).all()
    assert not layer.in_proj.bias.any() and not layer.out_proj.bias.any()
    assert layer.conv_weight.abs().max() <= 0.5 < 1.05 * layer.conv_weight.abs().max()


def test_both_directions_draw_their_own_start():
    layer = mamba2()
    assert not torch.equal(layer.conv_weight[0], layer.conv_weight[1])
    assert not torch.equal(layer.A_log[0], layer.A_log[1])


def test_recurrence_parameters_are_tagged_and_others_are_not():
    parameters = dict(mamba2(ssm_lr_scale=0.1).named_parameters())
    tagged = {name for name, p in parameters.items() if getattr(p, "no_weight_decay", False)}
    assert tagged == {"A_log", "D", "dt_bias"}
    assert {parameters[name].lr_scale for name in tagged} == {0.1}
    assert mamba2().A_log.lr_scale == 1.0


@pytest.mark.parametrize(
    ("inner", "width"), [(8, 8), (32, 32), (64, 64), (256, 64), (384, 64), (200, 50), (97, 1)]
)
def test_heads_are_the_widest_that_divide_the_inner_width(inner, width):
    assert head_width(None, inner) == width


def test_untied_directions_with_equal_parameters_are_the_tied_ones():
    tied, untied = mamba2(directions="tied"), mamba2()
    shared = tied.state_dict()
    first, rest = shared["in_proj.weight"].split([64, len(shared["in_proj.weight"]) - 64])
    shared["in_proj.weight"] = torch.cat([first, rest, rest])
    shared["in_proj.bias"] = shared["in_proj.bias"].new_zeros(len(shared["in_proj.weight"]))
    for name in ("conv_weight", "conv_bias", "A_log", "D", "dt_bias"):
        shared[name] = torch.cat([shared[name]] * 2)
    untied.load_state_dict(shared)
    x, mask = draw(2, 70, 16), torch.arange(70) < torch.tensor([70, 33])[:, None]
    torch.testing.assert_close(untied(x, mask), tied(x, mask), rtol=0, atol=1e-12)


def test_a_hole_keeps_the_state_and_is_a_zero_to_the_convolution():
    layer, x = mamba2(directions="forward"), draw(1, 20, 16)
    mask = (torch.arange(20) < 5) | (torch.arange(20) >= 15)
    found = layer(x, mask[None])
    wider = torch.cat([x[:, :10], torch.full((1, 30, 16), 7.0).double(), x[:, 10:]], dim=1)
    still = torch.cat([mask[:10], torch.zeros(30, dtype=torch.bool), mask[10:]])
    torch.testing.assert_close(layer(wider, still[None])[0, still], found[0, mask], rtol=0, atol=1e-12)
    joined = layer(x[:, mask])[0]  # the convolution reaches 3 tokens back, and there it read zeros
    assert (joined - found[0, mask])[5:8].abs().amax(-1).min() > 1e-6


def test_decays_that_underflow_give_finite_gradients():
    x, B, C = draw(1, 200, 2, 4), draw(1, 200, 5, seed=1), draw(1, 200, 5, seed=2)
    log_decay = torch.where(torch.arange(200) % 7 == 3, -1e4, -1e-3)[None, :, None].expand(1, 200, 2)
    leaves = [part.float().requires_grad_() for part in (x, B, C, log_decay)]
    ssd(*leaves).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_the_gate_comes_before_the_norm():
    y, z = draw(3, 4, 6), draw(3, 4, 6, seed=1)
    gated = y * z * z.sigmoid()
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(gated_norm(y, z, torch.ones(6).double()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"directions": "both"}, "unknown directions 'both' for mamba2"),
        ({"head_dim": 5}, "heads of head_dim=5; choose a divisor of 32"),
        ({"head_dim": 2.0}, "heads of head_dim=2.0; choose a divisor of 32"),
        ({"d_state": 0}, "whole d_state and expand >= 1, got 0 and 2"),
        ({"d_state": 2.5}, "whole d_state and expand >= 1, got 2.5 and 2"),
        ({"expand": 1.5}, "whole d_state and expand >= 1, got 64 and 1.5"),
        ({"dt_min": 0.2}, "finite 0 < dt_min <= dt_max, got dt_min=0.2, dt_max=0.1"),
        ({"dt_max": math.inf}, "finite 0 < dt_min <= dt_max, got dt_min=0.001, dt_max=inf"),
        ({"ssm_lr_scale": -1}, "finite number >= 0, got lr_scale=-1"),
        ({"eps": 0.0}, "eps > 0, got 0.0"),
        ({"kernel": "cuda"}, "unknown kernel 'cuda' for mamba2"),
    ],
)
def test_bad_settings_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        mamba2(**own)


def test_fla_is_refused_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="kernel=fla cannot run: it needs a CUDA device"):
        mamba2(kernel="fla")(draw(1, 4, 16))


def test_fla_gets_a_copy_of_keys_and_queries_for_each_head(monkeypatch):
    from models import fla_kernels
    from models.scan import decayed_attention

    layer, x = mamba2(), draw(2, 70, 16)
    expected = layer(x)
    monkeypatch.setattr(fla_kernels, "chosen", lambda *args, one_decay: one_decay)
    monkeypatch.setattr(fla_kernels, "decayed_attention", decayed_attention)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_the_state_is_counted_for_both_directions():
    assert mamba2().state_size(100) == 2 * 32 * 64
    assert mamba2(directions="forward", d_state=8).state_size(1) == 32 * 8
