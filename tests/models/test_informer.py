"""Informer: who is chosen, what the others get, what padding and precision may not change; its options."""

import math

import pytest
import torch
from proofs import PROOFS

from models import Place, build, informer
from models.common import dense_attention
from models.informer import attend_where_sparse, budget, budgets, informer_attention, sparsity

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=50)


def qkv(length=13, d=8, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, d, dtype=dtype).unbind(0)


def numbers(length=13, factor=1):
    return torch.randint(2**32, (length, budget(length, factor)))


@pytest.mark.parametrize("factor", [1, 5])
def test_budget_is_the_factor_times_the_logarithm_rounded_up_for_rows_as_for_lengths(factor):
    assert [budget(n, factor) for n in (2, 20, 21, 1000)] == [
        min(n, factor * ceiling) for n, ceiling in ((2, 1), (20, 3), (21, 4), (1000, 7))
    ]
    counts = torch.tensor([*range(1, 500), 1096, 1097, 2980, 2981])  # around powers of e
    mask = torch.arange(3000) < counts[:, None]
    assert budgets(mask, factor).tolist() == [budget(n, factor) for n in counts.tolist()]


def test_measure_is_the_maximum_less_the_mean_of_the_sampled_scores():
    q, k, _ = qkv(length=20)
    sampled = torch.randint(20, (2, 20, 11))  # more than are gathered at once, and no multiple
    found = sparsity(q, k, sampled, torch.tensor([11, 3]))
    for b, h, i in ((0, 0, 0), (0, 1, 19), (1, 0, 7)):
        scores = k[b, h, sampled[b, i, : (11, 3)[b]]] @ q[b, h, i]
        assert found[b, h, i].item() == pytest.approx((scores.max() - scores.mean()).item(), abs=1e-12)


def test_the_chosen_attend_fully_and_the_others_get_the_mean_of_values():
    q, k, v = qkv()
    measure = torch.arange(13.0).expand(2, 2, 13)
    found = attend_where_sparse(q, k, v, None, measure, 3)
    torch.testing.assert_close(found[:, :, 10:], dense_attention(q, k, v)[:, :, 10:], **EXACT)
    expected = v.mean(dim=2, keepdim=True).expand(2, 2, 10, 8)
    torch.testing.assert_close(found[:, :, :10], expected, **EXACT)


def test_of_equal_measures_the_earlier_is_chosen():
    q, k, v = qkv()
    found = attend_where_sparse(q, k, v, None, torch.zeros(2, 2, 13), 2)
    torch.testing.assert_close(found[:, :, :2], dense_attention(q, k, v)[:, :, :2], **EXACT)
    torch.testing.assert_close(found[:, :, 2], v.mean(dim=2), **EXACT)


def test_a_query_of_one_sharp_key_is_chosen_and_flat_ones_are_not():
    _, k, v = qkv(length=40)
    q = torch.zeros_like(k)
    q[:, :, 17] = 10 * k[:, :, 3]
    found = informer_attention(q, k, v, numbers=numbers(40, 8), factor=8)  # 32 samples of 40 keys
    torch.testing.assert_close(found[:, :, 17], dense_attention(q, k, v)[:, :, 17], **EXACT)


def test_mean_over_length_divides_the_sum_of_the_samples_by_the_length_as_released():
    q, k, _ = qkv()
    sampled = torch.randint(13, (1, 13, 4))
    scores = torch.stack([(q * k[:, :, sampled[0, :, s]]).sum(dim=-1) for s in range(4)])
    expected = scores.amax(dim=0) - scores.sum(dim=0) / 13
    torch.testing.assert_close(sparsity(q, k, sampled, divisor=13), expected, **EXACT)
    assert (sparsity(q, k, sampled) - expected).abs().max() > 0.1


def test_target_sets_the_factor_from_the_longest_length_as_the_port_does():
    for max_len, expected in ((1024, 19), (2000, 17), (4096, 16)):  # 128 over 6.93, 7.60, 8.32, rounded up
        place = Place(d_model=16, num_heads=2, max_len=max_len)
        assert build("informer", place, target=128).factor == expected
    assert build("informer", PLACE).factor == 5


def test_without_mask_padding_is_treated_as_tokens_and_the_traits_say_so():
    mechanism = build("informer", PLACE, factor=1, use_mask=False).double().eval()
    x, mask = torch.randn(2, 30, 16, dtype=torch.float64), torch.arange(30) < torch.tensor([[30], [9]])
    q, k, v = mechanism.project(x, 3)
    assert torch.equal(mechanism(x, mask), mechanism(x))
    expected = informer_attention(q, k, v, numbers=mechanism.numbers(30), factor=1)
    torch.testing.assert_close(
        mechanism(x, mask), mechanism.out(expected.transpose(1, 2).flatten(2)), **EXACT
    )
    assert {"content_invariant", "length_invariant"} <= mechanism.traits.exceptions().keys()
    assert build("informer", PLACE).traits.exceptions() == {}


