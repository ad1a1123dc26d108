"""Routing Transformer: which tokens go where, how centroids move, and the loss that holds tokens near."""

import copy

import pytest
import torch
from torch.nn import functional

from models import Place, build
from models.local import local_attention
from models.routing import nearest, normalised, routing_attention
from models.selection import largest

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=64)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_tokens_in_several_clusters_are_averaged_and_tokens_in_none_are_zero():
    q, k, v = (drawn(1, 1, 6, 4) for _ in range(3))
    x, y = functional.layer_norm(q, (4,)), functional.layer_norm(k, (4,))
    centroids = torch.stack([x[0, 0, 2], x[0, 0, 2], -x[0, 0, 2]])[None]  # the first two choose alike
    found = routing_attention(q, k, v, centroids=centroids, window=2)
    expected, times = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    for centroid in centroids[0]:
        queries, keys = (((t[0, 0] @ centroid).topk(2).indices) for t in (x, y))
        weights = (x[0, 0, queries] @ y[0, 0, keys].T / 2).softmax(dim=-1)
        expected[queries] += weights @ v[0, 0, keys]
        times[queries] += 1
    assert sorted(times.flatten().tolist()) == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(found[0, 0], expected / times.clamp_min(1), **EXACT)


def test_rows_shorter_than_the_window_are_dense_attention_in_every_cluster():
    q, k, v = (drawn(2, 1, 12, 4) for _ in range(3))
    mask = torch.arange(12) < torch.tensor([12, 5])[:, None]
    found = routing_attention(q, k, v, mask, centroids=drawn(1, 3, 4), window=6)[1, 0, :5]
    x, y = (functional.layer_norm(t[1, 0, :5], (4,)) for t in (q, k))
    torch.testing.assert_close(found, (x @ y.T / 2).softmax(dim=-1) @ v[1, 0, :5], **EXACT)


def test_of_equal_scores_the_earlier_position_is_larger():
    scores = torch.tensor([[1.0, 3.0, -2.0, 3.0, 3.0, -0.5, -2.0, 1.0]])
    real = torch.tensor([[True, False, True, True, True, True, True, True]])
    where, found = largest(scores, real, 6)
    assert where.tolist() == [[3, 4, 0, 7, 5, 2]]
    assert found.all()
    where, found = largest(scores, real & (torch.arange(8) < 3), 4)
    assert found.tolist() == [[True, True, False, False]]
    assert where[0, :2].tolist() == [0, 2]


def test_the_largest_are_those_that_topk_finds():
    scores = torch.cat([torch.randn(7, 500), torch.randn(7, 500) * 1e-30, torch.randn(7, 500) * 1e30], dim=1)
    where, found = largest(scores, torch.ones(1, 1500, dtype=torch.bool), 40)
    assert found.all()
    torch.testing.assert_close(scores.gather(1, where), scores.topk(40).values, rtol=0, atol=0)


def test_default_sizes_are_the_root_of_max_len_and_half_of_the_heads_are_local():
    layer = build("routing", Place(d_model=16, num_heads=4, max_len=1024))
    assert (layer.num_clusters, layer.window, layer.num_local_heads) == (32, 32, 2)
    assert layer.centroids.shape == (2, 32, 4)
    assert build("routing", Place(d_model=16, num_heads=1, max_len=1024)).num_local_heads == 0
    layer = build("routing", PLACE, num_clusters=5)
    assert layer.window == 13 and not layer.traits.fixed_length


def test_the_first_heads_are_local():
    layer = build("routing", PLACE, local_window=5).double().eval()
    q, k, v = (drawn(2, 2, 30, 8) for _ in range(3))
    mask = torch.arange(30) < torch.tensor([30, 11])[:, None]
    found = layer.attend(q, k, v, mask)
    local = local_attention(q[:, :1], k[:, :1], v[:, :1], mask, window=5, pattern="neighbours")
    torch.testing.assert_close(found[:, :1], local, **EXACT)


