"""Long convolution: the squash, what its kernel starts as, and its dropout."""

import pytest
import torch

from models import Place, build
from models.long_conv import initial, squash

PLACE = Place(d_model=8, num_heads=2, max_len=40)


def test_the_squash_by_hand():
    weight = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0], dtype=torch.float64)
    expected = torch.tensor([0.3, -0.3, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(squash(weight[None], threshold=0.2)[0], expected, rtol=0, atol=1e-15)


def test_smoothing_averages_neighbours_and_counts_zeros_beyond_the_ends():
    found = squash(torch.tensor([[3.0, 6.0, 9.0]]).double(), threshold=0, smoothing=3)
    torch.testing.assert_close(found, torch.tensor([[3.0, 6.0, 5.0]]).double(), rtol=0, atol=1e-12)


def test_the_kernel_of_a_short_sequence_is_smoothed_with_weights_beyond_its_end():
    layer = build("long_conv", PLACE, smoothing=7, threshold=0.0, kernel_dropout=0.0).double()
    x = torch.randn(1, 11, 8).double()
    longer = torch.cat([x, torch.zeros(1, 29, 8).double()], dim=1)
    mask = torch.arange(40)[None] < 11
    torch.testing.assert_close(layer(x), layer(longer, mask)[:, :11], rtol=0, atol=1e-12)


def test_random_weights_start_small():
    layer = build("long_conv", Place(d_model=64, num_heads=2, max_len=512))
    assert layer.kernel.std().item() == pytest.approx(0.002, rel=0.02)  # 131,072 draws
    assert layer.skip.std().item() == pytest.approx(1.0, rel=0.2)


def test_geometric_weights_decay_faster_from_feature_to_feature():
    torch.manual_seed(0)
    layer = build("long_conv", Place(d_model=64, num_heads=2, max_len=4096), kernel_init="geometric")
    first, last = layer.kernel[..., :64].std(dim=(0, 1, 3)), layer.kernel[..., -64:].std(dim=(0, 1, 3))
    rates = torch.tensor([32.0 ** (i / 64) for i in range(64)])  # (H/2)^(h/H), over the whole kernel
    torch.testing.assert_close((first / last).log(), rates, rtol=0.1, atol=0.25)  # 256 draws an estimate


def test_geometric_weights_start_ten_times_as_large_as_random_ones():
    for kernel_init, std in (("geometric", 0.02), ("random", 0.002)):
        first_tap = initial((2, 2, 1000, 8), kernel_init)[..., 0]
        assert first_tap.std().item() == pytest.approx(std, rel=0.1)  # 4,000 draws


def test_kernel_dropout_acts_on_squashed_taps_in_training_alone():
    own = {"kernel_dropout": 0.5, "threshold": 0.001, "channels": 1, "directions": "forward"}
    own["output"] = "none"
    layer = build("long_conv", PLACE, **own)
    layer.skip.data.zero_()
    impulse = torch.zeros(1, 40, 8)
    impulse[:, 0] = 1.0
    shown = {}
    layer.output.activation = lambda y: shown.setdefault(layer.training, y)
    layer.eval()(impulse)
    layer.train()(impulse)
    taps, dropped = shown[False][0].T, shown[True][0].T
    torch.testing.assert_close(taps, squash(layer.kernel[0, 0], threshold=0.001), rtol=0, atol=1e-6)
    kept = dropped.abs() > 1e-6
    assert 0.3 < kept.sum() / (taps.abs() > 1e-6).sum() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * taps[kept], rtol=0, atol=1e-6)


def test_the_kernel_alone_has_a_learning_rate_of_its_own_and_no_weight_decay():
    layer = build("long_conv", PLACE, kernel_lr_scale=0.05)
    tags = {name: getattr(p, "lr_scale", None) for name, p in layer.named_parameters()}
    assert {name: tag for name, tag in tags.items() if tag is not None} == {"kernel": 0.05}
    assert layer.kernel.no_weight_decay


def test_a_sequence_longer_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="at most 40 positions and got 41"):
        build("long_conv", PLACE)(torch.randn(1, 41, 8))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"channels": 0}, "channels >= 1, got 0"),
        ({"threshold": -1.0}, "threshold >= 0, got -1.0"),
        ({"smoothing": 4}, "odd number of neighbours, got smoothing=4"),
        ({"kernel_dropout": 1.0}, "0 <= kernel_dropout < 1, got 1.0"),
        ({"kernel_lr_scale": float("nan")}, "finite number >= 0, got lr_scale=nan"),
        ({"kernel_lr_scale": float("inf")}, "finite number >= 0, got lr_scale=inf"),
        ({"kernel_lr_scale": -0.1}, "finite number >= 0, got lr_scale=-0.1"),
        ({"kernel_init": "zero"}, "unknown kernel_init 'zero' for long_conv; choose from: random, geometric"),
        (
            {"directions": "both"},
            "unknown directions 'both' for long_conv; choose from: tied, untied, forward",
        ),
    ],
)
def test_bad_values_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("long_conv", PLACE, **own)
