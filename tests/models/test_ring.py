"""Ring attention: it does the products of its schedule and no others, keeps little, drops weights twice."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import Place, build, ring_operator
from models.common import dense_attention
from models.ring import ring_attention
from models.ring_operator import blocks_for, known_mask, plan
from models.schedules import count_products, make_schedule, schedule_stats
from models.softmax import softmax_fused

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=40)
SIZES = [(1, 1), (4, 1), (2, 2), (4, 2), (6, 2), (6, 3), (9, 3), (4, 4), (8, 4), (12, 4), (5, 5)]


def qkv(length=24, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, 4, dtype=dtype).unbind(0)


def tiles(at):
    """The numbers of tiles that a run's slice or tensor stands for."""
    return list(range(at.start, at.stop)) if isinstance(at, slice) else at.tolist()


class Plans(list):
    """The runs of every round that was planned since the last reading."""

    def read(self):
        found, self[:] = list(self), []
        return found

    def products(self):
        """How many products of one row were planned."""
        return sum(len(tiles(run.home)) for run in self.read())


@pytest.fixture
def plans(monkeypatch):
    found, honest = Plans(), plan

    def noting(*arguments):
        runs = honest(*arguments)
        found.extend(runs)
        return runs

    monkeypatch.setattr(ring_operator, "plan", noting)
    return found


@pytest.mark.parametrize("tie_qk", [False, True])
@pytest.mark.parametrize(("num_blocks", "num_units"), SIZES)
def test_the_plan_is_the_schedule(num_blocks, num_units, tie_qk):
    schedule = make_schedule(num_blocks, num_units, "tied" if tie_qk else "full")
    expected = sorted(product for step in schedule.steps for product in step.products)
    each, found = num_blocks // num_units, []
    live = torch.ones(each, num_units, 1, dtype=torch.bool)
    for distance in range(num_units):
        for run in plan(distance, live, tie_qk, live.device):
            for home, guest in zip(tiles(run.home), tiles(run.guest), strict=True):
                assert run.own == (distance == 0 and home == guest)
                u, visited = home % num_units, guest % num_units
                assert u == visited
                visitor = (u - distance) % num_units * each + guest // num_units
                found.append((u, u * each + home // num_units, visitor))
    assert sorted(found) == expected


def test_a_plan_of_many_blocks_takes_no_loop_over_units_and_rows():
    live = torch.ones(32, 8, 50, dtype=torch.bool)
    assert len(plan(1, live, False, live.device)) == 32**2
    live[:, :, 7] = False  # and a batch with gaps needs no more runs
    assert len(plan(1, live, False, live.device)) == 32**2


@pytest.mark.parametrize("tie_qk", [False, True])
@pytest.mark.parametrize(("num_blocks", "num_units"), SIZES)
def test_equals_dense_attention_for_any_ring(num_blocks, num_units, tie_qk):
    q, k, v = qkv(length=23)
    k = q if tie_qk else k
    for mask in (None, torch.arange(23) < torch.tensor([23, 6])[:, None], torch.rand(2, 23) < 0.6):
        options = {"num_units": num_units, "num_blocks": num_blocks, "tie_qk": tie_qk}
        real = torch.ones(2, 23) if mask is None else mask  # padded queries may be skipped
        found, expected = ring_attention(q, k, v, mask, **options), dense_attention(q, k, v, mask)
        torch.testing.assert_close(found * real[:, None, :, None], expected * real[:, None, :, None], **EXACT)


@pytest.mark.parametrize("tie_qk", [False, True])
def test_products_made_are_those_that_the_statistics_count_for_each_row(plans, tie_qk):
    kind, lengths = "tied" if tie_qk else "full", [24, 9, 3, 0]  # one long row; blocks of 3
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 4, 2, 24, 4, dtype=torch.float64).unbind(0))
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    options = {"num_units": 2, "num_blocks": 8, "tie_qk": tie_qk}
    ring_attention(q, k, v, **options)
    assert plans.products() == 4 * count_products(8, kind)[0]
    out = ring_attention(q, k, v, mask, **options)
    made = sum(count_products(blocks, kind)[0] for blocks in (8, 3, 1, 0))
    assert plans.products() == made
    skipped = schedule_stats(lengths, padded_length=24, num_blocks=8, kind=kind).scores
    assert made == round((1 - skipped) * 4 * 64)
    out.sum().backward()
    assert plans.products() == made  # once more in the backward pass