def test_centroids_move_toward_the_mean_of_their_real_tokens_once_a_step():
    layer = build("routing", PLACE, num_clusters=3, num_local_heads=0, decay=0.75).double().train()
    x, mask = drawn(2, 20, 16), torch.arange(20) < torch.tensor([20, 7])[:, None]
    before = layer.centroids.clone()
    layer(x, mask)
    layer(x.flip(1), mask.flip(1))  # a second part of the batch
    assert torch.equal(layer.centroids, before)
    heads = layer.qkv(x).unflatten(-1, (3, 2, 8))
    for head in range(2):
        tokens = functional.layer_norm(torch.cat([heads[:, :, part, head][mask] for part in (0, 1)]), (8,))
        near = (tokens @ before[head].T).argmax(dim=1)
        for c in range(3):
            mean = tokens[near == c].mean(dim=0) if (near == c).any() else before[head, c]
            expected = 0.75 * before[head, c] + 0.25 * mean
            before[head, c] = expected.detach()
    layer.training_update(1)
    torch.testing.assert_close(layer.centroids, before, **EXACT)
    layer.training_update(2)
    torch.testing.assert_close(layer.centroids, before, **EXACT)  # no token since


def test_a_token_that_is_not_finite_moves_no_centroid_and_leaves_no_trace():
    for bad in (float("nan"), float("inf")):
        layer, x = build("routing", PLACE, num_clusters=3).train(), torch.randn(2, 20, 16)
        before = layer.centroids.clone()
        layer(x.index_fill(1, torch.tensor([4]), bad))
        layer.training_update(1)
        assert torch.equal(layer.centroids, before)
        layer(x)
        layer.training_update(2)
        assert layer.centroids.isfinite().all() and not torch.equal(layer.centroids, before)


def test_a_resumed_run_has_the_tokens_that_came_since_the_last_step():
    layer = build("routing", PLACE, num_clusters=3, decay=0.5).train()
    layer(torch.randn(2, 20, 16))
    resumed = build("routing", PLACE, num_clusters=3, decay=0.5)
    resumed.load_state_dict(layer.state_dict())
    for one in (layer, resumed):
        one.training_update(1)
    assert torch.equal(layer.centroids, resumed.centroids)
    assert not torch.equal(layer.centroids, build("routing", PLACE, num_clusters=3).centroids)


def test_centroids_start_normalised_and_differ_by_seed_layer_and_head():
    place = Place(d_model=16, num_heads=2, max_len=64, layer_index=1, num_layers=2)
    starts = [
        build("routing", *args, num_local_heads=0, centroid_seed=seed).centroids
        for args, seed in (((PLACE,), 0), ((PLACE,), 1), ((place,), 0))
    ]
    heads = torch.cat(starts)  # [6 c d]
    assert all(not torch.equal(heads[i], heads[j]) for i in range(6) for j in range(i))
    torch.testing.assert_close(heads, functional.layer_norm(heads, (8,)), rtol=0, atol=1e-4)  # its eps
    assert torch.equal(starts[0], build("routing", PLACE, num_local_heads=0).centroids)


def test_dropout_acts_on_the_weights_of_local_and_of_routed_heads():
    layer = build("routing", PLACE, attn_dropout=0.5).train()
    q, k = torch.randn(2, 2, 2, 30, 8).unbind(0)
    ones = torch.ones(2, 2, 30, 8)
    found = layer.attend(q, k, ones, None)
    routed = found[:, 1][found[:, 1].abs().amax(dim=-1) > 0]  # zero: in no cluster
    for head in (found[:, 0], routed):
        assert (head - 1).abs().mean() > 0.01
    layer.eval()
    torch.testing.assert_close(layer.attend(q, k, ones, None)[:, 0], ones[:, 0])


def test_a_window_of_local_heads_without_any_is_refused():
    with pytest.raises(ValueError, match="no use for local_window=5"):
        build("routing", PLACE, num_local_heads=0, local_window=5)


def test_evaluation_moves_no_centroid_and_has_no_loss():
    layer = build("routing", PLACE).eval()
    layer.train()(torch.randn(2, 20, 16))
    counts = layer.counts.clone()
    layer.eval()(torch.randn(2, 20, 16))
    assert torch.equal(layer.counts, counts)
    assert layer.aux_loss() is None


def test_loss_is_the_mean_square_distance_of_real_queries_and_keys_to_their_centroids():
    layer = build("routing", PLACE, num_clusters=3, num_local_heads=0, commitment=0.5).double().train()
    x, mask = drawn(2, 20, 16), torch.arange(20) < torch.tensor([20, 7])[:, None]
    layer(x, mask)
    heads, parts = layer.qkv(x).unflatten(-1, (3, 2, 8)), []
    for head in range(2):
        tokens = functional.layer_norm(torch.cat([heads[:, :, part, head][mask] for part in (0, 1)]), (8,))
        near = (tokens @ layer.centroids[head].T).argmax(dim=1)
        parts.append((tokens - layer.centroids[head][near]).square().mean())
    expected = 0.5 * sum(parts) / 2
    loss = layer.aux_loss()
    torch.testing.assert_close(loss, expected, **EXACT)
    assert layer.aux_loss() is None  # given out once
    (found,) = torch.autograd.grad(loss, layer.qkv.weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected, layer.qkv.weight)[0], **EXACT)
    assert found[:32].any() and not found[32:].any()


