"""Gated linear attention: where its decays start, its directions, its heads, what it refuses."""

import math

import pytest
import torch

from models import Place, build
from models.gla import gla

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=80)


def streams(length=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g = torch.randn(4, 2, length, 2, 4, generator=generator, dtype=torch.float64)
    return q, k, v, -g.abs()


def test_widths_are_those_of_the_paper():
    layer = build("gla", PLACE)
    q, k, v, log_decay = layer.there(torch.randn(1, 5, 16))
    assert [x.shape[2:] for x in (q, k, v, log_decay)] == [(2, 4), (2, 4), (2, 8), (2, 4)]
    assert layer.there.decay_down.weight.shape == (16, 16) and layer.state_size(1000) == 2 * 2 * 4 * 8


def test_decays_start_near_a_half_to_the_sixteenth():
    log_decay = build("gla", PLACE).there(torch.randn(4, 50, 16))[3]
    assert (log_decay < 0).all()
    torch.testing.assert_close(log_decay.mean(), torch.tensor(0.5).log() / 16, rtol=0.2, atol=0)


def test_log_decays_of_bf16_weights_stay_float32():
    layer = build("gla", PLACE).bfloat16()
    assert layer.there(torch.randn(1, 5, 16).bfloat16())[3].dtype == torch.float32


def test_untied_directions_have_projections_of_their_own():
    layer = build("gla", PLACE, directions="untied")
    assert {n for n, _ in layer.named_parameters() if n.startswith("back.")} == {
        n.replace("there.", "back.") for n, _ in layer.named_parameters() if n.startswith("there.")
    }


def test_the_state_of_one_direction_is_a_matrix_of_each_head():
    assert build("gla", PLACE, directions="forward").state_size(70) == 2 * 4 * 8


def test_the_state_passes_a_hole_unchanged():
    """The tokens around a hole are as far apart as if it were not there."""
    mask = (torch.arange(70) % 5 != 2).expand(2, 70)
    kept = [x[:, mask[0]] for x in streams()]
    torch.testing.assert_close(gla(*streams(), mask)[:, mask[0]], gla(*kept), **EXACT)


def test_heads_of_one_value_may_have_the_other_norm():
    assert build("gla", PLACE, expand_v=0.125).out.in_features == 2


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"directions": "both"}, "unknown directions 'both' for gla; choose from: tied, untied, forward"),
        ({"head_norm": "batch"}, "unknown head_norm 'batch' for gla; choose from: rms, layer"),
        ({"kernel": "triton"}, "unknown kernel 'triton' for gla; choose from: auto, torch, fla"),
        ({"expand_k": 0.3}, "whole head widths of at least 1; got 2.4 and 8 for heads of 8"),
        ({"expand_v": 0}, "whole head widths of at least 1; got 4 and 0"),
        ({"expand_k": math.inf}, "whole head widths of at least 1; got inf and 8"),
        ({"expand_v": math.inf}, "whole head widths of at least 1; got 4 and inf"),
        (
            {"expand_v": 0.125, "head_norm": "layer"},
            "gla with head_norm=layer would make heads of 1 value zero; use head_norm=rms or wider heads",
        ),
        ({"gate_rank": True}, "gate_rank >= 1, whole, and finite tau > 0, got True and 16"),
        ({"gate_rank": 0}, "gate_rank >= 1, whole, and finite tau > 0, got 0 and 16"),
        ({"tau": 0.0}, "got 16 and 0"),
        ({"tau": math.inf}, "got 16 and inf"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("gla", PLACE, **own)
