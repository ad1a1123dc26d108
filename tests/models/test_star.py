"""Star-Transformer: the ring under masks, the relay from layer to layer, cycles that share weights."""

import pytest
import torch

from models import Place, build
from models.star import relay_attention, ring, ring_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def layer(index=0, num_layers=2, **own):
    torch.manual_seed(index)
    place = Place(d_model=16, num_heads=4, max_len=30, layer_index=index, num_layers=num_layers)
    return build("star", place, **own).double().eval()


def inputs(length=13):
    return torch.randn(2, length, 16, dtype=torch.float64)


def test_ring_goes_over_real_tokens_in_order_and_closes_at_the_last():
    mask = torch.tensor(
        [[True, False, True, True, False], [False, True, False, False, False], [False] * 5, [True] * 5]
    )
    after, before = ring(mask)
    assert after.tolist() == [[2, 1, 3, 0, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4, 0]]
    assert before.tolist() == [[3, 1, 0, 2, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]


def test_holes_are_as_if_the_tokens_were_not_there():
    star, x = layer(num_cycles=3), inputs()
    mask = torch.rand(2, 13) < 0.6
    found, relay = star(x, mask, None)
    for b in range(2):
        expected, alone = star(x[b : b + 1, mask[b]], None, None)
        torch.testing.assert_close(found[b, mask[b]], expected[0], **EXACT)
        torch.testing.assert_close(relay[b], alone[0], **EXACT)


def test_what_a_token_tells_goes_one_place_a_cycle_and_to_all_through_the_relay():
    x = inputs()
    other = x.clone()
    other[:, 5] += 1.0
    for cycles in (1, 2):
        star = layer(num_layers=1, num_cycles=cycles)
        relay = torch.zeros(2, 16, dtype=torch.float64)  # given, so that it is no mean of the inputs
        moved = (star(other, None, relay)[0] - star(x, None, relay)[0]).abs().amax(dim=(0, 2))
        assert (moved > 1e-9).nonzero().flatten().tolist() == ([4, 5, 6] if cycles == 1 else list(range(13)))


def test_cycles_share_their_weights():
    names = [{n: p.shape for n, p in layer(num_cycles=t).named_parameters()} for t in (1, 4)]
    assert names[0] == names[1]


def test_each_cycle_reads_the_inputs_again():
    star, x = layer(num_layers=1, num_cycles=2, norm="none"), inputs()
    with torch.no_grad():
        for name in ("ring_out", "relay_out"):
            getattr(star, name).weight.zero_()
            getattr(star, name).bias.zero_()
        star.ring_out.weight.copy_(torch.eye(16))
        star.ring_q.weight.zero_()  # equal weights: a fifth of each of the five
        star.ring_q.bias.zero_()
        star.ring_kv.weight[16:].copy_(torch.eye(16))
        star.ring_kv.bias.zero_()
    x, relay = x.abs(), torch.ones(2, 16, dtype=torch.float64)
    one = (x.roll(1, 1) + x + x.roll(-1, 1) + x + relay[:, None]) / 5
    two = (one.roll(1, 1) + one + one.roll(-1, 1) + x) / 5  # the relay is zero after the first cycle
    torch.testing.assert_close(star(x, None, relay)[0], two, **EXACT)


def test_relay_starts_as_the_mean_of_real_tokens_and_goes_from_layer_to_layer():
    first, second, x = layer(0), layer(1), inputs()
    mask = torch.arange(13) < torch.tensor([13, 4])[:, None]
    start = torch.stack([x[0].mean(dim=0), x[1, :4].mean(dim=0)])
    torch.testing.assert_close(first.first_relay(x, mask), start, **EXACT)
    out, relay = first(x, mask, None)
    torch.testing.assert_close(out, first(x, mask, start)[0], **EXACT)
    assert first.init_carry(2) is None and relay.shape == (2, 16)
    handed, none = second(out, mask, relay)
    assert none is None
    assert (handed - second(out, mask, None)[0])[mask].abs().max() > 1e-3


@pytest.mark.parametrize(("num_layers", "num_cycles", "there"), [(1, 1, False), (1, 2, True), (2, 1, True)])
def test_relay_has_no_parameter_that_nothing_reads(num_layers, num_cycles, there):
    layers, x = [layer(i, num_layers, num_cycles=num_cycles) for i in range(num_layers)], inputs()
    assert hasattr(layers[0], "relay_q") == there
    carry = None
    for star in layers:
        x, carry = star(x, None, carry)
    x.square().sum().backward()
    assert all(p.grad is not None for star in layers for p in star.parameters())


def test_relay_starts_before_any_token_is_dropped():
    star, x = layer(num_layers=1, dropout=1.0).train(), inputs()  # of the inputs the relay alone knows
    assert (star(x, None, None)[0] - star(2 * x, None, None)[0]).abs().max() > 1e-3


def test_attention_dropout_acts_in_the_relay_too():
    star, x = layer(num_cycles=1, attn_dropout=1.0).train(), inputs()
    _, relay = star(x, None, None)
    alone = star.relay_norm(star.relay_out.bias.relu())
    torch.testing.assert_close(relay, alone.expand(2, 16), **EXACT)


def test_scores_past_the_range_of_float16_stay_finite():
    q, k, v = 1000 * torch.randn(3, 2, 40, 2, 16).half()
    relay = k[:, :1], v[:, :1]
    mask = torch.rand(2, 40) < 0.6
    for out in (ring_attention(q, k, v, (k, v), relay, mask), relay_attention(q[:, 0], k, v, mask)):
        assert out.dtype == torch.float16 and out.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_relay_is_accurate_over_4096_tokens(autocast):
    q, k, v = (s * torch.randn(2, 4096, 2, 16).bfloat16() for s in (3, 3, 1))
    expected = relay_attention(q[:, 0].double(), k.double(), v.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = relay_attention(*(x.float() if autocast else x for x in (q[:, 0], k, v)))
    error = (found - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 1e-2  # 2e-3; of scores in bfloat16 2e-2


def test_a_sum_of_tokens_past_the_range_of_float16_still_has_its_mean():
    x, mask = torch.full((1, 4096, 16), 40.0).half(), torch.ones(1, 4096, dtype=torch.bool)
    assert torch.equal(layer().half().first_relay(x, mask), x[:, 0])


@pytest.mark.parametrize("stats", ["real", "all"])
def test_norm_stats_say_whether_padding_counts(stats):
    star, x = layer(num_layers=1, norm="batch", norm_stats=stats).train(), inputs()
    mask = torch.arange(13) < torch.tensor([13, 4])[:, None]
    found, poisoned = (star(t, mask, None)[0][mask] for t in (x, x.masked_fill(~mask[..., None], 50.0)))
    assert ((found - poisoned).abs().max() > 0.1) == (stats == "all")


def test_row_without_real_tokens_gives_finite_outputs_and_gradients():
    x, mask = inputs().requires_grad_(), torch.tensor([[True] * 13, [False] * 13])
    star = layer(num_layers=1, num_cycles=2)
    out, _ = star(x, mask, None)
    out.square().sum().backward()
    assert all(t.isfinite().all() for t in (out, x.grad, *(p.grad for p in star.parameters())))


def test_gradcheck():
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    leaves = [x.requires_grad_() for x in torch.randn(5, 2, 4, 1, 3, dtype=torch.float64).unbind(0)]
    leaves += [x.requires_grad_() for x in torch.randn(2, 2, 1, 1, 3, dtype=torch.float64).unbind(0)]

    def attend(q, k, v, e_k, e_v, s_k, s_v):
        mixed = ring_attention(q, k, v, (e_k, e_v), (s_k, s_v), mask)
        return mixed, relay_attention(q[:, 0], k, v, mask)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("which", ["dropout", "attn_dropout"])
def test_each_dropout_acts_in_training_only(which):
    star, x = layer(**{which: 0.5}).train(), inputs()
    assert not torch.equal(star(x, None, None)[0], star(x, None, None)[0])
    star.eval()
    assert torch.equal(star(x, None, None)[0], star(x, None, None)[0])


def test_no_cycles_are_refused():
    with pytest.raises(ValueError, match="num_cycles >= 1, got 0"):
        layer(num_cycles=0)


LENGTHS = (270, 0, 1, 2, 65)  # the first is cut into chunks


@pytest.mark.parametrize("own", [{}, {"num_cycles": 3, "norm": "batch"}], ids=["default", "batch"])
def test_packed_rows_train_like_padded_ones(own):
    one, other = layer(**own).train(), layer(**own).train()
    x = torch.randn(5, 270, 16, dtype=torch.float64)
    mask = torch.arange(270) < torch.tensor(LENGTHS)[:, None]
    rows = torch.cat([x[mask], torch.full((3, 16), 50.0)])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    for carry in (None, torch.randn(5, 16, dtype=torch.float64)):
        found, relay = one.forward_packed(rows, cu_seqlens, 270, carry)
        expected, known = other(x, mask, carry)
        torch.testing.assert_close((found[:-3], relay), (expected[mask], known), **EXACT)
        (found[:-3].square().sum() + relay.sin().sum()).backward()
        (expected[mask].square().sum() + known.sin().sum()).backward()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), **EXACT)  # running means among them


def test_norms_that_count_padding_leave_no_packed_path():
    assert layer(norm="batch").traits.packed and layer(norm_stats="all").traits.packed
    assert not layer(norm="batch", norm_stats="all").traits.packed


def test_dropout_of_packed_attention_acts_in_training_only():
    star, rows, cu_seqlens = layer(attn_dropout=0.5), torch.randn(9, 16).double(), torch.tensor([0, 4, 9])
    run = lambda: star.forward_packed(rows, cu_seqlens, 5, None)  # noqa: E731
    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    star.train()
    assert not any(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
