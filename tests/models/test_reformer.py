"""Reformer: its hash, its limit, what each quirk of released code does, and when rotations change."""

import math

import pytest
import torch
from proofs.reformer import RELEASED

from models import Place, build
from models.reformer import hash_sizes, lsh_attention, lsh_buckets

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def one_bucket(rounds=1, length=12):
    return torch.zeros(2, 2, rounds, length, dtype=torch.long)


@pytest.mark.parametrize("unit_keys", [True, False])
@pytest.mark.parametrize("mask_self", [True, False])
@pytest.mark.parametrize("scale", [8**-0.5, 1.0, 8**0.5])
def test_one_chunk_is_dense_attention_with_each_quirk_of_the_scores(unit_keys, mask_self, scale):
    q, v = drawn(2, 2, 12, 8), drawn(2, 2, 12, 8)
    keys = q / q.norm(dim=-1, keepdim=True) if unit_keys else q
    scores = scale * q @ keys.mT
    if mask_self:
        scores = scores.masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    options = {"scale": scale, "unit_keys": unit_keys, "mask_self": mask_self}
    found = lsh_attention(q, v, buckets=one_bucket(rounds=2), chunk=12, **options)
    torch.testing.assert_close(found, scores.softmax(dim=-1) @ v, **EXACT)


def test_tokens_see_their_bucket_in_their_chunk_and_the_one_before():
    q, v = drawn(2, 2, 12, 8), drawn(2, 2, 12, 8)
    bucket = torch.tensor([0, 1] * 6).expand(2, 2, 1, 12)  # sorted: 0 2 4 6 | 8 10 1 3 | 5 7 9 11
    scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT / math.sqrt(8)
    seen = {0: [2, 4, 6], 8: [0, 2, 4, 6, 10], 1: [3], 5: [1, 3, 7, 9, 11]}
    found = lsh_attention(q, v, buckets=bucket, chunk=4)
    for i, keys in seen.items():
        expected = torch.einsum("bhj,bhjd->bhd", scores[:, :, i, keys].softmax(-1), v[:, :, keys])
        torch.testing.assert_close(found[:, :, i], expected, **EXACT)


