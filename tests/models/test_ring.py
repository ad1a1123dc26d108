"""Ring attention: it does the products of its schedule and no others, keeps little, drops weights twice."""

import math

import pytest
import torch

from models import Place, build, ring
from models.common import dense_attention
from models.ring import blocks_for, plan, ring_attention
from models.schedules import count_products, make_schedule, schedule_stats

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=40)
SIZES = [(1, 1), (4, 1), (2, 2), (4, 2), (6, 2), (6, 3), (9, 3), (4, 4), (8, 4), (12, 4), (5, 5)]


def qkv(length=24, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, 4, dtype=dtype).unbind(0)


@pytest.fixture
def products(monkeypatch):
    """The number of block products of every plan that is asked for."""
    counts, honest = [], plan

    def counting(*arguments):
        rounds = honest(*arguments)
        counts.append(sum(run.last - run.first for runs in rounds for run in runs))
        return rounds

    monkeypatch.setattr(ring, "plan", counting)
    return counts


@pytest.mark.parametrize("tie_qk", [False, True])
@pytest.mark.parametrize(("num_blocks", "num_units"), SIZES)
def test_the_plan_is_the_schedule(num_blocks, num_units, tie_qk):
    schedule = make_schedule(num_blocks, num_units, "tied" if tie_qk else "full")
    expected = sorted(product for step in schedule.steps for product in step.products)
    each, found = num_blocks // num_units, []
    for distance, runs in enumerate(plan(num_units, num_blocks, tie_qk, (True,) * num_blocks)):
        for run in runs:
            for u in range(run.first, run.last):
                visitor = (u - distance) % num_units * each + run.b
                found.append((u, u * each + run.a, visitor))
    assert sorted(found) == expected


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
def test_products_made_are_those_that_the_statistics_count(products, tie_qk):
    q, k, v = qkv(length=24)
    mask = torch.arange(24) < torch.tensor([13, 9])[:, None]
    kind = "tied" if tie_qk else "full"
    options = {"num_units": 2, "num_blocks": 8, "tie_qk": tie_qk}
    ring_attention(q, k, v, **options)
    ring_attention(q, k, v, mask, **options)
    assert products == [count_products(8, kind)[0], count_products(5, kind)[0]]  # of blocks of 3, 5 hold 13
    skipped = schedule_stats([13, 13], padded_length=24, num_blocks=8, kind=kind).scores
    assert products[1] == round((1 - skipped) * 64)


def test_blocks_past_a_short_sequence_are_not_in_the_plan(products):
    q, k, v = qkv(length=5)
    torch.testing.assert_close(
        ring_attention(q, k, v, num_units=4, num_blocks=8), dense_attention(q, k, v), **EXACT
    )
    assert products == [25]


def test_a_batch_without_real_tokens_makes_no_product_and_gives_zeros(products):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = ring_attention(q, k, v, torch.zeros(2, 24, dtype=torch.bool), num_units=2)
    assert products == [0] and not out.any()
    out.square().sum().backward()
    assert not any(x.grad.any() for x in (q, k, v))


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


@pytest.mark.parametrize("tie_qk", [False, True])
def test_dropout_drops_weights_by_its_rate_and_afresh(tie_qk):
    q, k, _ = qkv(length=60)
    k = q if tie_qk else k
    v = torch.eye(60, dtype=torch.float64).expand(2, 2, -1, -1)  # so that weights are the output
    options = {"num_units": 3, "num_blocks": 6, "tie_qk": tie_qk, "dropout": 0.3}
    weights = (q @ k.mT / 2).softmax(dim=-1)
    masks = []
    for _ in range(2):
        found = ring_attention(q, k, v, **options)
        masks.append(found != 0)
        torch.testing.assert_close(found, torch.where(masks[-1], weights / 0.7, 0), **EXACT)
    rate = 1 - masks[0].double().mean().item()
    assert rate == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / masks[0].numel()))  # four standard errors
    unlike = {
        "another call": masks[1],
        "another row": masks[0].flip(0),
        "another head": masks[0].flip(1),
        "the mirrored weight": masks[0].mT,
        "the next query": masks[0].roll(1, 2),
        "the next block": masks[0].roll(10, 3),
    }
    for other in unlike.values():
        both = (masks[0] & other).double().mean().item()
        assert both == pytest.approx(0.49, abs=0.03)  # as of independent ones; equal ones would give 0.7


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
    torch.library.opcheck(ring.ring_forward, arguments)


def test_a_tied_projection_gives_queries_that_are_keys():
    mechanism = build("ring", PLACE, tie_qk=True)
    q, k, v = mechanism.qkv(torch.randn(2, 9, 16)).chunk(3, dim=-1)
    assert torch.equal(q, k) and not torch.equal(k, v)
    assert mechanism.qkv.weight.shape == (32, 16)


def test_a_number_of_blocks_that_does_not_grow_claims_quadratic_memory():
    assert not build("ring", PLACE).traits.quadratic_memory
    assert "quadratic_memory" in build("ring", PLACE, num_blocks=8).traits.exceptions()


@pytest.mark.parametrize("own", [{"num_units": 0}, {"num_units": 4, "num_blocks": 6}, {"num_blocks": -4}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="a ring needs num_units >= 1 and num_blocks a multiple of it"):
        build("ring", PLACE, **own)
    with pytest.raises(ValueError, match="a ring needs num_units >= 1 and num_blocks a multiple of it"):
        ring_attention(*qkv(), **own)


@pytest.mark.gpu
def test_a_captured_step_reads_no_mask_and_gives_what_eager_does():
    q, k, v = (x.cuda().float() for x in qkv())
    mask = (torch.arange(24) < torch.tensor([13, 9])[:, None]).cuda()
    expected = ring_attention(q, k, v, mask, num_units=2, num_blocks=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ring_attention(q, k, v, mask, num_units=2, num_blocks=8)
    graph.replay()
    real = mask[:, None, :, None]
    torch.testing.assert_close(found * real, expected * real)
