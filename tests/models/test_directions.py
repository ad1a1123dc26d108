"""What a token sees under each choice of directions, of every mechanism that has the option."""

import pytest
import torch

import models
from models import Place, build
from models.common import own_parameters
from models.directions import DIRECTIONS

PLACE = Place(d_model=16, num_heads=2, max_len=80)
NAMES = [name for name in models.names() if "directions" in own_parameters(models.get(name))]
UNTIED = [name for name in NAMES if name != "tnn"]  # which has one network for both
# Not hyena, whose filters alone are tied, nor retnet, which turns queries and keys by their positions.
MIRRORED = [name for name in UNTIED if name not in ("hyena", "retnet")]


def layer(name, directions):
    torch.manual_seed(0)
    return build(name, PLACE, directions=directions).double().eval()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "directions"),
    [(name, way) for name in NAMES for way in DIRECTIONS if way != "untied" or name in UNTIED],
)
def test_forward_sees_the_past_alone_and_the_others_see_both_sides(name, directions):
    made, x = layer(name, directions), draw(1, 70, 16)
    moved = x.clone()
    moved[:, 40] += 1
    changed = (made(moved) - made(x)).abs().amax(-1)[0]
    assert (changed[40:] > 1e-10).all()
    before = changed[:40].max()
    assert before < 1e-14 if directions == "forward" else before > 1e-4


@pytest.mark.parametrize("name", MIRRORED)
def test_tied_directions_commute_with_reversal_and_others_do_not(name):
    x = draw(2, 70, 16)
    for directions, same in (("tied", True), ("untied", False), ("forward", False)):
        made = layer(name, directions)
        difference = (made(x.flip(1)).flip(1) - made(x)).abs().max()
        assert difference < 1e-12 if same else difference > 1e-3, directions
