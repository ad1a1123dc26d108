"""Luna: its slots, its carry and its options."""

from functools import partial

import pytest
import torch
from torch import nn

from models import Place, build
from models.luna import luna_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
SIZES = {"d_model": 16, "num_heads": 4, "max_len": 30}


def layer(index=0, num_layers=2, **own):
    place = Place(layer_index=index, num_layers=num_layers, **SIZES)
    return build("luna", place, **{"proj_len": 5, "d_ff": 24, **own}).double().eval()


def inputs(length=13):
    x = torch.randn(2, length, 16, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([length, 4])[:, None]
    return x, mask


@pytest.mark.parametrize("tied", [True, False])
def test_gradcheck(tied):
    mask = torch.tensor([[True] * 3, [False] * 3])
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, 3, 4, dtype=torch.float64).unbind(0)]

    def attend(q, k, v):
        return luna_attention(q, k, mask, num_heads=2, values=None if tied else v) + 0 * v

    assert torch.autograd.gradcheck(attend, leaves)


def test_carry_starts_in_the_first_layer_and_is_demanded_by_the_others():
    first, second, (x, mask) = layer(0), layer(1), inputs()
    assert first.init_carry(3).shape == (3, 5, 16)
    assert second.init_carry(3) is None and second.slots is None
    _, carry = first(x, mask, first.init_carry(2))
    assert carry.shape == (2, 5, 16)
    with pytest.raises(ValueError, match="layer 1 needs the carry"):
        second(x, mask, None)


@pytest.mark.parametrize("prenorm", [False, True])
def test_last_layer_hands_nothing_on_and_has_no_parameter_that_nothing_reads(prenorm):
    layers, (x, mask) = [layer(i, prenorm=prenorm) for i in (0, 1)], inputs()
    carry = layers[0].init_carry(2)
    for luna in layers:
        x, carry = luna(x, mask, carry)
    assert carry is None
    x.square().sum().backward()
    assert all(p.grad is not None for luna in layers for p in luna.parameters())


def test_dynamic_projection_hides_slots_past_the_number_of_tokens():
    hidden, shown, (x, mask) = layer(dynamic_projection=True), layer(), inputs()
    shown.load_state_dict(hidden.state_dict())
    p = hidden.init_carry(2)
    found, expected = hidden(x, mask, p)[0], shown(x, mask, p)[0]
    torch.testing.assert_close(found[0], expected[0], **EXACT)  # 13 tokens see all 5 slots
    cut, _ = shown(x[1:, :4], None, p[1:, :4])
    torch.testing.assert_close(found[1:, :4], cut, **EXACT)  # 4 tokens see the first 4 slots
    unmasked, _ = hidden(x[1:, :4], None, p[1:])
    torch.testing.assert_close(unmasked, cut, **EXACT)


def test_first_slots_are_scaled_and_get_positions_unless_told_not_to():
    with_positions, without = layer(), layer(sinusoidal=False)
    assert torch.equal(without.init_carry(1)[0], without.slots)
    difference = with_positions.init_carry(1)[0] - 4 * with_positions.slots
    torch.testing.assert_close(difference[0], torch.tensor([0.0] * 8 + [1.0] * 8).double(), **EXACT)
    assert difference[3, 0].item() == pytest.approx(torch.tensor(3.0).sin().item(), abs=1e-6)


def test_batch_norm_counts_real_tokens_only():
    luna, (x, mask) = layer(norm="batch").train(), inputs()
    p = luna.init_carry(2)
    found, _ = luna(x, mask, p)
    poisoned, _ = luna(x.masked_fill(~mask[..., None], 50.0), mask, p)
    torch.testing.assert_close(found[mask], poisoned[mask], **EXACT)


def test_norm_stats_all_count_padding_too():
    luna, (x, mask) = layer(norm="batch", norm_stats="all").train(), inputs()
    p = luna.init_carry(2)
    found, poisoned = (luna(t, mask, p)[0][mask] for t in (x, x.masked_fill(~mask[..., None], 50.0)))
    assert (found - poisoned).abs().max() > 0.1


