"""Clustered attention: its clusters, their layout in blocks, and that the correction only helps."""

import pytest
import torch

from models import Place, build
from models.clustered import assign, blocks_of, clustered_attention
from models.common import dense_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(length=60, d=8):
    return drawn(3, 2, 2, length, d).unbind(0)


def test_queries_of_one_cluster_share_the_pattern_of_their_mean():
    q, k, v = qkv()
    planes = drawn(2, 8, 16)
    cluster = assign(q, None, planes, num_clusters=4, num_iterations=5)
    found = clustered_attention(q, k, v, planes=planes, num_clusters=4, num_iterations=5, improved=False)
    for b, h in ((0, 0), (1, 1)):
        for c in cluster[b, h].unique():
            members = cluster[b, h] == c
            shared = (k[b, h] @ q[b, h, members].mean(dim=0) / 8**0.5).softmax(dim=0) @ v[b, h]
            torch.testing.assert_close(found[b, h, members], shared.expand(int(members.sum()), -1), **EXACT)


def test_queries_far_apart_get_clusters_of_their_own():
    directions = 5 * torch.linalg.qr(drawn(8, 8))[0][:4]
    which = torch.arange(40) // 10
    q = (directions[which] + 0.01 * drawn(40, 8)).expand(1, 1, 40, 8)
    cluster = assign(q, None, drawn(1, 8, 63), num_clusters=4, num_iterations=10)[0, 0]
    assert all(len(cluster[which == c].unique()) == 1 for c in range(4))
    assert len(cluster.unique()) == 4


def test_copies_of_a_few_queries_give_dense_attention():
    q, k, v = qkv()
    q = q[:, :, :4].repeat(1, 1, 15, 1)
    for improved in (False, True):
        found = clustered_attention(
            q, k, v, planes=drawn(2, 8, 63), num_clusters=20, improved=improved, topk=5
        )
        torch.testing.assert_close(found, dense_attention(q, k, v), **EXACT)


def test_the_correction_and_more_clusters_come_nearer_to_dense_attention():
    q, k, v = qkv(length=150)
    q, exact, errors = 2 * q, dense_attention(2 * q, k, v), {}
    for improved, num_clusters in ((False, 10), (True, 10), (True, 60)):
        options = {"planes": drawn(2, 8, 63), "improved": improved, "num_clusters": num_clusters}
        found = clustered_attention(q, k, v, **options)
        errors[improved, num_clusters] = (found - exact).square().mean().item()
    assert errors[False, 10] > errors[True, 10] > errors[True, 60]


def test_rows_of_few_tokens_are_not_clustered_whatever_the_padding():
    q, k, v = qkv()
    mask = torch.arange(60) < torch.tensor([60, 12])[:, None]
    options = {"planes": drawn(2, 8, 16), "num_clusters": 12, "improved": False}
    found = clustered_attention(q, k, v, mask, **options)[1, :, :12]
    torch.testing.assert_close(found, dense_attention(q, k, v, mask)[1, :, :12], **EXACT)


