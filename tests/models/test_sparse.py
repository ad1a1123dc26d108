"""Sparse Transformer: only its blocks are computed; its options; the row of the released benchmark."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import Place, build
from models.sparse import sparse_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
WAYS = [
    {"stride": 6},
    {"stride": 6, "causal": True, "sets": "far"},
    {"stride": 6, "num_global": 2},
    {"pattern": "fixed", "stride": 6, "num_summary": 2, "first_column": True},
    {"pattern": "fixed", "stride": 6, "num_summary": 2, "causal": True, "sets": "far"},
]


def qkv(length=29):
    return torch.randn(3, 2, 2, length, 4, dtype=torch.float64).unbind(0)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_strided_scores_are_those_of_three_blocks_or_of_one_column():
    for length in (512, 4096):
        q, k, v = (x[:1, :1] for x in qkv(length))
        with LargestTensor() as seen:
            sparse_attention(q, k, v, stride=32)
        assert seen.elements == length * max(3 * 32, length // 32)


def test_fixed_scores_are_those_of_one_block_or_of_all_summaries():
    for length in (256, 1024):
        q, k, v = (x[:1, :1] for x in qkv(length))
        with LargestTensor() as seen:
            sparse_attention(q, k, v, pattern="fixed", stride=32, num_summary=2)
        assert seen.elements == length * max(32, 2 * length // 32)


def test_only_fixed_patterns_with_summaries_say_that_their_memory_is_quadratic():
    def claims(layer=0, **own):
        place = Place(d_model=8, num_heads=2, max_len=9, layer_index=layer)
        return build("sparse", place, **own).traits.quadratic_memory

    assert not claims()
    assert claims(pattern="fixed")
    assert claims(pattern="fixed", split="heads")
    assert [claims(layer, pattern="fixed", split="layers") for layer in (0, 1)] == [False, True]


def test_saved_memory_of_the_default_grows_at_most_2_3_times_when_the_length_doubles():
    layer = build("sparse", Place(d_model=64, num_heads=2, max_len=16384))
    saved = []
    for length in (4096, 8192, 16384):
        bytes_of = {}
        x = torch.zeros(1, length, 64, requires_grad=True)

        def keep(t, bytes_of=bytes_of):
            storage = t.untyped_storage()
            bytes_of[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = layer(x)  # holds what it saved until its sizes are known
        saved.append(sum(bytes_of.values()))
        del out
    assert all(1.9 * before < after < 2.3 * before for before, after in pairwise(saved))


def test_released_row_equals_its_dense_mask():
    """As the benchmark builds it: tokens without [CLS], their lower triangle, one more row and column."""
    length, size, c = 41, 10, 2
    i, j = torch.arange(length - 1)[:, None], torch.arange(length - 1)
    own = i // size == j // size
    summary = (j % size == 0) | (j % size >= size - c)
    pattern = F.pad(((own | summary) & (j <= i)).int(), (1, 0, 1, 0), value=1).bool()
    q, k, v = qkv(length)
    mask = torch.arange(length) < torch.tensor([length, 17])[:, None]
    allowed = (pattern & mask[:, None, None, :]).expand(2, 2, -1, -1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    options = {"pattern": "fixed", "stride": size, "num_summary": c, "causal": True}
    found = sparse_attention(q, k, v, mask, num_global=1, first_column=True, **options)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1, :, :17], expected[1, :, :17], **EXACT)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_split_heads_gives_near_keys_to_the_first_half_and_far_keys_to_the_rest(pattern):
    layer = build(
        "sparse",
        Place(d_model=12, num_heads=3, max_len=50),
        pattern=pattern,
        stride=5,
        split="heads",
        **({"num_summary": 2} if pattern == "fixed" else {}),
    )
    q, k, v = torch.randn(3, 2, 3, 50, 4).unbind(0)
    i, j = torch.arange(50)[:, None], torch.arange(50)
    near, far = (
        ((i - j).abs() <= 5, (i - j) % 5 == 0) if pattern == "strided" else (i // 5 == j // 5, j % 5 >= 3)
    )
    seen = torch.stack([near, near, far.expand(50, 50)])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(layer.attend(q, k, v, None), expected, rtol=0, atol=1e-5)


def test_split_layers_takes_turns():
    q, k, v = torch.randn(3, 1, 2, 40, 4).unbind(0)
    for index, sets in enumerate(("near", "far", "near")):
        place = Place(d_model=8, num_heads=2, max_len=40, layer_index=index)
        layer = build("sparse", place, stride=6, split="layers")
        assert torch.equal(layer.attend(q, k, v, None), sparse_attention(q, k, v, stride=6, sets=sets))


@pytest.mark.parametrize("own", WAYS, ids=str)
def test_row_without_real_keys_gives_zeros_and_finite_gradients(own):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = sparse_attention(q, k, v, torch.tensor([[True] * 29, [False] * 29]), **own)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_query_before_the_first_summary_sees_nothing_if_causal_and_far():
    q, k, v = qkv()
    options = {"pattern": "fixed", "stride": 6, "num_summary": 2, "causal": True, "sets": "far"}
    found = sparse_attention(q, k, v, **options)
    assert not found[:, :, :4].any()
    torch.testing.assert_close(found[:, :, 4], v[:, :, 4], **EXACT)  # the first summary sees itself


@pytest.mark.parametrize("own", WAYS, ids=str)
def test_gradcheck(own):
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    leaves = [x.requires_grad_() for x in qkv(length=9)]
    own = {**own, "stride": 3}
    assert torch.autograd.gradcheck(
        lambda q, k, v: sparse_attention(q, k, v, mask, **own), leaves, fast_mode=True
    )


@pytest.mark.parametrize("own", [*WAYS, {"stride": 6, "num_global": 40}], ids=str)
def test_every_length_works_also_those_within_the_global_tokens(own):
    for length in (1, 2, 5, 6, 7, 12, 13):
        q, k, v = qkv(length)
        assert sparse_attention(q, k, v, **own).shape == q.shape


def test_dropout_acts_on_global_rows():
    q, k, v = qkv()
    found = sparse_attention(q, k, torch.ones_like(v), stride=6, num_global=2, dropout=0.5)
    assert ((found[:, :, :2] - 1).abs() > 1e-3).any(dim=-1).all()


def test_dropout_acts_on_weights_and_in_training_only():
    layer = build("sparse", Place(d_model=8, num_heads=2, max_len=9), stride=2, attn_dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "own",
    [
        {"pattern": "block"},
        {"split": "rows"},
        {"stride": 0},
        {"num_global": -1},
        {"pattern": "fixed", "stride": 8, "num_summary": 9},
        {"pattern": "fixed", "num_summary": 0},
        {"first_column": True},
        {"num_summary": 4},
        {"pattern": "fixed", "num_summary": 128, "first_column": True},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="sparse|first_column|num_summary"):
        build("sparse", Place(d_model=8, num_heads=2, max_len=9), **own)


def test_one_head_that_cannot_be_split_is_near():
    own = {"stride": 4, "split": "heads"}
    layer = build("sparse", Place(d_model=8, num_heads=1, max_len=30), **own)
    q, k, v = torch.randn(3, 1, 1, 30, 8).unbind(0)
    assert torch.equal(layer.attend(q, k, v, None), sparse_attention(q, k, v, stride=4, sets="near"))
