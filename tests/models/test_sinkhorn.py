"""Sinkhorn Transformer: a doubly stochastic matrix of blocks, noise, padding, and the benchmark's quirks."""

import pytest
import torch

from models import Place, build, sinkhorn
from models.common import dense_attention
from models.sinkhorn import attend_in_blocks, balanced, gumbel, in_blocks, sinkhorn_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=60)


def qkv(length=24):
    return torch.randn(3, 2, 2, length, 8, dtype=torch.float64).unbind(0)


def net(num_blocks=6):
    return {"weight": torch.randn(2, 8, num_blocks).double(), "bias": torch.randn(2, num_blocks).double()}


def test_rows_and_columns_of_used_blocks_sum_to_one():
    logits, used = 2 * torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool)
    used[1, [2, 5]] = False
    errors = []
    for n in (2, 8, 100):
        r = balanced(logits, used, n)
        rows, columns = r.sum(dim=-1), r.sum(dim=-2)
        torch.testing.assert_close(columns, used[:, None].double().expand_as(columns), **EXACT)  # done last
        errors.append((rows - used[:, None].double()).abs().max().item())
        assert not r[1][:, ~used[1]].any() and not r[1][..., ~used[1]].any()
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_logits_far_apart_give_a_permutation_and_stay_finite():
    logits = 300 * torch.eye(5)[torch.randperm(5)].expand(1, 1, 5, 5)
    r = balanced(logits, torch.ones(1, 5, dtype=torch.bool), 5)
    torch.testing.assert_close(r, (logits > 0).float(), rtol=0, atol=1e-6)


def test_a_permutation_puts_that_block_beside_each():
    q, k, v = (in_blocks(x, 6, False) for x in qkv())
    to = [2, 0, 3, 1]
    order = torch.eye(4, dtype=torch.float64)[to].expand(2, 2, 4, 4)
    found = attend_in_blocks(q / 8**0.5, k, v, torch.ones(2, 4, 6).double(), order)
    for block, other in enumerate(to):
        both = [torch.cat([x[:, :, block], x[:, :, other]], dim=2) for x in (k, v)]
        torch.testing.assert_close(found[:, :, block], dense_attention(q[:, :, block], *both), **EXACT)


def test_a_sorted_padded_place_is_left_out_and_a_half_padded_one_counts_half():
    q, k, v = (in_blocks(x, 2, False)[:1, :1] for x in qkv(4))
    real = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]).double()
    k, v = k * real[:, None, ..., None], v * real[:, None, ..., None]
    for share in (0.0, 0.5):  # of the first block in what is sorted beside each
        order = torch.tensor([[share, 1 - share]] * 2).double().expand(1, 1, 2, 2)
        found = attend_in_blocks(q, k, v, real, order)[0, 0, 0]
        firsts = share * k[0, 0, 0, 0] + (1 - share) * k[0, 0, 1, 0]
        keys = torch.stack([k[0, 0, 0, 0], k[0, 0, 0, 1], firsts, k[0, 0, 0, 1]])
        values = torch.stack(
            [v[0, 0, 0, 0], v[0, 0, 0, 1], share * v[0, 0, 0, 0] + (1 - share) * v[0, 0, 1, 0]]
        )
        weights = (q[0, 0, 0] @ keys.T).exp() * torch.tensor([1.0, 1.0, 1.0, share]).double()
        expected = weights @ torch.cat([values, v[0, 0, 0, 1:]]) / weights.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(found, expected, **EXACT)


