"""External attention: where tokens meet, that nothing vanishes, shared memories, packed rows."""

import math

import pytest
import torch

from models import Place, build
from models.external import external_attention, external_attention_packed

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)


def inputs(length=13, d=8, dtype=torch.float64):
    return torch.randn(2, 2, length, d, dtype=dtype)


def memories(slots=5, d=8, dtype=torch.float64):
    keys, values = torch.randn(2, slots, d, dtype=dtype)
    return {"keys": keys, "values": values}


def test_tokens_mix_through_the_softmax_over_positions():
    x, memory = inputs(), memories()
    moved = x.clone()
    moved[:, :, 12] += 1
    change = external_attention(moved, **memory) - external_attention(x, **memory)
    assert change[:, :, :12].abs().amax(dim=-1).min() > 1e-5


def test_a_token_alone_gets_the_mean_of_the_values():
    x, memory = inputs(), memories()
    alone = torch.cat([external_attention(part, **memory) for part in x.split(1, dim=2)], dim=2)
    expected = memory["values"].mean(dim=0).expand_as(x)  # every slot gives its whole weight to the one token
    torch.testing.assert_close(alone, expected, **EXACT)
    assert (external_attention(x, **memory) - expected).abs().max() > 0.1


def test_weights_sum_to_one_over_slots():
    x, memory = inputs(), memories()
    ones = torch.ones(5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        external_attention(x, keys=memory["keys"], values=ones), torch.ones_like(x), **EXACT
    )


def test_one_slot_gives_its_value_to_every_token():
    x, memory = inputs(), memories(slots=1)
    torch.testing.assert_close(external_attention(x, **memory), memory["values"].expand_as(x), **EXACT)


def test_weights_that_underflow_one_by_one_keep_their_ratio():
    x = torch.zeros(1, 1, 2, 1)
    x[..., 0, 0] = 1.0  # the second token's weights are exp(-200) and exp(-201): zero in float32
    memory = {"keys": torch.tensor([[200.0], [201.0]]), "values": torch.tensor([[0.0], [1.0]])}
    found = external_attention(x, **memory)
    assert found.flatten().tolist() == pytest.approx([0.5, 1 / (1 + math.e)], abs=1e-4)


def test_masked_row_equals_the_row_cut_to_its_length():
    x, memory = inputs(), memories()
    mask = torch.arange(13) < torch.tensor([13, 6])[:, None]
    cut = external_attention(x[1:, :, :6], **memory)
    torch.testing.assert_close(external_attention(x, mask, **memory)[1:, :, :6], cut, **EXACT)


def test_row_without_real_tokens_gives_zeros_and_finite_gradients():
    x, memory = inputs(dtype=torch.float32).requires_grad_(), memories(dtype=torch.float32)
    out = external_attention(x, torch.tensor([[True] * 13, [False] * 13]), **memory)
    assert not out[1].any()
    out.square().sum().backward()
    assert x.grad.isfinite().all()


def test_packed_path_equals_each_sequence_alone_also_where_exponentials_overflow():
    memory = memories()
    x = 40 * torch.randn(167, 2, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 166, 167], dtype=torch.int32)
    parts = [part for part in x.split(cu_seqlens.diff().tolist()) if len(part)]
    alone = [external_attention(part.transpose(0, 1)[None], **memory)[0].transpose(0, 1) for part in parts]
    found = external_attention_packed(x, cu_seqlens, 200, **memory)
    torch.testing.assert_close(found, torch.cat(alone), **EXACT)


def test_heads_share_the_memories():
    mechanism = build("external", PLACE)
    assert mechanism.keys.shape == mechanism.values.shape == (64, 8)
    x = inputs(length=7).double()
    same = x[:, :1].expand(-1, 2, -1, -1)
    memory = {"keys": mechanism.keys.double(), "values": mechanism.values.double()}
    found = external_attention(same, **memory)
    torch.testing.assert_close(found[:, 0], found[:, 1], **EXACT)


def test_gradcheck():
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [inputs(length=3, d=4).requires_grad_(), *(x.requires_grad_() for x in memories(3, 4).values())]
    attend = lambda x, keys, values: external_attention(x, mask, keys=keys, values=values)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves)


def test_autocast_leaves_both_normalisations_in_float32():
    x, memory = inputs(dtype=torch.float32), memories(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = external_attention(x, **memory)
    assert (
        found - external_attention(x, **memory)
    ).abs().max() < 2e-2  # the last product alone is in bfloat16


def test_values_that_make_no_sense_are_refused():
    for num_slots in (0, 1.5):
        with pytest.raises(ValueError, match=f"num_slots >= 1, whole, got {num_slots}"):
            build("external", PLACE, num_slots=num_slots)


@pytest.mark.parametrize("size", [-1000.0, 1000.0])
def test_packed_scores_whose_exponentials_all_vanish_or_overflow_keep_their_ratios(size):
    x = size + torch.randn(7, 2, 1, dtype=torch.float64)
    memory = {"keys": torch.tensor([[1.0], [1.001]]).double(), "values": torch.eye(2).double()}
    memory["values"] = memory["values"][:, :1]
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    alone = [external_attention(part.transpose(0, 1)[None], **memory)[0] for part in x.split([3, 4])]
    found = external_attention_packed(x, cu_seqlens, 4, **memory)
    torch.testing.assert_close(found, torch.cat([y.transpose(0, 1) for y in alone]), **EXACT)
    assert 0.3 < found.mean() < 0.7


def test_dropout_acts_on_packed_rows_in_training_alone():
    mechanism = build("external", PLACE, attn_dropout=0.5)
    x, cu_seqlens = torch.randn(20, 16), torch.tensor([0, 5, 20], dtype=torch.int32)
    assert not torch.equal(*(mechanism.forward_packed(x, cu_seqlens, 200) for _ in range(2)))
    mechanism.eval()
    assert torch.equal(*(mechanism.forward_packed(x, cu_seqlens, 200) for _ in range(2)))


def test_memories_start_apart_and_spread_as_the_weights_of_two_linear_layers():
    mechanism = build("external", PLACE, num_slots=1000)
    for memory, bound in ((mechanism.keys, 8**-0.5), (mechanism.values, 1000**-0.5)):
        assert memory.abs().max() <= bound
        assert memory.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)  # five standard errors
