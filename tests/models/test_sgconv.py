"""SGConv: its kernel's pieces, its norm, and how far the pieces reach."""

import pytest
import torch

from models import Place, build
from models.sgconv import multiscale_kernel, upsampled

PLACE = Place(d_model=8, num_heads=2, max_len=100)


def kernel_of(layer, length):
    options = {"finest": layer.finest, "power": layer.power}
    return multiscale_kernel(layer.pieces, layer.kernel_norm, layer.decay, length, **options)


def test_upsampling_by_hand():
    found = upsampled(torch.tensor([1.0, 3.0]).double(), 4)
    expected = torch.tensor([1.0, 1.0, 1.25, 1.75, 2.25, 2.75, 3.0, 3.0]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("weights", [1, 2, 7])
def test_upsampling_is_that_of_torch(factor, weights):
    piece = torch.randn(2, 3, weights, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(piece, scale_factor=factor, mode="linear")
    torch.testing.assert_close(upsampled(piece, factor), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("own", [{}, {"kernel_dim": 1}, {"kernel_dim": 16, "finest": 1}, {"kernel_dim": 512}])
def test_the_pieces_reach_max_len(own):
    layer = build("sgconv", PLACE, **own)
    assert kernel_of(layer, 100).shape == (2, 8, 100)


@pytest.mark.parametrize(("own", "scales"), [({}, 5), ({"finest": 2}, 3), ({"finest": 9}, 1)])
def test_coarser_pieces_are_fewer(own, scales):
    assert build("sgconv", PLACE, kernel_dim=8, **own).pieces.shape == (scales, 2, 8, 8)


def test_a_sequence_longer_than_max_len_is_refused():
    with pytest.raises(ValueError, match="at most 100 positions and got 101"):
        build("sgconv", PLACE)(torch.randn(1, 101, 8))


def test_a_short_kernel_is_the_beginning_of_the_whole():
    layer = build("sgconv", PLACE, kernel_dim=4, power=1.0)
    whole = kernel_of(layer, 100)
    for length in (1, 3, 4, 9, 64):
        torch.testing.assert_close(kernel_of(layer, length), whole[..., :length], rtol=0, atol=1e-7)


@pytest.mark.parametrize("own", [{}, {"decay_min": 1.0, "decay_max": 3.0, "finest": 1}, {"power": 1.0}])
@pytest.mark.parametrize("kernel_init", ["randn", "cos"])
def test_each_kernel_has_norm_one_at_first(own, kernel_init):
    layer = build("sgconv", PLACE, kernel_dim=8, kernel_init=kernel_init, **own)
    norms = kernel_of(layer, 10_000).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(2, 8), rtol=0, atol=1e-5)


def test_the_norm_is_saved_and_does_not_follow_the_weights():
    layer, other = (build("sgconv", PLACE) for _ in range(2))
    norm = layer.kernel_norm.clone()
    layer.pieces.data.mul_(5)
    layer(torch.randn(1, 100, 8))
    assert torch.equal(layer.kernel_norm, norm)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.kernel_norm, norm)


def test_the_pieces_weigh_less_from_scale_to_scale():
    layer = build("sgconv", PLACE, kernel_dim=1)  # one weight a piece: a staircase
    layer.pieces.data.fill_(1.0)
    kernel = kernel_of(layer, 100)
    torch.testing.assert_close(kernel[..., 0] / kernel[..., 1], torch.full((2, 8), 2.0))
    torch.testing.assert_close(kernel[..., 1] / kernel[..., 99], torch.full((2, 8), 2.0**6))


def test_cosines_have_whole_periods_in_an_order_of_their_own():
    layer = build("sgconv", Place(d_model=4, num_heads=1, max_len=64), kernel_dim=16, kernel_init="cos")
    assert torch.equal(layer.pieces[:, 0], layer.pieces[:, 1])
    torch.testing.assert_close(layer.pieces[..., 0], layer.pieces[..., -1], rtol=0, atol=1e-5)
    turns = (layer.pieces[:, 0] * layer.pieces[:, 0].roll(1, -1) < 0).sum(dim=-1).sort(dim=-1).values
    assert torch.equal(turns, torch.tensor([0, 2, 4, 6]).expand(len(turns), -1))
    wide = build("sgconv", Place(d_model=32, num_heads=1, max_len=64), kernel_dim=16, kernel_init="cos")
    assert not torch.equal(wide.pieces[0], wide.pieces[1])


def test_the_skip_starts_as_standard_normal_numbers():
    skip = build("sgconv", Place(d_model=256, num_heads=2, max_len=64)).skip
    assert skip.std().item() == pytest.approx(1.0, rel=0.2)


def test_the_pieces_alone_have_a_learning_rate_of_their_own():
    layer = build("sgconv", PLACE, kernel_lr_scale=0.25)
    tags = {name: getattr(p, "lr_scale", None) for name, p in layer.named_parameters()}
    assert {name: tag for name, tag in tags.items() if tag is not None} == {"pieces": 0.25}
    assert not hasattr(layer.pieces, "no_weight_decay")  # released code decays them like all weights


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"kernel_dim": 0}, "kernel_dim >= 1, got 0"),
        ({"decay_min": 3.0}, "0 < decay_min <= decay_max, got decay_min=3.0, decay_max=2.0"),
        ({"finest": -1}, "finest >= 0 and power >= 0, got finest=-1, power=0.0"),
        ({"kernel_lr_scale": float("nan")}, "finite number >= 0, got lr_scale=nan"),
        ({"kernel_lr_scale": -1.0}, "finite number >= 0, got lr_scale=-1.0"),
        ({"kernel_init": "sin"}, "unknown kernel_init 'sin' for sgconv; choose from: randn, cos"),
        ({"directions": "two"}, "unknown directions 'two' for sgconv; choose from: tied, untied, forward"),
    ],
)
def test_bad_values_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("sgconv", PLACE, **own)