def test_sum_is_what_the_einsum_of_the_benchmark_gives():
    """Its einsum sums over the blocks and, apart from them, over the permutation, whose rows sum to one."""
    q, k, v = qkv()
    keys, values = (x.transpose(1, 2).reshape(2, 4, 6, 2, 8) for x in (k, v))  # [b c n h d]: strided
    queries = q.transpose(1, 2).reshape(2, 4, 6, 2, 8)
    permutation = torch.randn(2, 6, 2, 6, dtype=torch.float64).softmax(dim=-1)
    mixed = 0
    for key, value in (
        (keys, values),
        [torch.einsum("bskhd,bnhl->bsnhd", x, permutation) for x in (keys, values)],
    ):
        weights = torch.einsum("bsnhd,btnhd->bnhst", queries / 8**0.5, key).softmax(dim=-1)
        mixed = mixed + torch.einsum("bnhst,btnhd->bsnhd", weights, value)
    expected = mixed.reshape(2, 24, 2, 8).transpose(1, 2)
    found = sinkhorn_attention(q, k, v, block_size=4, sort="sum", strided=True, separate=True)
    torch.testing.assert_close(found, expected, **EXACT)


def test_strided_blocks_hold_every_nth_token():
    x = torch.arange(10.0).view(1, 1, 10, 1)
    assert in_blocks(x, 4, True)[0, 0, :, :, 0].tolist() == [[0, 3, 6, 9], [1, 4, 7, 0], [2, 5, 8, 0]]
    assert in_blocks(x, 4, False)[0, 0, :, :, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]


def test_softmax_sort_makes_rows_alone_sum_to_one():
    q, k, v = qkv()
    weights = net()
    found = sinkhorn_attention(q, k, v, block_size=4, sort="softmax", **weights)
    blocks = [in_blocks(x, 4, False) for x in (q / 8**0.5, k, v)]
    order = (blocks[1].sum(dim=3) @ weights["weight"] + weights["bias"][:, None]).softmax(dim=-1)
    expected = attend_in_blocks(*blocks, torch.ones(2, 6, 4).double(), order).flatten(2, 3)
    torch.testing.assert_close(found, expected, **EXACT)


def test_noise_is_gumbels():
    draws = gumbel(torch.zeros(100_000))
    assert draws.mean().item() == pytest.approx(0.5772, abs=0.02)  # five standard errors
    assert draws.var().item() == pytest.approx(1.6449, abs=0.07)
    assert draws.isfinite().all()


def test_r_of_training_is_of_logits_plus_noise_over_the_temperature(monkeypatch):
    q, k, v = qkv()
    weights, noise = net(4), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    monkeypatch.setattr(sinkhorn, "gumbel", lambda like: noise[: like.shape[0], : like.shape[1]])
    options = {"block_size": 6, "temperature": 0.4, "num_iterations": 3, "noise": True}
    found = sinkhorn_attention(q, k, v, **options, **weights)
    blocks = [in_blocks(x, 6, False) for x in (q / 8**0.5, k, v)]
    logits = blocks[1].sum(dim=3) @ weights["weight"] + weights["bias"][:, None]
    order = ((logits + noise) / 0.4).exp()
    for _ in range(3):
        order = order / order.sum(dim=-1, keepdim=True)
        order = order / order.sum(dim=-2, keepdim=True)
    expected = attend_in_blocks(*blocks, torch.ones(2, 4, 6).double(), order).flatten(2, 3)
    torch.testing.assert_close(found, expected, **EXACT)


def test_iterations_keep_nothing_for_the_backward_pass():
    q, k, v = (x.requires_grad_() for x in qkv())
    saved = []
    for num_iterations in (2, 20):
        kept = {}
        keep = lambda x, kept=kept: kept.setdefault(id(x), x)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            sinkhorn_attention(q, k, v, block_size=2, num_iterations=num_iterations, **net(12))
        saved.append(sum(x.numel() for x in kept.values()))
    assert saved[0] == saved[1] > 0


def test_the_sorting_network_starts_as_a_linear_map_of_torch():
    module = build("sinkhorn", Place(d_model=128, num_heads=2, max_len=640))
    for parameter in (module.sort_weight, module.sort_bias):
        assert 0.8 * 64**-0.5 < parameter.abs().max() <= 64**-0.5


def test_state_is_a_block_and_a_sorted_one_of_keys_and_of_values():
    assert build("sinkhorn", PLACE, block_size=8).state_size(60) == (2 + 2) * 8 * 16


