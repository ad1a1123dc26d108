"""Hyena: its features, its window, where it looks, and what its parameters are."""

import math

import pytest
import torch

from models import Place, build
from models.hyena import features, filters

PLACE = Place(d_model=8, num_heads=2, max_len=41)


def test_features_by_hand():
    found = features(torch.tensor([0.0, 10.0, 40.0]).double(), 41, 3)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 0.25, 1.0]).double())
    angle = 2 * math.pi * 10 / 41 * torch.tensor([1e-4, 1.00005, 2.0]).double()
    torch.testing.assert_close(found[1, 1:4], angle.cos())
    torch.testing.assert_close(found[1, 4:], -angle.sin())


def test_the_window_falls_to_a_hundredth_at_its_reach():
    inputs = features(torch.arange(41.0).double(), 41, 1)
    weights = [torch.zeros(2, 3).double(), torch.ones(1, 1, 3, 2).double() / 2]
    biases, one = [torch.full((2,), math.pi / 2).double()], torch.ones(2).double()
    window = filters(inputs, weights, biases, one)[0, 0]  # the network is 1 everywhere
    torch.testing.assert_close(window[-1, 12], torch.tensor(0.01).double(), rtol=1e-6, atol=0)  # 0.3 * 40
    torch.testing.assert_close(window[0, -1], torch.tensor(0.01 ** (1 / 1.5)).double(), rtol=1e-6, atol=0)
    shifted = filters(inputs, weights, biases, one, shift=0.5)[0, 0]
    torch.testing.assert_close(shifted, window + 0.5, rtol=0, atol=1e-7)


def test_normalised_filters_keep_outputs_small_at_any_length():
    sizes = {}
    for max_len in (256, 4096):
        torch.manual_seed(0)
        layer, x = build("hyena", Place(32, 2, max_len), normalise=True), torch.randn(1, max_len, 32)
        taps = layer.kernels(max_len)
        assert taps[..., 0].abs().sum(dim=-1).sub(1).abs().max() < 1e-5  # the window is 1 there
        sizes[max_len] = layer(x).std().item()
    assert sizes[4096] < 3 * sizes[256]


def test_filters_do_not_depend_on_the_padded_length():
    layer = build("hyena", PLACE)
    torch.testing.assert_close(layer.kernels(13), layer.kernels(41)[..., :13], rtol=0, atol=1e-5)


def test_filters_stretch_with_max_len():
    layer = build("hyena", PLACE, directions="forward", bands=1, frequency=1.0).double()
    other = build("hyena", Place(8, 2, max_len=81), directions="forward", bands=1, frequency=1.0).double()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.kernels(81)[..., ::2], layer.kernels(41), rtol=0, atol=1e-4)


def reach(layer, position):
    """The positions whose output moves with the input at one."""
    x = torch.randn(1, 41, 8, dtype=torch.float64)
    other = x.clone()
    other[:, position] += 1
    return (layer(x) - layer(other)).abs().amax(dim=(0, 2)) > 1e-12


@pytest.mark.parametrize("directions", ["tied", "untied"])
def test_both_directions_look_everywhere(directions):
    assert reach(build("hyena", PLACE, directions=directions).double(), 20).all()


def test_forward_looks_back_alone():
    moved = reach(build("hyena", PLACE, directions="forward").double(), 20)
    assert not moved[:20].any()
    assert moved[20:].all()


@pytest.mark.parametrize(("directions", "seen"), [("untied", [19, 20, 21]), ("forward", [20, 21, 22])])
def test_the_short_convolution_is_centred_unless_causal(directions, seen):
    layer = build("hyena", PLACE, directions=directions)
    impulse = torch.zeros(1, 41, 24)
    impulse[:, 20] = 1
    moved = (layer.short(impulse) - layer.short_bias).abs().amax(dim=(0, 2)) > 1e-9
    assert moved.nonzero().flatten().tolist() == seen


def test_tied_filters_are_even():
    layer = build("hyena", PLACE, directions="tied", order=1).double()
    layer.short = lambda streams: torch.cat([streams[..., :8], torch.ones_like(streams[..., 8:])], dim=-1)
    x = torch.randn(1, 41, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x.flip(1)).flip(1), layer(x), rtol=0, atol=1e-12)


def test_the_filters_alone_have_tags():
    layer = build("hyena", PLACE, filter_lr_scale=0.5)
    tagged = {name.split(".")[0] for name, p in layer.named_parameters() if hasattr(p, "lr_scale")}
    assert tagged == {"filter_weights", "filter_biases", "frequency"}
    assert all(p.no_weight_decay and p.lr_scale == 0.5 for p in (*layer.filter_weights, layer.frequency))


def test_order_sets_the_number_of_filters_and_streams():
    layer = build("hyena", PLACE, order=3)
    assert layer.kernels(5).shape == (2, 3, 8, 5)
    assert layer.streams.out_features == 32
    assert layer.skip.shape == (3, 8)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"order": 0}, "order=0, bands=16, d_filter=64, filter_layers=2"),
        ({"kernel_size": 4}, "odd size, got kernel_size=4"),
        ({"frequency": 0.0}, "frequency > 0, got 0.0"),
        ({"directions": "both"}, "unknown directions 'both' for hyena; choose from: tied, untied, forward"),
    ],
)
def test_bad_values_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("hyena", PLACE, **own)
