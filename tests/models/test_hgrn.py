"""HGRN: the floors of its forget gates over layers, its angles and directions, what it refuses."""

import pytest
import torch
from proofs.hgrn import reference

from models import Place, build
from models.hgrn import floor_of_layer, gates

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=8, num_heads=2, max_len=80)


def x_of(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def layers(number=4, **own):
    shared = {}
    sizes = {"d_model": 8, "num_heads": 2, "max_len": 80, "num_layers": number, "shared": shared}
    return [build("hgrn", Place(layer_index=i, **sizes), **own).double() for i in range(number)]


def test_floors_rise_evenly_from_zero_at_the_start():
    stack = layers()
    assert stack[0].floors is None
    for k, layer in enumerate(stack[1:], start=1):
        floor, rest = floor_of_layer(layer.floors, k)
        torch.testing.assert_close(floor.exp(), torch.full((8,), k / 4).double(), **EXACT)
        torch.testing.assert_close(rest.exp(), torch.full((8,), 1 - k / 4).double(), **EXACT)


def test_floors_rise_whatever_is_learned():
    logits = x_of(4, 8) * 30
    floors = torch.stack([floor_of_layer(logits, k)[0].exp() for k in (1, 2, 3)])
    assert (floors.diff(dim=0) >= 0).all() and (floors <= 1).all()


def test_layers_share_one_matrix_of_floors():
    shared = {}
    places = [Place(8, 2, 80, layer_index=i, num_layers=4, shared=shared) for i in range(4)]
    stack = torch.nn.ModuleList(build("hgrn", place) for place in places)
    assert stack[1].floors is stack[3].floors
    assert sum(p.shape == (4, 8) for p in stack.parameters()) == 1


@pytest.mark.parametrize(
    ("layer", "recurrence", "directions"),
    [
        (1, "complex", "tied"),
        (3, "real", "tied"),
        (3, "complex", "untied"),
        (1, "real", "untied"),
        (2, "complex", "theta"),
        (2, "complex", "forward"),
    ],
)
def test_higher_layers_equal_the_reference(layer, recurrence, directions):
    mechanism = layers(recurrence=recurrence, directions=directions)[layer]
    with torch.no_grad():
        mechanism.floors.copy_(x_of(4, 8))
        if directions == "theta":
            mechanism.theta_back.mul_(1.7)
    x, mask = x_of(2, 30, 8).requires_grad_(), torch.arange(30) < torch.tensor([30, 17])[:, None]
    leaves = [x, mechanism.floors]
    found, expected = mechanism(x, mask)[mask], reference(mechanism, x, mask)[mask]
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(
        *(torch.autograd.grad(o.square().sum(), leaves) for o in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
        assert one.abs().max() > 1e-6  # the floors of a layer tested alone are learned


def test_gates_stay_finite_where_sigmoids_and_shares_underflow():
    logit = torch.tensor([-300.0, -90.0, 0.0, 90.0, 300.0]).requires_grad_()
    logits = torch.tensor([[200.0], [0.0], [-200.0]]).requires_grad_()
    for floor in (None, floor_of_layer(logits, 1), floor_of_layer(logits, 2)):
        log_decay, share = gates(logit, floor)
        (log_decay + share).sum().backward()
        assert all(t.isfinite().all() for t in (log_decay, share, logit.grad))
        assert (log_decay <= 0).all() and (share >= 0).all()
    assert logits.grad.isfinite().all()


def test_decays_near_one_keep_the_digits_by_which_they_differ_from_one():
    logit, logits = x_of(200, 8) * 3, torch.tensor([[9.0] * 8, [0.0] * 8]).double()
    log_decay, share = gates(logit, floor_of_layer(logits, 1))
    assert share.max() < 1e-3
    found, found_share = gates(logit.float(), floor_of_layer(logits.float(), 1))
    torch.testing.assert_close(found.double(), log_decay, rtol=5e-6, atol=0)
    torch.testing.assert_close(found_share.double(), share, rtol=5e-6, atol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_gates_and_states_of_bf16_weights_are_float32(layer):
    shared = {}
    place = Place(d_model=8, num_heads=2, max_len=80, layer_index=layer, num_layers=2, shared=shared)
    module = build("hgrn", place).bfloat16()
    x = torch.randn(1, 5, 8).bfloat16()
    floor = None if layer == 0 else floor_of_layer(module.floors.float(), 1)
    log_decay, update = module.there(x, floor)
    assert log_decay.dtype == update.dtype == torch.complex64
    assert module(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        log_decay, _ = module.float().there(x.float(), floor)
    assert log_decay.dtype == torch.complex64


def test_no_layer_has_a_floor_without_lower_bound():
    assert all(layer.floors is None for layer in layers(lower_bound=False))


def test_angles_start_as_released():
    theta = build("hgrn", PLACE).there.theta
    torch.testing.assert_close(theta, 10_000.0 ** (-torch.arange(8) / 4))


def test_angles_and_floors_are_not_decayed():
    layer = layers(directions="theta")[1]
    tagged = {n for n, p in layer.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert tagged == {"there.theta", "theta_back", "floors"}
    assert layer.floors.lr_scale == layer.there.theta.lr_scale == 1.0


def test_angles_of_both_directions_start_equal_and_need_not_stay_so():
    x, layer = x_of(2, 40, 8), build("hgrn", PLACE, directions="theta").double()
    torch.testing.assert_close(layer(x.flip(1)).flip(1), layer(x), **EXACT)
    with torch.no_grad():
        layer.theta_back.mul_(2)
    assert (layer(x.flip(1)).flip(1) - layer(x)).abs().max() > 1e-12


def test_the_state_passes_a_hole_unchanged():
    layer, x = build("hgrn", PLACE).double(), x_of(1, 40, 8)
    mask = (torch.arange(40) % 5 != 2)[None]
    torch.testing.assert_close(layer(x, mask)[:, mask[0]], layer(x[:, mask[0]]), **EXACT)


def test_widths_follow_the_place_and_the_recurrence():
    wide = build("hgrn", Place(d_model=8, num_heads=2, max_len=9, d_head=6))
    assert wide.out.in_features == 24 and wide.state_size(9) == 48
    assert build("hgrn", PLACE, recurrence="real", directions="forward").state_size(9) == 8


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"directions": "both"},
            "unknown directions 'both' for hgrn; choose from: tied, untied, forward, theta",
        ),
        ({"recurrence": "dual"}, "unknown recurrence 'dual' for hgrn; choose from: complex, real"),
        (
            {"directions": "theta", "recurrence": "real"},
            "no theta with recurrence=real; choose directions=tied",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("hgrn", PLACE, **own)


def test_a_layer_past_the_last_is_refused():
    with pytest.raises(ValueError, match="among num_layers=2 layers; got layer_index=2"):
        build("hgrn", Place(d_model=8, num_heads=2, max_len=9, layer_index=2, num_layers=2))