def test_across_buckets_the_first_chunk_sees_the_last_and_pairs_count_in_every_round():
    q, v = drawn(2, 2, 12, 8), drawn(2, 2, 12, 8)
    bucket = torch.tensor([0, 1] * 6).expand(2, 2, 2, 12)
    scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT / math.sqrt(8)
    found = lsh_attention(q, v, buckets=bucket, chunk=4, across_buckets=True)
    keys = [2, 4, 6, 5, 7, 9, 11]  # of token 0, in both rounds alike
    expected = torch.einsum("bhj,bhjd->bhd", scores[:, :, 0, keys].softmax(-1), v[:, :, keys])
    torch.testing.assert_close(found[:, :, 0], expected, **EXACT)
    mixed = torch.stack([torch.arange(12) // 4, torch.arange(12) % 2])[None, None].expand(2, 2, 2, 12)
    found = lsh_attention(q, v, buckets=mixed, chunk=4, across_buckets=True)
    keys = [1, 2, 3, 5, 7, 9, 11] + [
        2,
        4,
        6,
        8,
        9,
        10,
        11,
    ]  # round one follows the ring's end, round two's last
    expected = torch.einsum("bhj,bhjd->bhd", scores[:, :, 0, keys].softmax(-1), v[:, :, keys])
    torch.testing.assert_close(found[:, :, 0], expected, **EXACT)


def test_a_token_alone_in_every_round_sees_itself_and_no_other_does():
    q, v = drawn(2, 2, 12, 8), drawn(2, 2, 12, 8)
    bucket = one_bucket(rounds=2)
    bucket[..., 5] = 1
    torch.testing.assert_close(lsh_attention(q, v, buckets=bucket, chunk=12)[:, :, 5], v[:, :, 5], **EXACT)
    bucket[:, :, 0, 5] = 0  # one round in company is enough
    company = lsh_attention(q, v, buckets=bucket, chunk=12)[:, :, 5]
    alone = lsh_attention(q, v, buckets=bucket[:, :, :1], chunk=12)[:, :, 5]
    torch.testing.assert_close(company, alone, **EXACT)


def test_buckets_depend_on_direction_alone_and_opposites_are_half_apart():
    x, rotations = drawn(2, 2, 500, 8), drawn(2, 3, 8, 5)
    bucket = lsh_buckets(x, rotations, (10,))
    assert bucket.shape == (2, 2, 3, 500)
    assert set(bucket.unique().tolist()) == set(range(10))
    assert torch.equal(lsh_buckets(7 * x, rotations, (10,)), bucket)
    assert torch.equal(lsh_buckets(-x, rotations, (10,)), (bucket + 5) % 10)


def test_near_vectors_share_a_bucket_more_often_than_far_ones():
    x, rotations = drawn(1, 1, 2000, 8), drawn(1, 4, 8, 8)
    same = [
        (lsh_buckets(x, rotations, (16,)) == lsh_buckets(x + by * drawn(1, 1, 2000, 8), rotations, (16,)))
        .double()
        .mean()
        for by in (0.1, 0.5, 2.0)
    ]
    assert same[0] > same[1] > same[2] > 1 / 16


def test_many_buckets_are_two_hashes():
    assert hash_sizes(1) == ()
    assert hash_sizes(128) == (128,)
    assert hash_sizes(512) == (16, 32)
    sizes = hash_sizes(134)
    assert math.prod(sizes) >= 134 and all(size % 2 == 0 for size in sizes)
    x, rotations = drawn(1, 1, 400, 8), drawn(1, 1, 8, 24)
    both = [
        lsh_buckets(x, rotations[..., part], (size,)) for part, size in ((slice(8), 16), (slice(8, 24), 32))
    ]
    assert torch.equal(lsh_buckets(x, rotations, (16, 32)), both[0] + 16 * both[1])


def test_buckets_come_from_max_len_and_not_from_the_length():
    assert build("reformer", Place(d_model=16, num_heads=2, max_len=4096)).sizes == (128,)
    assert build("reformer", Place(d_model=16, num_heads=2, max_len=16384)).sizes == (16, 32)
    assert build("reformer", PLACE, num_buckets=10).sizes == (10,)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, v = (x.float().requires_grad_() for x in (drawn(2, 2, 12, 8), drawn(2, 2, 12, 8)))
    mask = torch.tensor([[True] * 12, [False] * 12])
    out = lsh_attention(q, v, mask, buckets=one_bucket(), chunk=5)
    assert not out[1].any()
    out.square().sum().backward()
    assert q.grad.isfinite().all() and v.grad.isfinite().all()


@pytest.mark.parametrize("across", [False, True])
def test_gradcheck(across):
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    buckets = torch.randint(0, 2, (2, 2, 2, 7))
    leaves = [drawn(2, 2, 7, 4).requires_grad_(), drawn(2, 2, 7, 4).requires_grad_()]

    def attend(q, v):
        return lsh_attention(q, v, mask, buckets=buckets, chunk=3, across_buckets=across)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_training_draws_rotations_anew_in_place_and_evaluation_keeps_those_of_the_seed():
    layer = build("reformer", PLACE, redraw_every=10)
    fixed, address, seen = layer.fixed_directions.clone(), layer.drawn_directions.data_ptr(), []
    for step in range(30):
        layer.training_update(step)
        seen.append(layer.directions.clone())
    assert layer.drawn_directions.data_ptr() == address
    assert [s for s in range(1, 30) if not torch.equal(seen[s], seen[s - 1])] == [10, 20]
    assert torch.equal(layer.eval().directions, fixed)
    resumed = build("reformer", PLACE, redraw_every=10)
    resumed.training_update(25)
    assert torch.equal(resumed.directions, seen[25])
    assert not torch.equal(fixed, seen[0])


def test_rotations_are_decided_by_seed_and_layer_and_stay_if_never_redrawn():
    layer = build("reformer", PLACE, redraw_every=0)
    layer.training_update(5)
    assert torch.equal(layer.directions, build("reformer", PLACE).fixed_directions)
    assert not torch.equal(layer.directions, build("reformer", PLACE, hash_seed=1).fixed_directions)
    later = Place(d_model=16, num_heads=2, max_len=200, layer_index=1, num_layers=2)
    assert not torch.equal(layer.directions, build("reformer", later).fixed_directions)


def test_half_precision_hashes_as_full_precision_does():
    layer = build("reformer", PLACE).eval()
    half = build("reformer", PLACE).eval().bfloat16()
    half.load_state_dict(layer.state_dict())
    assert torch.equal(half.fixed_directions.float(), layer.fixed_directions)


def test_use_mask_false_lets_padding_take_part_and_says_so():
    x, mask = drawn(2, 50, 16), torch.arange(50) < torch.tensor([50, 20])[:, None]
    blind = build("reformer", PLACE, use_mask=False).double().eval()
    torch.testing.assert_close(blind(x, mask), blind(x), **EXACT)
    assert {"content_invariant", "length_invariant"} <= set(blind.traits.exceptions())


def test_without_output_projection_heads_are_the_output_unless_widths_differ():
    assert not list(build("reformer", PLACE, output_projection=False).out.parameters())
    narrow = Place(d_model=16, num_heads=2, max_len=200, d_head=4)
    assert build("reformer", narrow, output_projection=False).out.weight.shape == (16, 8)


def test_num_chunks_divides_the_padded_length_and_says_so():
    layer = build("reformer", PLACE, num_chunks=10, num_buckets=10)
    assert "length_invariant" in layer.traits.exceptions()
    x = drawn(1, 7, 16)
    short = build("reformer", PLACE, bucket_size=1, num_buckets=10).double().eval()
    layer = layer.double().eval()
    layer.load_state_dict(short.state_dict())
    torch.testing.assert_close(layer(x), short(x), **EXACT)  # chunks of one token


@pytest.mark.parametrize(
    "own",
    [
        {"num_hashes": 0},
        {"bucket_size": 0},
        {"num_buckets": 3},
        {"num_chunks": -1},
        {"redraw_every": -1},
        {"hash_seed": -1},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="reformer needs"):
        build("reformer", PLACE, **own)


def test_unknown_scales_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="choose from: divided, none, multiplied"):
        build("reformer", PLACE, score_scale="sqrt")


@pytest.mark.parametrize("length", [7, 30, 33])
def test_the_released_row_appends_one_to_ten_zero_tokens_that_are_hashed_sorted_and_seen(length):
    """The benchmark's layer step by step, with our rotations: also ten zeros where ten divides the length."""
    layer = build("reformer", PLACE, **RELEASED).double().eval()
    x = drawn(1, length, 16)
    mask = torch.arange(length) < torch.tensor([length // 2])[:, None]  # it ignores padding
    filled = torch.cat([x[0], torch.zeros(10 - length % 10, 16)])
    total, heads = len(filled), []
    for head in range(2):
        q, v = ((filled @ layer.qkv.weight.T + layer.qkv.bias)[:, i + 8 * head :][:, :8] for i in (0, 16))
        turned = q @ layer.fixed_directions[head, 0].double()
        bucket = torch.cat([turned, -turned], dim=-1).argmax(dim=-1)
        order = (total * bucket + torch.arange(total)).argsort()
        q, v = (part[order].reshape(10, total // 10, 8) for part in (q, v))
        k, v = (torch.cat([part, part.roll(1, dims=0)], dim=1) for part in (q, v))
        mixed = ((q @ k.mT * 8**0.5).softmax(dim=-1) @ v).reshape(total, 8)
        heads.append(mixed[order.argsort()])
    torch.testing.assert_close(layer(x, mask)[0], torch.cat(heads, dim=-1)[:length], **EXACT)


def test_slots_that_hold_no_token_have_no_part_in_gradients():
    """Copies of token 0 would stand there and overflow: near tokens 4 and 5, as token 0 itself is not."""
    q, v = torch.full((1, 1, 7, 4), 0.1), torch.randn(1, 1, 7, 4).requires_grad_()
    q[:, :, 4:6] = 4e3
    buckets = torch.tensor([0, 0, 1, 1, 2, 2, 2]).view(1, 1, 1, 7)
    own = {"chunk": 2, "across_buckets": True, "unit_keys": False, "mask_self": False, "scale": 2.0}
    out = lsh_attention(q.requires_grad_(), v, buckets=buckets, **own)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all() and v.grad.isfinite().all()


def test_uneven_token_norms_give_finite_gradients_in_the_released_setting():
    for seed in range(5):
        torch.manual_seed(seed)
        layer = build("reformer", Place(d_model=64, num_heads=2, max_len=600), **RELEASED)
        for layer.append_zeros in (True, False):  # with the latter 512 tokens leave eight places empty
            x = (torch.randn(1, 512, 64) * torch.randn(1, 512, 1).exp().square()).requires_grad_()
            layer(x).square().mean().backward()
            assert x.grad.isfinite().all() and layer.qkv.weight.grad.isfinite().all()


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("chunk", [28, 14, 10, 7, 4])  # in 3 or 7 chunks int32 codes of padding wrap to 0
def test_padded_tokens_see_nothing_and_are_zero(across, chunk):
    q, v, mask = drawn(1, 2, 28, 8), drawn(1, 2, 28, 8), torch.arange(28)[None] < 25
    buckets = torch.zeros(1, 2, 2, 28, dtype=torch.long)
    found = lsh_attention(q, v, mask, buckets=buckets, chunk=chunk, across_buckets=across)
    assert not found[:, :, 25:].any()
    assert (found[:, :, :25].norm(dim=-1) > 0).all()


def test_the_score_of_a_token_with_itself_is_replaced_whatever_its_size():
    q, v = 1e6 * drawn(2, 2, 12, 8), drawn(2, 2, 12, 8)
    scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT / math.sqrt(8)
    scores = scores.masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    found = lsh_attention(q, v, buckets=one_bucket(), chunk=12)
    torch.testing.assert_close(found, scores.softmax(dim=-1) @ v, rtol=0, atol=1e-9)  # scores are rounded


def test_padded_content_that_overflows_half_precision_leaves_gradients_finite():
    x, mask = torch.randn(2, 60, 16), torch.arange(60) < torch.tensor([60, 37])[:, None]
    x = torch.where(mask[..., None], x, 1e3 * x).requires_grad_()
    for across in (False, True):
        own = {"bucket_size": 8, "across_buckets": across, "unit_keys": False}
        layer = build("reformer", PLACE, **own).eval()
        with torch.autocast("cpu", torch.float16):
            out = layer(x, mask)
        out[mask].float().square().sum().backward()
        assert x.grad.isfinite().all() and layer.qkv.weight.grad.isfinite().all()


def test_dropout_acts_on_weights_and_in_training_only():
    """Without redrawn rotations, which would change training as well."""
    layer, x = build("reformer", PLACE, redraw_every=0, attn_dropout=0.5), torch.randn(2, 40, 16)
    plain = layer.eval()(x)
    assert torch.equal(plain, layer(x))
    assert not torch.equal(plain, layer.train()(x))
    q, ones = drawn(2, 2, 40, 8), torch.ones(2, 2, 40, 8, dtype=torch.float64)
    found = lsh_attention(q, ones, buckets=one_bucket(length=40), chunk=40, dropout=0.5)
    assert set((found[..., 0] != found[..., 1]).unique().tolist()) == {False}  # a weight for all of a value
    assert 0.8 < found.mean() < 1.2 and found.std() > 0.01


@pytest.mark.parametrize(
    "own",
    [
        {"num_buckets": 1, "hash_seed": 3},
        {"num_buckets": 1, "redraw_every": 0},
        {"num_buckets": 10, "num_chunks": 10, "bucket_size": 7},
        {"append_zeros": True},
    ],
)
def test_options_that_would_do_nothing_are_refused(own):
    with pytest.raises(ValueError, match="reformer with"):
        build("reformer", PLACE, **own)
