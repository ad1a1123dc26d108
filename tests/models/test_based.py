"""Based: which layers look near and which far, and that each part is what it is called."""

import pytest
import torch

from models import Place, build
from models.local import local_attention
from models.taylor import taylor_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def built(layer_index=0, **own):
    place = Place(d_model=16, num_heads=2, max_len=200, layer_index=layer_index, num_layers=4)
    return build("based", place, **own).double()


def qkv(length=33, d=8):
    return torch.randn(3, 2, 2, length, d, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("layer_index", [0, 1, 2, 3])
def test_layers_alternate_between_the_window_and_the_far(layer_index):
    mixer, (q, k, v) = built(layer_index, window=6), qkv()
    mask = torch.arange(33) < torch.tensor([33, 20])[:, None]
    if layer_index % 2 == 0:
        expected = local_attention(q, k, v, mask, window=6)
    else:
        expected = taylor_attention(q @ mixer.query_projection, k @ mixer.key_projection, v, mask)
    torch.testing.assert_close(mixer.attend(q, k, v, mask), expected, **EXACT)
    assert mixer.traits.uses_order == (layer_index % 2 == 0)


def test_parallel_is_the_sum_of_both_in_every_layer():
    q, k, v = qkv()
    for layer_index in (0, 1):
        mixer = built(layer_index, mode="parallel", window=6)
        far = taylor_attention(q @ mixer.query_projection, k @ mixer.key_projection, v)
        near = local_attention(q, k, v, window=6)
        torch.testing.assert_close(mixer.attend(q, k, v, None), near + far, **EXACT)
        assert mixer.traits.uses_order


def test_only_layers_that_look_far_have_projections_to_features():
    assert not hasattr(built(0), "query_projection")
    assert built(1).query_projection.shape == (2, 8, 16)
    assert built(0, mode="parallel", d_feature=3).key_projection.shape == (2, 8, 3)


@pytest.mark.parametrize("mode", ["alternate", "parallel"])
@pytest.mark.parametrize(("window", "expected"), [(1, False), (2, True), (398, False), (397, True)])
def test_only_a_window_that_cuts_something_off_makes_order_matter(mode, window, expected):
    mixer = built(mode=mode, window=window)
    assert mixer.traits.uses_order == expected
    x = torch.randn(1, 200, 16, dtype=torch.float64)
    moved = (mixer(x.flip(1)).flip(1) - mixer(x)).abs().max()
    turned = torch.randperm(200)
    moved = max(moved, (mixer(x[:, turned]) - mixer(x)[:, turned]).abs().max())
    assert (moved > 1e-9) == expected


def test_a_model_of_one_layer_that_alternates_has_no_features_to_size():
    place = Place(d_model=16, num_heads=2, max_len=200)
    with pytest.raises(ValueError, match="no Taylor layer .* got d_feature=8"):
        build("based", place, d_feature=8)
    assert build("based", place, d_feature=8, mode="parallel").query_projection.shape == (2, 8, 8)
    assert build("based", place).traits.uses_order


@pytest.mark.parametrize("layer_index", [0, 1])
@pytest.mark.parametrize("mode", ["alternate", "parallel"])
def test_packed_path_equals_each_sequence_alone(mode, layer_index):
    mechanism = built(layer_index, mode=mode, window=6)
    x = torch.randn(60, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 60], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), alone, **EXACT)


def test_padding_reaches_neither_part():
    mixer, (q, k, v) = built(mode="parallel", window=6), qkv()
    mask = torch.arange(33) < torch.tensor([33, 20])[:, None]
    cut = mixer.attend(*(x[1:, :, :20] for x in (q, k, v)), None)
    torch.testing.assert_close(mixer.attend(q, k, v, mask)[1:, :, :20], cut, **EXACT)


def test_the_state_is_the_window_or_the_monomials():
    assert built(0, window=6).state_size(100) == 2 * 2 * 7 * 8
    assert built(1).state_size(100) == 2 * (1 + 16 + 136) * 9
    assert built(0, mode="parallel", window=6).state_size(100) == 2 * (2 * 7 * 8 + (1 + 16 + 136) * 9)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"mode": "hybrid"}, "choose from: alternate, parallel"),
        ({"window": 0}, "got d_feature=16, window=0"),
        ({"window": 6.0}, "whole numbers; got d_feature=16, window=6.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, said):
    with pytest.raises(ValueError, match=said):
        built(**own)