def test_every_query_has_one_slot_and_every_block_one_cluster():
    cluster = torch.randint(0, 7, (2, 3, 50))
    cluster[0, 0] = 3
    order, slot, used, owner = blocks_of(cluster, 9, 4)
    assert order.shape == (2, 3, (13 + 9) * 4)
    torch.testing.assert_close(order.gather(-1, slot), torch.arange(50).expand(2, 3, 50))
    assert (used.sum(dim=-1) == 50).all()
    assert all(len(slots.unique()) == 50 for slots in slot.flatten(0, 1))
    assert torch.equal(owner.gather(-1, slot // 4), cluster)


def test_clusters_are_of_real_queries_alone():
    q, k, v = qkv()
    mask = torch.rand(2, 60) < 0.6
    options = {"planes": drawn(2, 8, 16), "num_clusters": 6}
    cluster = assign(q, mask, options["planes"], num_clusters=6, num_iterations=10)
    other = torch.where(mask[:, None, :, None], q, 1e4 * drawn(2, 2, 60, 8))
    moved = assign(other, mask, options["planes"], num_clusters=6, num_iterations=10)
    real = mask[:, None].expand(2, 2, 60)
    assert torch.equal(cluster[real], moved[real])
    for row in range(2):
        alone = [x[row : row + 1, :, mask[row]] for x in (q, k, v)]
        found = clustered_attention(q, k, v, mask, **options)[row : row + 1, :, mask[row]]
        torch.testing.assert_close(found, clustered_attention(*alone, **options), **EXACT)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    mask = torch.tensor([[True] * 60, [False] * 60])
    out = clustered_attention(q, k, v, mask, planes=torch.randn(2, 8, 16), num_clusters=6)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("improved", [False, True])
def test_gradcheck(improved):
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    leaves, planes = [x.requires_grad_() for x in qkv(length=9, d=4)], drawn(2, 4, 8)

    def attend(q, k, v):
        options = {"planes": planes, "num_clusters": 3, "improved": improved, "topk": 2}
        return clustered_attention(q, k, v, mask, **options)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_autocast_clusters_as_full_precision_does():
    layer, x = build("clustered", PLACE, num_clusters=8).eval(), torch.randn(2, 150, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x).float()
    expected = layer(x)
    worst = (found - expected).norm(dim=-1).amax() / expected.norm(dim=-1).mean()
    assert worst < 0.1  # a query in another cluster would be off by about 1


def test_planes_change_in_training_and_are_those_of_the_seed_in_evaluation():
    layer = build("clustered", PLACE)
    layer.training_update(0)
    first = layer.directions.clone()
    layer.training_update(1)
    assert not torch.equal(first, layer.directions)
    assert torch.equal(layer.eval().directions, build("clustered", PLACE, redraw_every=0).directions)


def test_every_output_is_made_of_weights_that_are_dropped_once():
    """One key has all the weight: an output is its value over 1 - p in a share 1 - p of queries, else 0."""
    q, k, v = (torch.full((1, 1, 6400, 4), x) for x in (1.0, 0.0, 1.0))
    k[:, :, 0] = 20.0
    options = {"planes": torch.randn(1, 4, 8), "num_clusters": 4, "topk": 4, "dropout": 0.25}
    found = clustered_attention(q, k, v, **options)[0, 0, :, 0]
    kept = found > 0.1
    assert 0.72 < kept.float().mean() < 0.78  # twice dropped: 0.56; standard deviation 0.006
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 4 / 3))


def test_dropout_acts_on_shared_patterns_and_on_corrections_alike():
    q, k, _ = qkv()
    values = torch.ones(2, 2, 60, 1, dtype=torch.float64)
    options = {"planes": drawn(2, 8, 16), "num_clusters": 5, "dropout": 0.5}

    def outputs(**own):  # [b h l], 1 without dropout
        return clustered_attention(q, k, values, **options, **own)[..., 0]

    assert not torch.allclose(outputs(improved=False), values[..., 0])
    assert not torch.allclose(outputs(topk=60), values[..., 0])  # the corrections are all there is
    k[:, :, 0] = 40 * q.mean(dim=2)
    shared = torch.zeros(2, 2, 60, 1, dtype=torch.float64)
    cluster = assign(q, None, options["planes"], num_clusters=5, num_iterations=10)
    top = (k[0, 0] @ q[0, 0, cluster[0, 0] == 0].mean(dim=0)).argmax()
    shared[...] = 1.0
    shared[0, 0, top] = 0.0  # with topk=1 the first head's cluster 0 gets the rest of its pattern alone
    found = clustered_attention(q, k, shared, topk=1, **options)[0, 0, cluster[0, 0] == 0, 0]
    plain = clustered_attention(q, k, shared, topk=1, **{**options, "dropout": 0.0})
    assert not torch.allclose(found, plain[0, 0, cluster[0, 0] == 0, 0], rtol=1e-6, atol=1e-12)


def test_hash_bias_moves_planes_off_the_origin():
    q, planes = drawn(2, 2, 60, 8), drawn(2, 9, 1)
    planes[:, 8] = torch.tensor([[1e3], [0.0]])
    options = {"num_clusters": 2, "num_iterations": 3}
    cluster = assign(q, None, planes, **options)
    assert not cluster[:, 0].any()  # all on one side: of equal codes the first cluster is nearer
    assert torch.equal(cluster[:, 1], assign(q, None, planes[:, :8], **options)[:, 1])
    assert build("clustered", PLACE, hash_bias=True, bits=5).directions.shape == (2, 9, 5)


def test_topk_without_corrections_is_refused():
    with pytest.raises(ValueError, match="improved=False has no top keys"):
        build("clustered", PLACE, improved=False, topk=7)


@pytest.mark.parametrize(
    "own",
    [{"num_clusters": 0}, {"bits": 0}, {"topk": 0}, {"num_iterations": -1}, {"redraw_every": -1}],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="clustered needs"):
        build("clustered", PLACE, **own)
