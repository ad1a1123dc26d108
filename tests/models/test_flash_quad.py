"""FLASH-Quad: its biases, what it is divided by, and what is its own in a layer."""

import pytest
import torch

from models import Place, build, flash_quad
from models.flash_quad import RotaryBias, ToeplitzBias, flash_quad_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=20)
MASK = torch.arange(13) < torch.tensor([13, 4])[:, None]


def parts(length=13):
    return [torch.randn(2, length, width, dtype=torch.float64) for width in (6, 6, 10)]


@pytest.mark.parametrize(("kind", "size"), [(RotaryBias, 6), (ToeplitzBias, 20)])
def test_biases_depend_on_the_distance_alone_and_not_on_the_length(kind, size):
    bias = kind(size).double()
    whole = bias(20)
    for distance in range(-19, 20):
        diagonal = whole.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), **EXACT)
    torch.testing.assert_close(bias(7), whole[:7, :7], **EXACT)
    assert whole[0].std() > 1e-4


def test_toeplitz_bias_tells_before_from_after():
    bias = ToeplitzBias(4)
    bias.table.data = torch.arange(-3.0, 4.0)
    positions = torch.arange(4.0)
    assert torch.equal(bias(4), positions[:, None] - positions)


def test_scores_are_divided_by_the_number_of_real_keys():
    q, k, v = parts()
    found = flash_quad_attention(q, k, v, MASK)[1, :4]
    expected = (q[1, :4] @ k[1, :4].T / 4).relu() ** 2 @ v[1, :4]
    torch.testing.assert_close(found, expected, **EXACT)


def test_count_padding_divides_by_the_padded_length_and_says_so():
    q, k, v = parts()
    found = flash_quad_attention(q, k, v, MASK, count_padding=True)[1, :4]
    expected = (q[1, :4] @ k[1, :4].T / 13).relu() ** 2 @ v[1, :4]
    torch.testing.assert_close(found, expected, **EXACT)
    assert build("flash_quad", PLACE).traits.length_invariant
    assert "length_invariant" in build("flash_quad", PLACE, count_padding=True).traits.exceptions()


def test_bias_is_added_after_the_division_and_before_the_square():
    q, k, v = parts()
    bias = torch.randn(13, 13, dtype=torch.float64)
    expected = (q @ k.mT / 13 + bias).relu() ** 2 @ v
    torch.testing.assert_close(flash_quad_attention(q, k, v, bias=bias), expected, **EXACT)


def test_a_gate_of_zero_leaves_the_residual():
    block = build("flash_quad", PLACE)
    block.hidden.weight.data[:32], block.hidden.bias.data[:32] = 0, 0
    block.out.bias.data.zero_()
    x = torch.randn(2, 13, 16)
    out, carry = block(x, MASK, None)
    assert torch.equal(out, x) and carry is None


def test_without_bias_order_does_not_matter_and_with_a_table_weights_are_of_one_length():
    assert build("flash_quad", PLACE).traits.uses_order
    assert build("flash_quad", PLACE, position_bias="none").traits.uses_order
    assert not build("flash_quad", PLACE, position_bias="none", rotate=False).traits.uses_order
    assert not build("flash_quad", PLACE).traits.fixed_length
    assert "fixed_length" in build("flash_quad", PLACE, position_bias="toeplitz").traits.exceptions()


def scores_of(block, x):
    """q k^T of a block's queries and keys, read off where its attention is called."""
    seen, honest = [], flash_quad.flash_quad_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flash_quad,
            "flash_quad_attention",
            lambda q, k, *a, **b: seen.append(q @ k.mT) or honest(q, k, *a, **b),
        )
        block.mix(x, None)
    return seen[0]


@pytest.mark.parametrize("rotated", [True, False])
def test_queries_and_keys_of_equal_tokens_differ_by_position_if_they_are_rotated(rotated):
    block = build("flash_quad", PLACE, rotate=rotated).double()
    block.gain.data.fill_(1.0)
    scores = scores_of(block, torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 13, 16))[0]
    for distance in range(-12, 13):  # what two equal tokens give depends on their distance alone
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), **EXACT)
    assert (scores.std() > 1e-4) == rotated


def test_weights_of_bfloat16_are_rounded_once():
    q, k, _ = (x.bfloat16() for x in parts())
    v, bias = torch.eye(13, dtype=torch.bfloat16).expand(2, -1, -1), torch.randn(13, 13)
    expected = (torch.einsum("bis,bjs->bij", q, k).float() / 13 + bias).relu().square().bfloat16()
    assert torch.equal(flash_quad_attention(q, k, v, bias=bias), expected)


def test_gains_start_small_and_the_norm_gets_its_statistics():
    block = build("flash_quad", PLACE, key_width=2000, norm="batch", norm_stats="all")
    assert block.gain.std().item() == pytest.approx(0.02, rel=0.1) and not block.offset.any()
    assert block.norm.stats == "all"
    assert build("flash_quad", PLACE, norm="batch").norm.stats == "real"


def test_state_is_a_key_and_a_gated_value_for_each_token():
    assert build("flash_quad", PLACE, key_width=6).state_size(20) == 20 * (6 + 32)


def test_row_without_real_keys_gives_its_input_and_the_bias_of_the_output():
    block = build("flash_quad", PLACE)
    x = torch.randn(2, 13, 16, requires_grad=True)
    out, _ = block(x, torch.tensor([[True] * 13, [False] * 13]), None)
    torch.testing.assert_close(out[1], x[1] + block.out.bias)
    out.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"key_width": 0}, "key_width >= 1"),
        ({"expansion": 0}, "expansion >= 1"),
        ({"position_bias": "t5"}, "rotary, toeplitz, none"),
        ({"key_width": 5}, "rotate=True needs an even key_width, got 5"),
        ({"key_width": 5, "rotate": False}, "position_bias=rotary needs an even key_width, got 5"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        build("flash_quad", PLACE, **own)
