"""TNN: the entries of its matrix, their decay, and what its parameters start as."""

import pytest
import torch

from models import Place, build
from models.tnn import coefficients, rms_normed

PLACE = Place(d_model=8, num_heads=2, max_len=64)


def test_the_norm_leaves_a_root_mean_square_of_one_and_zero_alone():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64) * 2**0.5
    torch.testing.assert_close(rms_normed(x), expected, rtol=0, atol=1e-8)


def test_a_network_of_one_map_by_hand():
    weights = [torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[2.0, 3.0]]).double()]
    biases = [torch.zeros(2).double(), torch.ones(1).double()]
    found = coefficients(torch.tensor([2, 0, -1]), weights, biases, torch.tensor([0.5]).double().log())
    expected = [(1 + 2 * 2**0.5) / 4, 1.0, 0.5]  # ReLU leaves no negative offset; zero has no norm
    torch.testing.assert_close(found, torch.tensor([expected]).double(), rtol=0, atol=1e-7)


def test_the_decay_is_a_power_of_the_distance():
    with torch.random.fork_rng([]):
        layer = build("tnn", PLACE, gamma=1.0)
        faded = build("tnn", PLACE, gamma=0.9)
    faded.load_state_dict(layer.state_dict())
    past, future = (b / a for a, b in zip(layer.kernels(40), faded.kernels(40), strict=True))
    torch.testing.assert_close(past, 0.9 ** torch.arange(40.0).expand(8, -1), rtol=1e-4, atol=0)
    torch.testing.assert_close(future, 0.9 ** torch.arange(1.0, 41.0).expand(8, -1), rtol=1e-4, atol=0)


def test_learned_decays_start_between_gamma_and_one_and_move():
    layer = build("tnn", PLACE, gamma=0.9, learned_decay=True, expand=32)
    assert layer.decay.shape == (256,)
    assert layer.decay.std().item() == pytest.approx(1.0, rel=0.2)
    decays = layer.log_decays().exp()
    torch.testing.assert_close(decays, 0.9 + 0.1 * layer.decay.double().sigmoid(), rtol=0, atol=1e-12)
    layer(torch.randn(1, 30, 8)).square().sum().backward()
    assert layer.decay.grad.abs().min() > 0


def test_past_and_future_differ_without_a_second_network():
    past, future = build("tnn", PLACE).kernels(30)
    assert (past[:, 1:] - future[:, :-1]).abs().max() > 1e-3
    assert build("tnn", PLACE, directions="forward").kernels(30)[1] is None


@torch.no_grad()
@pytest.mark.parametrize("own", [{}, {"learned_decay": True}, {"gamma": 1.0}], ids=str)
def test_each_entry_has_float32_precision_at_far_offsets(own):
    layer = build("tnn", PLACE, **own)
    found = layer.kernels(16_384)[0]
    expected = layer.double().kernels(16_384)[0]
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=1e-30)


def test_entries_do_not_depend_on_the_length():
    layer = build("tnn", PLACE)
    for short, long in zip(layer.kernels(9), layer.kernels(64), strict=True):
        torch.testing.assert_close(short, long[:, :9], rtol=0, atol=1e-6)


def test_projections_start_at_a_fiftieth():
    layer = build("tnn", Place(d_model=128, num_heads=2, max_len=64), expand=2)
    for parameter in (layer.streams.weight, layer.streams.bias, layer.out.weight, layer.out.bias):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.25)  # 128 draws or more
    assert layer.streams.weight.shape == (512, 128)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"expand": 0}, "expand=0, d_rpe=32, rpe_layers=3"),
        ({"gamma": 1.5}, "0 < gamma <= 1, got 1.5"),
        ({"gamma": 1.0, "learned_decay": True}, "between gamma and 1, got gamma=1"),
        ({"directions": "untied"}, "unknown directions 'untied' for tnn; choose from: tied, forward"),
    ],
)
def test_bad_values_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("tnn", PLACE, **own)