def test_samples_are_fresh_in_every_training_step_and_fixed_in_evaluation():
    mechanism = build("informer", PLACE, factor=2)
    fixed, seen = mechanism.eval().numbers(30), []
    for step in range(3):
        mechanism.training_update(step)
        assert torch.equal(mechanism.eval().numbers(30), fixed)
        seen.append(mechanism.train().numbers(30))
    assert all(not torch.equal(a, b) for i, a in enumerate([fixed, *seen]) for b in seen[i:])
    assert not torch.equal(fixed, build("informer", PLACE, factor=2, sample_seed=1).eval().numbers(30))


def test_training_outputs_equal_the_reference_of_their_draw():
    mechanism = build("informer", PLACE, factor=1).double().train()
    x, mask = torch.randn(2, 40, 16, dtype=torch.float64), torch.arange(40) < torch.tensor([[40], [25]])
    outputs = []
    for step in (0, 7):
        mechanism.training_update(step)
        outputs.append(mechanism(x, mask)[mask])
        expected = PROOFS["informer"].reference(mechanism, x, mask)[mask]
        torch.testing.assert_close(outputs[-1], expected, **EXACT)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_samples_of_a_position_do_not_depend_on_the_length():
    mechanism = build("informer", PLACE, factor=2)
    short = mechanism.numbers(20)
    assert torch.equal(mechanism.numbers(50)[:20, : short.shape[1]], short)
    assert len(mechanism.numbers(50).unique()) == 50 * budget(50, 2)


@pytest.mark.parametrize("rotary_base", [None, 10_000.0])
def test_half_precision_chooses_the_queries_that_single_precision_chooses(monkeypatch, rotary_base):
    place = Place(d_model=16, num_heads=2, max_len=520, rotary_base=rotary_base)
    seen = []

    def recorded(q, k, v, mask, measure, most, *others, **options):
        seen.append(measure.topk(most).indices.sort().values)
        return attend_where_sparse(q, k, v, mask, measure, most, *others, **options)

    monkeypatch.setattr(informer, "attend_where_sparse", recorded)
    for seed in range(8):
        torch.manual_seed(seed)
        half = build("informer", place).bfloat16().eval()
        wide = build("informer", place).eval()
        wide.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
        x = torch.randn(1, 520, 16).bfloat16()
        wide(x.float())
        half(x)
        with torch.autocast("cpu", torch.bfloat16):
            wide(x.float())
        informer_attention(*half.project(x, 3), numbers=half.numbers(520))  # chooses by rounded numbers
    assert all(torch.equal(a, b) for a, b in zip(seen[::4], seen[1::4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[::4], seen[2::4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[::4], seen[3::4], strict=True))


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = informer_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]), numbers=numbers(), factor=1)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradcheck():
    mask = torch.arange(7) < torch.tensor([7, 5])[:, None]
    leaves, drawn = [x.requires_grad_() for x in qkv(length=7, d=4)], numbers(7)
    attend = lambda q, k, v: informer_attention(q, k, v, mask, numbers=drawn, factor=1)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("max_len", [12, 13, 50])
@pytest.mark.parametrize("factor", [1, 4, 13])
def test_order_is_of_no_account_if_every_query_is_chosen_at_every_length(max_len, factor):
    mixer = build("informer", Place(d_model=16, num_heads=2, max_len=max_len), factor=factor).double().eval()
    moved = 0.0
    for length in range(2, max_len + 1):
        x, turned = 3 * torch.randn(1, length, 16, dtype=torch.float64), torch.randperm(length)
        moved = max(moved, (mixer(x[:, turned]) - mixer(x)[:, turned]).abs().max().item())
    assert mixer.traits.uses_order == (moved > 1e-9)
    assert mixer.traits.uses_order == {1: True, 4: max_len > 12, 13: False}[factor]


@pytest.mark.parametrize(
    "own", [{"factor": 0}, {"factor": 1.5}, {"target": 0}, {"target": 12.5}, {"sample_seed": 0.5}]
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="informer needs"):
        build("informer", PLACE, **own)


def test_a_factor_beside_a_target_that_sets_it_is_refused():
    with pytest.raises(ValueError, match="got factor=3 and target=128"):
        build("informer", PLACE, factor=3, target=128)


def test_mean_over_length_counts_real_tokens():
    q, k, v = qkv(length=20)
    mask, drawn = torch.arange(20) < torch.tensor([[20], [14]]), numbers(20)
    found = informer_attention(q, k, v, mask, numbers=drawn, factor=1, mean_over_length=True)[1:, :, :14]
    cut = [x[1:, :, :14] for x in (q, k, v)]
    alone = informer_attention(*cut, numbers=drawn[:14, : budget(14, 1)], factor=1, mean_over_length=True)
    torch.testing.assert_close(found, alone, **EXACT)
    assert math.ceil(math.log(14)) == budget(14, 1) == 3
