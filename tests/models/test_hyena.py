"""Hyena: its features, its window, where it looks, and what its parameters are."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@torch.no_grad()
def test_outputs_are_as_large_at_16384_tokens_as_at_256():
    sizes = {}
    for max_len in (256, 16_384):
        torch.manual_seed(0)
        layer, x = build("hyena", Place(64, 2, max_len)), torch.randn(1, max_len, 64)
        taps = layer.kernels(max_len)
        assert taps[..., 0].abs().sum(dim=-1).sub(1).abs().max() < 1e-5  # the window is 1 there
        sizes[max_len] = layer(x).square().mean().sqrt().item()
    assert 1 / 3 < sizes[16_384] / sizes[256] < 3
    assert max(sizes.values()) < 2


def test_a_network_of_zeros_gives_filters_of_zeros():
    layer = build("hyena", PLACE)
    layer.filter_weights[-1].data.zero_()
    kernels = layer.kernels(41)
    kernels.sum().backward()
    assert not kernels.any()
    assert all(weight.grad.isfinite().all() for weight in layer.filter_weights)


class ProductDtypes(TorchDispatchMode):
    """Notes what the operands of matrix products are."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen |= {x.dtype for x in args}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["hyena", "tnn"])
def test_kernels_are_made_by_products_in_double_precision_which_tf32_does_not_round(name):
    layer = build(name, PLACE)
    with ProductDtypes() as products, torch.autocast("cpu", torch.bfloat16):
        kernels = layer.kernels(41)
        kernels = kernels[0] if name == "tnn" else kernels
        kernels.sum().backward()
    assert products.seen == {torch.float64}
    assert kernels.dtype == torch.float32


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


@pytest.mark.parametrize(
    ("directions", "kernel_size", "seen"),
    [("untied", 3, [19, 20, 21]), ("forward", 3, [20, 21, 22]), ("forward", 4, [20, 21, 22, 23])],
)
def test_the_short_convolution_is_centred_unless_causal(directions, kernel_size, seen):
    layer = build("hyena", PLACE, directions=directions, kernel_size=kernel_size)
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


def test_parameters_start_as_those_of_torch_layers_and_the_skip_as_normal_numbers():
    layer = build("hyena", Place(d_model=256, num_heads=2, max_len=64), d_filter=16, bands=4)
    for weight, fan_in in zip(layer.filter_weights, (9, 16, 16, 16), strict=True):
        assert 0.9 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5
    assert layer.short_weight.abs().max() <= 3**-0.5
    assert layer.skip.std().item() == pytest.approx(1.0, rel=0.2)


def test_order_sets_the_number_of_filters_and_streams():
    layer = build("hyena", PLACE, order=3)
    assert layer.kernels(5).shape == (2, 3, 8, 5)
    assert layer.streams.out_features == 32
    assert layer.skip.shape == (3, 8)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"order": 0}, "order=0, bands=16, d_filter=64, filter_layers=2"),
        ({"kernel_size": 4}, "odd size unless directions=forward, got kernel_size=4"),
        ({"kernel_size": 0, "directions": "forward"}, "kernel_size >= 1, got 0"),
        ({"frequency": 0.0}, "frequency > 0 and a finite shift, got frequency=0.0, shift=0.0"),
        ({"shift": math.nan}, "frequency > 0 and a finite shift, got frequency=14.0, shift=nan"),
        ({"filter_lr_scale": math.nan}, "finite number >= 0, got lr_scale=nan"),
        ({"directions": "both"}, "unknown directions 'both' for hyena; choose from: tied, untied, forward"),
    ],
)
def test_bad_values_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("hyena", PLACE, **own)
