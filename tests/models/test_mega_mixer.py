"""Mega as a mixer: what it is in a block, and how it differs from the whole layer."""

import pytest
import torch

from models import Place, build

PLACE = Place(d_model=16, num_heads=2, max_len=20)
OPTIONS = {"key_width": 6, "d_state": 3}


def pair(**layer):
    """A `mega` and a `mega_mixer` of the same parameters."""
    whole, mixer = build("mega", PLACE, **OPTIONS, **layer), build("mega_mixer", PLACE, **OPTIONS)
    mixer.gated.load_state_dict(whole.gated.state_dict())
    return whole, mixer


@torch.no_grad()
def attended(whole, x):
    """What `mega` adds to x before its feed-forward."""
    whole.ffn.down.weight.zero_()
    return whole(x, None, None)[0] - x


def test_with_norms_after_the_residuals_it_is_what_mega_adds():
    whole, mixer = pair(norm="none", prenorm=False)
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(mixer(x), attended(whole, x), rtol=0, atol=1e-5)


def test_with_norms_before_it_its_gate_weighs_against_the_normed_input_and_that_of_mega_does_not():
    whole, mixer = pair(norm="layer", prenorm=True)
    x = torch.randn(2, 13, 16) * 3
    normed = whole.norm(x)
    update, _ = whole.gated(normed, None)
    torch.testing.assert_close(mixer(normed) + update * (normed - x), attended(whole, x), rtol=0, atol=1e-5)


def test_traits_follow_the_options_as_those_of_mega_do():
    for own in ({}, {"chunk": 4}, {"attn_dropout": 0.1}, {"position_bias": "rotary", "attn_dropout": 0.1}):
        traits = [build(name, PLACE, **own).traits for name in ("mega", "mega_mixer")]
        assert traits[0] == traits[1]
    assert build("mega_mixer", PLACE, **OPTIONS).state_size(20) == 20 * (6 + 32) + 2 * 16 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_what_the_residual_stream_has(dtype):
    _, mixer = pair()
    x = torch.randn(2, 13, 16, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = mixer(x)
    out.square().sum().backward()
    assert out.dtype == x.dtype and x.grad.isfinite().all()