def test_products_of_packed_rows_are_those_of_each_sequence(plans):
    mechanism = build("ring", PLACE, num_units=2, num_blocks=8)
    cu_seqlens = torch.tensor([0, 24, 33, 36], dtype=torch.int32)
    mechanism.forward_packed(torch.randn(36, 16), cu_seqlens, 24)
    assert plans.products() == 64 + 9 + 1


def test_holes_of_a_row_are_skipped_where_they_fill_a_block(plans):
    q, k, v = qkv(length=24)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 6:9] = mask[1, 0] = False  # a whole block of 3 of one row; one token of the other's
    ring_attention(q, k, v, mask, num_units=2, num_blocks=8)
    assert plans.products() == 49 + 64


def test_blocks_past_a_short_sequence_are_not_in_the_plan(plans):
    q, k, v = qkv(length=5)
    torch.testing.assert_close(
        ring_attention(q, k, v, num_units=4, num_blocks=8), dense_attention(q, k, v), **EXACT
    )
    assert plans.products() == 2 * 25


def test_a_batch_without_real_tokens_makes_no_product_and_gives_zeros(plans):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = ring_attention(q, k, v, torch.zeros(2, 24, dtype=torch.bool), num_units=2)
    assert plans.products() == 0 and not out.any()
    out.square().sum().backward()
    assert not any(x.grad.any() for x in (q, k, v))


def test_the_mask_is_read_once_and_not_again_in_the_backward_pass(monkeypatch):
    reads = []
    monkeypatch.setattr(ring_operator, "known_mask", lambda mask: reads.append(mask) or known_mask(mask))
    q, k, v = (x.requires_grad_() for x in qkv())
    ring_attention(q, k, v, torch.arange(24) < torch.tensor([[13], [9]])).sum().backward()
    assert len(reads) == 1


@pytest.mark.parametrize("tie_qk", [False, True])
def test_under_capture_nothing_is_read_and_every_run_is_a_slice(monkeypatch, plans, tie_qk):
    mask = torch.arange(25) < torch.tensor([9, 13])[:, None]
    real, results = mask[:, None, :, None], []
    for captured in (False, True):
        monkeypatch.setattr(ring_operator, "capturing", lambda device, captured=captured: captured)
        torch.manual_seed(1)
        q, k, v = (x.requires_grad_() for x in qkv(length=25))
        out = ring_attention(q, k, v, mask, num_units=4, num_blocks=8, tie_qk=tie_qk) * real
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, v])])
        runs = plans.read()
        assert all(isinstance(run.home, slice) for run in runs) == captured
    assert (
        sum(len(tiles(run.home)) for run in runs)
        == 2 * 2 * count_products(7, "tied" if tie_qk else "full")[0]
    )
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("num_units", [2, 3])
def test_the_mechanism_has_the_units_it_was_given(monkeypatch, num_units):
    shapes = []
    monkeypatch.setattr(
        ring_operator, "plan", lambda *arguments: shapes.append(arguments[1].shape[1]) or plan(*arguments)
    )
    build("ring", PLACE, num_units=num_units)(torch.randn(2, 40, 16))
    assert shapes == [num_units] * num_units


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tie_qk", [False, True])
def test_half_precision_is_about_as_good_as_the_fused_kernel_where_attention_is_peaked(tie_qk, dtype):
    factor = 2.0 if tie_qk else 10.0  # scores of a standard deviation near 10, or of 4 on a diagonal of 16
    q, k, v = (x.to(dtype) for x in torch.randn(3, 1, 2, 512, 16).unbind(0))
    q, grad = (q * factor).to(dtype), torch.randn(1, 2, 512, 16).to(dtype)

    def results(attend, widen):
        leaves = [x.to(widen).requires_grad_() for x in ((q, v) if tie_qk else (q, k, v))]
        out = attend(leaves[0], leaves[0] if tie_qk else leaves[1], leaves[-1])
        return [out, *torch.autograd.grad(out, leaves, grad.to(widen))]

    def ours(q, k, v):
        return ring_attention(q, k, v, num_units=4, num_blocks=32, tie_qk=tie_qk)

    expected = results(dense_attention, torch.float64)
    for found, fused, exact in zip(
        results(ours, dtype), results(softmax_fused, dtype), expected, strict=True
    ):
        error, allowed = ((x.double() - exact).norm() for x in (found, fused))
        assert error < 1.5 * allowed + 1e-6 * exact.norm()


