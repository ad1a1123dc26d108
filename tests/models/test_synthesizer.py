"""Synthesizer: where its weights come from, what they do not depend on, and its released form."""

import pytest
import torch

from models import Place, build
from models.synthesizer import synthesizer_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=20)
MASK = torch.arange(13) < torch.tensor([13, 4])[:, None]


def weights(mechanism, x, mask=None):
    """The attention weights, read off with a unit vector for each value."""
    length, num_heads = x.shape[1], mechanism.place.num_heads
    v = torch.eye(length, dtype=x.dtype).expand(x.shape[0], num_heads, -1, -1)
    return synthesizer_attention(None, None, v, mask, synthetic=mechanism.synthetic(x))


@pytest.mark.parametrize("kind", ["random", "factorised"])
def test_weights_of_learned_kinds_do_not_depend_on_the_input(kind):
    mechanism = build("synthesizer", PLACE, kind=kind)
    assert torch.equal(weights(mechanism, torch.randn(2, 13, 16)), weights(mechanism, torch.randn(2, 13, 16)))


def test_dense_weights_of_a_query_depend_on_that_query_alone():
    mechanism = build("synthesizer", PLACE, kind="dense").double()
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    other = torch.randn(1, 13, 16, dtype=torch.float64)
    other[:, 5] = x[:, 5]
    before, after = weights(mechanism, x), weights(mechanism, other)
    torch.testing.assert_close(before[:, :, 5], after[:, :, 5], **EXACT)
    assert (before - after)[:, :, :5].abs().max() > 1e-3


def test_factorised_scores_have_the_rank_asked_for_and_the_size_of_random_ones():
    place = Place(d_model=16, num_heads=2, max_len=400)
    x = torch.zeros(1, 400, 16)
    factorised = build("synthesizer", place, kind="factorised", rank=5).synthetic(x)
    random = build("synthesizer", place, kind="random").synthetic(x)
    assert torch.linalg.matrix_rank(factorised).tolist() == [5, 5]
    assert 0.7 < factorised.std() / random.std() < 1.4  # tables of 400 x 5 numbers decide the former


def test_released_row_adds_random_scores_to_the_dot_product():
    mechanism = build("synthesizer", PLACE, kind="random", dot_product=True).double()
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    q, k, v = mechanism.qkv(x).view(2, 13, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 8**0.5 + mechanism.scores[:, :13, :13]
    scores = scores.masked_fill(~MASK[:, None, None, :], -torch.inf)
    expected = mechanism.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mechanism(x, MASK), expected, **EXACT)


def test_use_mask_false_gives_padding_the_weight_of_its_score():
    quirk = build("synthesizer", PLACE, kind="random", use_mask=False).double()
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    v = quirk.value(x).view(2, 13, 2, 8)
    scores = quirk.scores[:, :13, :13].exp()
    mixed = torch.einsum("hij,bjhd->bihd", scores / scores.sum(dim=-1, keepdim=True), v)
    torch.testing.assert_close(quirk(x, MASK), quirk.out(mixed.flatten(2)), **EXACT)
    assert {"content_invariant", "length_invariant"} <= set(quirk.traits.exceptions())


def test_softmax_of_bfloat16_values_is_taken_in_float32():
    scores, v = 30 + torch.randn(2, 13, 13), torch.eye(13, dtype=torch.bfloat16).expand(2, 2, -1, -1)
    found = synthesizer_attention(None, None, v, synthetic=scores)
    assert torch.equal(found, scores.softmax(dim=-1).bfloat16().expand(2, -1, -1, -1))


def test_state_is_a_value_for_each_token_and_a_key_if_there_is_a_dot_product():
    assert build("synthesizer", PLACE).state_size(13) == 13 * 16
    assert build("synthesizer", PLACE, dot_product=True).state_size(13) == 2 * 13 * 16


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    scores = torch.randn(2, 13, 13, requires_grad=True)
    v = torch.randn(2, 2, 13, 8, requires_grad=True)
    out = synthesizer_attention(None, None, v, MASK & torch.tensor([[True], [False]]), synthetic=scores)
    assert not out[1].any()
    out.square().sum().backward()
    assert scores.grad.isfinite().all() and v.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "random"])
def test_dropout_is_drawn_for_each_row(kind):
    mechanism = build("synthesizer", PLACE, kind=kind, attn_dropout=0.5)
    x = torch.randn(1, 13, 16).expand(2, -1, -1)
    out = mechanism(x)
    assert not torch.equal(out[0], out[1])
    mechanism.eval()
    torch.testing.assert_close(mechanism(x)[0], mechanism(x)[1])


def test_scores_of_the_dot_product_alone_are_rotated():
    rotary = Place(d_model=16, num_heads=2, max_len=20, rotary_base=100.0)
    assert not hasattr(build("synthesizer", rotary), "qkv")
    assert hasattr(build("synthesizer", rotary, dot_product=True), "qkv")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"kind": "vanilla"}, "dense, random, factorised"),
        ({"rank": 0}, "rank >= 1"),
        ({"kind": "dense", "rank": 8}, "rank=8 is of kind=factorised alone; leave it out for kind=dense"),
        ({"kind": "random", "rank": 8}, "rank=8 is of kind=factorised alone; leave it out for kind=random"),
        ({"dot_product": True, "use_mask": False}, "with one it masks; got dot_product=True"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("synthesizer", PLACE, **own)