def test_scores_past_the_range_of_float16_stay_finite():
    q, kv = (1000 * torch.randn(2, n, 32).half() for n in (5, 40))
    out = luna_attention(q, kv, num_heads=2)
    assert out.dtype == torch.float16 and out.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_accurate_over_4096_keys(autocast):
    q, k, v = (s * torch.randn(2, n, 32).bfloat16() for s, n in ((3, 16), (3, 4096), (1, 4096)))
    attend = partial(luna_attention, num_heads=2)
    expected = attend(q.double(), k.double(), values=v.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(q.float(), k.float(), values=v.float()) if autocast else attend(q, k, values=v)
    error = (found - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 1e-2  # 2e-3; of scores in bfloat16 2e-2


def test_sizes_follow_from_the_arguments():
    assert build("luna", Place(**SIZES)).ff.up.out_features == 4 * 16
    assert layer().state_size(13) == 5 * 16
    assert layer(tie_kv=False).state_size(13) == 2 * 5 * 16


def test_slots_start_with_deviation_of_one_over_the_square_root_of_the_width():
    assert layer(proj_len=4000).slots.std().item() == pytest.approx(
        16**-0.5, rel=0.02
    )  # seven standard errors


def test_heads_of_another_width_are_projected_back():
    place = Place(d_head=6, **SIZES)
    luna, (x, mask) = build("luna", place).double(), inputs()
    assert luna(x, mask, luna.init_carry(2))[0].shape == x.shape
    assert isinstance(layer().pack_out, nn.Identity)


@pytest.mark.parametrize("which", ["dropout", "attn_dropout", "act_dropout"])
def test_each_dropout_acts_in_training_only(which):
    luna, (x, mask) = layer(**{which: 0.5}).train(), inputs()
    run = lambda: luna(x, mask, luna.init_carry(2))[0]  # noqa: E731
    assert not torch.equal(run(), run())
    luna.eval()
    assert torch.equal(run(), run())


def test_each_row_drops_elements_of_the_first_slots_of_its_own():
    first, second = layer(dropout=0.5).train().init_carry(2)
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.parametrize("prenorm", [False, True])
def test_where_all_is_dropped_x_and_p_are_their_residuals(prenorm):
    luna, (x, mask) = layer(dropout=1.0, prenorm=prenorm).train(), inputs()
    p = torch.randn(2, 5, 16, dtype=torch.float64)
    found, carry = luna(x, mask, p)
    expected = (x, p) if prenorm else (luna.norm_ff(luna.norm_x(x)), luna.norm_p(p))
    torch.testing.assert_close((found, carry), expected, **EXACT)


LENGTHS = (270, 0, 1, 64, 65)  # the first is cut into chunks


def packed_and_padded(scale=1.0):
    """(x [t d], cu_seqlens) with three filler rows, and the same batch as (x [b l d], mask)."""
    x = scale * torch.randn(5, 270, 16, dtype=torch.float64)
    mask = torch.arange(270) < torch.tensor(LENGTHS)[:, None]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return (torch.cat([x[mask], torch.full((3, 16), 50.0)]), cu_seqlens), (x, mask)


@pytest.mark.parametrize(
    "own",
    [
        {"prenorm": True, "tie_kv": False, "proj_len": 9, "dynamic_projection": True},
        {"norm": "batch"},
        {"norm": "batch", "prenorm": True},
    ],
    ids=lambda own: "-".join(own),
)
def test_packed_rows_train_like_padded_ones(own):
    one, other = (layer(**{"attn_dropout": 0.0, **own}).train() for _ in range(2))
    other.load_state_dict(one.state_dict())
    (rows, cu_seqlens), (x, mask) = packed_and_padded()
    found, handed_on = one.forward_packed(rows, cu_seqlens, 270, one.init_carry(5))
    expected, carry = other(x, mask, other.init_carry(5))
    torch.testing.assert_close((found[:-3], handed_on), (expected[mask], carry), **EXACT)
    (found[:-3].square().sum() + handed_on.sin().sum()).backward()
    (expected[mask].square().sum() + carry.sin().sum()).backward()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), **EXACT)  # running means among them


def test_norms_that_count_padding_leave_no_packed_path():
    assert layer(norm="batch").traits.packed and layer(norm_stats="all").traits.packed
    assert not layer(norm="batch", norm_stats="all").traits.packed


def test_dropout_of_packed_attention_acts_in_training_only():
    luna, ((rows, cu_seqlens), _) = layer(attn_dropout=0.5), packed_and_padded()
    run = lambda: luna.forward_packed(rows, cu_seqlens, 270, None)  # noqa: E731
    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    luna.train()
    assert not any(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize(("packed", "by_rows"), [(False, False), (True, False), (True, True)])
def test_each_of_both_steps_drops_its_weights(packed, by_rows, monkeypatch):
    """Where all are dropped Y_P is zero, and Y_X what is left: a bias. `by_rows`: not in chunks."""
    luna, ((rows, cu_seqlens), (x, mask)) = layer(attn_dropout=1.0).train(), packed_and_padded()
    if by_rows:
        monkeypatch.setattr("models.luna.few_queries_fit", lambda q, k, v: True)
    slots = luna.init_carry(5)
    mixed, summary = luna.mix_packed(rows, slots, cu_seqlens, 270) if packed else luna.mix(x, slots, mask)
    assert not summary.any() and slots.any()
    assert torch.equal(mixed, luna.out.bias.expand_as(mixed))
    assert luna.unpack_kv.bias.any()  # so that slots of zeros give values that are none


def test_no_slots_are_refused():
    with pytest.raises(ValueError, match="proj_len >= 1"):
        layer(proj_len=0)