def test_long_sums_of_bfloat16_values_do_not_drift():
    q = torch.zeros(1, 1, 2048, 4, dtype=torch.bfloat16, requires_grad=True)
    v = (torch.randn(1, 1, 2048, 4) + 4).bfloat16().requires_grad_()
    out = ring_attention(q, q, v, num_units=4, num_blocks=256)
    torch.testing.assert_close(
        out[0, 0, :1].double(), v[0, 0].double().mean(dim=0, keepdim=True), rtol=2**-8, atol=0
    )
    out.backward(torch.ones_like(out))  # every value is in each of 2048 means, with weight 1 / 2048
    torch.testing.assert_close(v.grad, torch.ones_like(v), rtol=2**-8, atol=0)


def test_scores_far_below_zero_weigh_like_others():
    q, _, v = qkv()
    k = torch.full_like(q, -300.0)
    out = ring_attention(torch.full_like(q, 300.0), k, v, num_units=2)  # all scores are -180,000
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(v), **EXACT)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = ring_attention(q, k, v, torch.tensor([[True] * 24, [False] * 24]), num_units=2)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_blocks_grow_as_the_root_of_the_length():
    for num_units in (1, 3, 4):
        for length in (1, 64, 1000, 4096, 16384):
            num_blocks = blocks_for(length, num_units)
            assert num_blocks % num_units == 0
            assert math.ceil(length / num_blocks) <= 8 * math.sqrt(length) + 1
            smaller = num_blocks - num_units
            assert not smaller or length / smaller > 8 * math.sqrt(length)


@pytest.mark.parametrize("tie_qk", [False, True])
def test_nothing_is_kept_for_the_backward_pass_but_inputs_outputs_and_one_number_a_query(tie_qk):
    q, k, v = (x.clone().requires_grad_() for x in qkv(length=300))
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ring_attention(q, k, v, num_units=4, tie_qk=tie_qk)
    assert sum(kept.values()) == (3 if tie_qk else 4) * q.numel() + 2 * 2 * 300


def kept_weights(length, monkeypatch=None, seed=None, **options):
    """[b h l l] bool: which weights dropout keeps, read off with a unit vector for each value."""
    if seed is not None:
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([seed]))
    q = torch.zeros(2, 2, length, 4)
    return ring_attention(q, q, torch.eye(length).expand(2, 2, -1, -1), **options) != 0


@pytest.mark.parametrize("tie_qk", [False, True])
def test_dropout_scales_what_it_keeps_and_is_drawn_afresh(tie_qk):
    q, k, _ = qkv(length=60)
    k = q if tie_qk else k
    v = torch.eye(60, dtype=torch.float64).expand(2, 2, -1, -1)  # so that weights are the output
    weights, masks = (q @ k.mT / 2).softmax(dim=-1), []
    for _ in range(2):
        found = ring_attention(q, k, v, num_units=3, num_blocks=6, tie_qk=tie_qk, dropout=0.3)
        masks.append(found != 0)
        torch.testing.assert_close(found, torch.where(masks[-1], weights / 0.7, 0), **EXACT)
    unlike = {
        "another call": masks[1],
        "another row": masks[0].flip(0),
        "another head": masks[0].flip(1),
        "the mirrored weight": masks[0].mT,
        "the next query": masks[0].roll(1, 2),
        **{f"{n} blocks on": masks[0].roll(10 * n, 3) for n in range(1, 6)},
    }
    for other in unlike.values():
        both = (masks[0] & other).double().mean().item()
        assert both == pytest.approx(0.49, abs=0.03)  # as of independent ones; equal ones would give 0.7


def test_dropout_drops_by_its_rate():
    dropped = 1 - kept_weights(512, dropout=0.3).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / (4 * 512**2)))  # four standard errors


@pytest.mark.parametrize("tie_qk", [False, True])
@pytest.mark.parametrize(("num_blocks", "num_units"), [(2, 2), (6, 3), (12, 4), (0, 4)])
def test_what_is_dropped_does_not_depend_on_the_ring(monkeypatch, num_blocks, num_units, tie_qk):
    alone = kept_weights(47, monkeypatch, 5, dropout=0.3, num_units=1, num_blocks=1)
    ring = {"num_units": num_units, "num_blocks": num_blocks, "tie_qk": tie_qk}
    assert torch.equal(kept_weights(47, monkeypatch, 5, dropout=0.3, **ring), alone)


def test_no_two_queries_drop_alike_nor_one_query_under_the_next_seed(monkeypatch):
    lines = [kept_weights(60, monkeypatch, seed, dropout=0.5).flatten(0, 2) for seed in (5, 6)]
    windows = torch.cat([part.unfold(1, 50, 1).flatten(0, 1) for part in lines])
    assert len(windows.unique(dim=0)) == 2 * 4 * 60 * 11  # none is that of another, shifted
    whole = [part.flatten() for part in lines]
    assert not any(torch.equal(whole[1][:1000], whole[0][n : 1000 + n]) for n in range(200))