def test_padding_moves_neither_centroids_nor_loss():
    results = []
    for filler in (0.0, 1e4):
        torch.manual_seed(0)
        layer, x = build("routing", PLACE).double().train(), drawn(2, 20, 16)
        mask = torch.arange(20) < torch.tensor([20, 7])[:, None]
        layer(torch.where(mask[..., None], x, filler), mask)
        loss = layer.aux_loss()
        layer.training_update(1)
        results.append((loss, layer.centroids))
    torch.testing.assert_close(*results, **EXACT)


def test_compiled_training_keeps_statistics_and_the_loss_with_its_gradient():
    losses, states = [], []
    x = torch.randn(2, 20, 16)
    for compiled in (False, True):
        torch.manual_seed(1)
        layer = build("routing", PLACE).train()
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        out = call(x)
        loss = layer.aux_loss()
        (out.sum() + loss).backward()
        losses.append([loss.detach(), layer.qkv.weight.grad])
        states.append([layer.sums, layer.counts])
    torch._dynamo.reset()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)  # float32 in another order
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    assert states[0][1].sum() == 2 * 2 * 20


def test_a_layer_can_be_copied_after_a_training_step():
    layer = build("routing", PLACE).train()
    layer(torch.randn(2, 20, 16))
    assert torch.equal(copy.deepcopy(layer).counts, layer.counts)
    assert layer.aux_loss() is not None


def test_sums_and_counts_are_over_real_tokens():
    x, centroids = normalised(drawn(2, 1, 10, 4), 1e-5), normalised(drawn(1, 3, 4), 1e-5)
    mask = torch.arange(10) < torch.tensor([10, 4])[:, None]
    near, sums, counts = nearest(x, mask, centroids)
    assert counts.sum() == 14
    torch.testing.assert_close(sums.sum(dim=1), x[:, 0][mask].sum(dim=0, keepdim=True), **EXACT)
    products = x @ centroids.mT
    torch.testing.assert_close((x * near).sum(dim=-1), products.amax(dim=-1), **EXACT)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (drawn(2, 1, 12, 4).float().requires_grad_() for _ in range(3))
    mask = torch.tensor([[True] * 12, [False] * 12])
    out = routing_attention(q, k, v, mask, centroids=torch.randn(1, 3, 4), window=5)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_wholly_padded_batch_has_a_finite_loss_and_moves_nothing():
    layer = build("routing", PLACE).train()
    before = layer.centroids.clone()
    layer(torch.randn(2, 20, 16), torch.zeros(2, 20, dtype=torch.bool))
    assert layer.aux_loss() == 0
    layer.training_update(1)
    assert torch.equal(layer.centroids, before)


def test_gradcheck():
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    leaves, centroids = [drawn(2, 2, 9, 4).requires_grad_() for _ in range(3)], drawn(2, 3, 4)

    def attend(q, k, v):
        return routing_attention(q, k, v, mask, centroids=centroids, window=4)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_use_mask_false_routes_padding_and_says_so():
    layer = build("routing", PLACE, use_mask=False).double().eval()
    x, mask = drawn(2, 50, 16), torch.arange(50) < torch.tensor([50, 20])[:, None]
    torch.testing.assert_close(layer(x, mask), layer(x), **EXACT)
    assert {"content_invariant", "length_invariant"} <= set(layer.traits.exceptions())


def test_without_local_heads_order_is_not_used():
    assert not build("routing", PLACE, num_local_heads=0).traits.uses_order
    assert build("routing", PLACE).traits.uses_order


@pytest.mark.parametrize(
    "own",
    [
        {"num_clusters": -1},
        {"window": -1},
        {"local_window": -1},
        {"decay": 1.5},
        {"commitment": -1.0},
        {"num_local_heads": 2},
        {"num_local_heads": -1},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="routing needs"):
        build("routing", PLACE, **own)