@pytest.mark.parametrize("sort", ["sinkhorn", "softmax"])
def test_more_blocks_than_the_sorting_network_has_are_refused(sort):
    module = build("sinkhorn", PLACE, block_size=10, sort=sort)
    module(torch.randn(1, 60, 16))
    with pytest.raises(ValueError, match="at most 6 blocks of 10 tokens and got 7; raise max_len or max_num"):
        module(torch.randn(1, 61, 16))
    module = build("sinkhorn", PLACE, block_size=60, sort=sort)  # one block, whose output would be spread
    with pytest.raises(ValueError, match="at most 1 blocks"):
        module(torch.randn(1, 61, 16))
    build("sinkhorn", PLACE, block_size=10, sort="sum")(torch.randn(1, 70, 16))


def test_noise_is_drawn_in_training_alone_and_moves_outputs():
    module, x = build("sinkhorn", PLACE, block_size=8), torch.randn(2, 60, 16)
    assert torch.equal(module.eval()(x), module(x))
    assert not torch.equal(module.train()(x), module(x))


def test_the_sorting_network_learns_except_where_it_is_inert():
    x = torch.randn(2, 60, 16)
    for sort in ("sinkhorn", "softmax"):
        module = build("sinkhorn", PLACE, block_size=8, sort=sort)
        module(x).square().sum().backward()
        assert module.sort_weight.grad.any() and module.sort_bias.grad.any()
    assert build("sinkhorn", PLACE, sort="sum").sort_weight is None


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    for sort in ("sinkhorn", "softmax", "sum"):
        q, k, v = (x.float().requires_grad_() for x in qkv())
        mask, weights = torch.tensor([[True] * 24, [False] * 24]), {n: x.float() for n, x in net().items()}
        out = sinkhorn_attention(q, k, v, mask, block_size=4, sort=sort, **weights)
        assert not out[1].any()
        out.square().sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("sort", ["sinkhorn", "softmax", "sum"])
def test_gradcheck(sort):
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    mask[0, 2] = False
    leaves = [x[..., :3].clone().requires_grad_() for x in qkv(7)]
    leaves += [torch.randn(*shape).double().requires_grad_() for shape in ((2, 3, 4), (2, 4))]

    def attend(q, k, v, weight, bias):
        out = sinkhorn_attention(q, k, v, mask, block_size=2, sort=sort, weight=weight, bias=bias)
        return out + 0 * (weight.sum() + bias.sum())

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_autocast_leaves_the_permutation_in_float32():
    q, k, v = (x.float() for x in qkv())
    weights = {n: x.float() for n, x in net().items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_attention(q, k, v, block_size=4, **weights)
    expected = sinkhorn_attention(q, k, v, block_size=4, **weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "trait"),
    [
        ({"max_num_blocks": 25}, {"fixed_length": False}),
        ({"sort": "sum"}, {"fixed_length": False}),
        ({"strided": True}, {"fixed_length": True, "length_invariant": False}),
    ],
)
def test_options_change_the_claims(own, trait):
    traits = build("sinkhorn", PLACE, **own).traits
    assert {name: getattr(traits, name) for name in trait} == trait


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "finite temperature > 0.*temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        (
            {"sort": "softmax", "temperature": 3.0},
            "need sort='sinkhorn'; got sort='softmax', temperature=3.0",
        ),
        ({"sort": "sum", "num_iterations": 9}, "got sort='sum', temperature=0.75, num_iterations=9"),
        ({"sort": "sum", "max_num_blocks": 25}, "max_num_blocks=25 of sinkhorn needs a sorting net"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"sort": "sinkhrn"}, "choose from: sinkhorn, softmax, sum"),
        ({"block_size": 10, "max_num_blocks": 5}, "max_num_blocks >= 6.*max_len=60; got 5"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, told):
    with pytest.raises(ValueError, match=told):
        build("sinkhorn", PLACE, **own)