def test_dropout_of_all_weights_gives_zeros_and_of_more_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = ring_attention(q, k, v, dropout=1.0)
    assert not out.any()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), [q, k, v]))
    for rate in (1.5, -0.1):
        with pytest.raises(ValueError, match=f"0 <= dropout <= 1, got {rate}"):
            ring_attention(q, k, v, dropout=rate)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("tie_qk", [False, True])
def test_gradcheck(tie_qk, dropout):
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    options = {"num_units": 2, "num_blocks": 4, "tie_qk": tie_qk, "dropout": dropout}

    def attend(*leaves):
        torch.manual_seed(3)
        q, *k, v = leaves
        return ring_attention(q, k[0] if k else q, v, mask, **options) * mask[:, None, :, None]

    q, k, v = (x.requires_grad_() for x in qkv(length=7))
    assert torch.autograd.gradcheck(attend, (q, v) if tie_qk else (q, k, v))


@pytest.mark.parametrize("tie_qk", [False, True])
def test_the_operator_is_what_it_declares(tie_qk):
    q, k, v = (x.requires_grad_() for x in qkv(length=9, dtype=torch.float32))
    mask = torch.arange(9) < torch.tensor([9, 3])[:, None]
    arguments = (q, None if tie_qk else k, v, mask, None, 2, 4, 0.0)
    torch.library.opcheck(ring_operator.ring_forward, arguments)


def test_a_tied_projection_gives_queries_that_are_keys():
    mechanism = build("ring", PLACE, tie_qk=True)
    q, k, v = mechanism.qkv(torch.randn(2, 9, 16)).chunk(3, dim=-1)
    assert torch.equal(q, k) and not torch.equal(k, v)
    assert mechanism.qkv.weight.shape == (32, 16)


def test_a_number_of_blocks_that_does_not_grow_claims_quadratic_memory():
    assert not build("ring", PLACE).traits.quadratic_memory
    assert "quadratic_memory" in build("ring", PLACE, num_blocks=8).traits.exceptions()


def test_state_is_a_key_and_a_value_for_each_token():
    assert build("ring", PLACE).state_size(40) == 2 * 40 * 16


@pytest.mark.parametrize("own", [{"num_units": 0}, {"num_units": 4, "num_blocks": 6}, {"num_blocks": -4}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="a ring needs num_units >= 1 and num_blocks a multiple of it"):
        build("ring", PLACE, **own)
    with pytest.raises(ValueError, match="a ring needs num_units >= 1 and num_blocks a multiple of it"):
        ring_attention(*qkv(), **own)


@pytest.mark.gpu
@pytest.mark.parametrize("tie_qk", [False, True])
def test_a_captured_step_reads_no_mask_and_gives_what_eager_does(tie_qk):
    q, k, v = (x.cuda().float() for x in qkv())
    options = {"num_units": 2, "num_blocks": 8, "tie_qk": tie_qk}
    mask = (torch.arange(24) < torch.tensor([13, 9])[:, None]).cuda()
    expected = ring_attention(q, k, v, mask, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ring_attention(q, k, v, mask, **options)
    graph.replay()
    real = mask[:, None, :, None]
    torch.testing.assert_close(found * real, expected * real)


def test_a_captured_step_equals_an_eager_one_at_padding_too(monkeypatch):
    """Blocks of padding are skipped in one and not in the other: outputs and gradients may not tell."""
    mask = torch.arange(40) < torch.tensor([40, 9, 0])[:, None]
    results = []
    for captured in (False, True):
        monkeypatch.setattr("models.ring_operator.capturing", lambda device, captured=captured: captured)
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(3, 2, 40, 4, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(3)
        ]
        out = ring_attention(*leaves, mask, num_units=2, num_blocks=8)
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for eager, captured in zip(*results, strict=True):
        torch.testing.assert_close(eager, captured, rtol=0, atol=1e-12)
    assert not results[0][0].mT[~mask[:, None, None].expand_as(results[0][0].mT)].any()


@pytest.mark.parametrize("tie_qk", [False, True])
def test_operations_are_counted_as_those_of_attention_with_scores_made_twice(tie_qk):
    leaves = [x.requires_grad_() for x in qkv()]
    with FlopCounterMode(display=False) as counter:
        ring_attention(*leaves, num_units=2, num_blocks=8, tie_qk=tie_qk).sum().backward()
    product = 2 * 2 * 2 * 24 * 24 * 4
    assert counter.get_total_flops() == (4 * product // 2 if tie_qk else 4 * product) + 3 * product
