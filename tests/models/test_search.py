"""Mechanisms made of others: what a search and a hybrid take, claim and hand on."""

import pytest
import torch

from models import Place, build
from models.candidates import joined
from models.search import candidate_weights

PLACE = Place(d_model=8, num_heads=2, max_len=40, num_layers=3)


def test_weights_are_positive_and_add_up_to_one():
    weights = candidate_weights(30 * torch.randn(5, 4), torch.randn(4, 4), torch.randn(4, 4))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_all_candidates_weigh_the_same_at_first_and_are_told_apart_by_gradients():
    search = build("search", PLACE, candidates=["softmax", "identity"])
    assert search.findings() == pytest.approx({"softmax": 0.5, "identity": 0.5})
    search(torch.randn(2, 9, 8)).square().sum().backward()
    assert search.embeddings.grad.abs().max() > 0


def test_equal_weights_are_no_trap():
    """Where all embeddings are the same, or zero, the gradient still tells the candidates apart."""
    search = build("search", PLACE, candidates=["softmax", "identity"])
    with torch.no_grad():
        search.embeddings.zero_()
    search(torch.randn(2, 9, 8)).square().sum().backward()
    first, second = search.embeddings.grad
    assert (first - second).abs().max() > 1e-3


def test_architecture_parameters_are_tagged_and_others_are_not():
    search = build("search", PLACE)
    tagged = {name for name, p in search.named_parameters() if getattr(p, "architecture", False)}
    assert tagged == {"embeddings", "w_q", "w_k"}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"candidates": ["softmax"]}, "two or more different"),
        ({"candidates": ["softmax", "softmax"]}, "two or more different"),
        ({"candidates": ["softmax", "sofmax"]}, "'sofmax' is unknown; choose from: .*softmax"),
        ({"candidates": ["softmax", "flash_quad"]}, "'flash_quad' is no mixer of the standard block"),
        ({"candidates": ["softmax", "search"]}, "'search' is no mixer"),
        ({"candidates": ["softmax", "hybrid"]}, "'hybrid' is no mixer"),
        ({"settings": {"performer": {}}}, "settings for performer"),
        ({"settings": {"local": {"windw": 3}}}, "settings of 'local'.*windw"),
        ({"settings": {"local": {"window": 0}}}, "window"),
        ({"embedding_width": 0}, "embedding_width"),
    ],
)
def test_a_search_that_cannot_be_is_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("search", PLACE, **own)


def test_settings_and_backbone_settings_reach_the_candidates_that_take_them():
    search = build(
        "search", PLACE, candidates=["local", "linear"], settings={"local": {"window": 3}}, attn_dropout=0.25
    )
    assert search.candidates["local"].window == 3
    assert search.candidates["local"].attn_dropout.p == 0.25


def test_claims_are_joined_with_reasons_that_name_the_mixer():
    mixers = {name: build(name, PLACE) for name in ("softmax", "fnet", "linformer")}
    claims = joined(mixers)
    assert (claims.length_invariant, claims.fixed_length, claims.packed) == (False, True, False)
    assert claims.content_invariant
    assert claims.because["length_invariant"].startswith("fnet: ")
    assert claims.because["fixed_length"].startswith("linformer: ")


def test_a_mixture_is_packed_only_if_all_candidates_are():
    assert build("search", PLACE, candidates=["softmax", "linear"]).traits.packed
    assert not build("search", PLACE, candidates=["softmax", "fnet"]).traits.packed


@pytest.mark.parametrize("layers", [["local", "linear", "softmax"], ["local", "linear"], ["softmax"]])
def test_layer_i_of_a_hybrid_is_the_mixer_it_names(layers):
    for index in range(3):
        place = Place(d_model=8, num_heads=2, max_len=40, num_layers=3, layer_index=index)
        assert build("hybrid", place, layers=layers).mixer.name == layers[index % len(layers)]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"layers": []}, "needs the name of a mixer"),
        ({"layers": ["luna"]}, "'luna' is no mixer"),
        ({"settings": {"softmax": {}}}, "settings for softmax"),
    ],
)
def test_a_hybrid_that_cannot_be_is_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("hybrid", PLACE, **own)


@pytest.mark.parametrize("name", ["search", "hybrid"])
def test_hooks_of_the_mixers_are_asked(name):
    """Routing has an auxiliary loss and centroids that `training_update` writes."""
    own = {"candidates": ["routing", "softmax"]} if name == "search" else {"layers": ["routing"]}
    made = build(name, PLACE, **own)
    inner = made.candidates["routing"] if name == "search" else made.mixer
    asked = []
    inner.aux_loss = lambda: torch.tensor(3.0)
    inner.training_update = asked.append
    made.training_update(7)
    assert asked == [7]
    assert made.aux_loss() == 3.0
    softmax = build("softmax", PLACE).state_size(40) if name == "search" else 0
    alone = build("routing", PLACE).state_size(40)
    assert made.state_size(40) == (None if alone is None else alone + softmax)


@pytest.mark.parametrize("name", ["search", "hybrid"])
def test_packed_rows_are_the_padded_ones(name):
    own = {"candidates": ["softmax", "linear"]} if name == "search" else {"layers": ["linear"]}
    made = build(name, PLACE, **own)
    x = torch.randn(10, 8)
    packed = made.forward_packed(x, torch.tensor([0, 4, 10], dtype=torch.int32), 6)
    torch.testing.assert_close(packed, torch.cat([made(x[None, :4])[0], made(x[None, 4:])[0]]))
