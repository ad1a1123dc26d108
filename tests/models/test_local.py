"""Local attention: dense attention under a band, without a length by length matrix."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import Place, build
from models.local import PATTERNS, local_attention, released_attention

NEAR = tuple(pattern for pattern in PATTERNS if pattern != "released")
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=29):
    return torch.randn(3, 2, 2, length, 4, dtype=torch.float64).unbind(0)


def band(length, window, pattern):
    """[l l] bool, from the definition."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    return {
        "sliding": (i - j).abs() <= window // 2,
        "block": i // window == j // window,
        "neighbours": (i // window - j // window).abs() <= 1,
    }[pattern]


@pytest.mark.parametrize("pattern", NEAR)
@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 28, 29, 30, 57, 58, 100])
def test_equals_dense_attention_under_the_band(pattern, window):
    q, k, v = qkv()
    mask = torch.arange(29) < torch.tensor([29, 11])[:, None]
    allowed = band(29, window, pattern) & mask[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed.expand(2, 2, 29, 29))
    found = local_attention(q, k, v, mask, window=window, pattern=pattern)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1, :, :11], expected[1, :, :11], **EXACT)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size()
            for x in tree_leaves(out)
            if isinstance(x, torch.Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("pattern", NEAR)
def test_memory_grows_with_length_and_not_with_its_square(pattern):
    peaks = []
    for length in (500, 1000, 2000):
        q, k, v = qkv(length)
        with LargestTensor() as seen:
            local_attention(q, k, v, window=16, pattern=pattern)
        peaks.append(seen.elements)
        assert seen.elements <= 4 * length * 4 * 16  # heads and rows, keys seen per query
    assert all(after < 2.1 * before for before, after in pairwise(peaks))


@pytest.mark.parametrize("pattern", NEAR)
def test_row_without_real_keys_gives_zeros_and_finite_gradients(pattern):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = local_attention(q, k, v, torch.tensor([[True] * 29, [False] * 29]), window=6, pattern=pattern)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("pattern", NEAR)
def test_gradcheck(pattern):
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    leaves = [x.requires_grad_() for x in qkv(length=5)]
    attend = lambda q, k, v: local_attention(q, k, v, mask, window=2, pattern=pattern)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("pattern", NEAR)
@pytest.mark.parametrize("window", [1, 6, 16, 40, 500])
def test_packed_path_equals_each_sequence_alone(pattern, window):
    place = Place(d_model=8, num_heads=2, max_len=40)
    mechanism = build("local", place, window=window, pattern=pattern).double()
    x = torch.randn(60, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 36, 37, 53], dtype=torch.int32)  # one is empty, seven rows are filler
    parts = x[:53].split(cu_seqlens.diff().tolist())
    alone = torch.cat([mechanism(part[None])[0] for part in parts if len(part)])
    packed = mechanism.forward_packed(x, cu_seqlens, 40)
    torch.testing.assert_close(packed[:53], alone, **EXACT)
    assert packed.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", NEAR)
def test_one_compiled_graph_serves_lengths_that_fill_their_blocks_and_lengths_that_do_not(pattern):
    attend = partial(local_attention, window=8, pattern=pattern)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (17, 33, 40, 128):
        q, k, v = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(length)
        )  # as a mixer gives them
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), **EXACT)
    torch._dynamo.reset()


OF_BLOCKS = [
    ("local", {"window": 16}),
    ("sparse", {"stride": 16}),
    ("sparse", {"pattern": "fixed", "stride": 16, "num_summary": 4, "num_global": 1}),
    ("longformer", {"window": 16}),
    ("bigbird", {"block_size": 16}),
]


@pytest.mark.parametrize(("name", "own"), OF_BLOCKS, ids=str)
def test_padded_content_that_overflows_half_precision_leaves_gradients_finite(name, own):
    layer = build(name, Place(d_model=64, num_heads=2, max_len=100), **own).eval()
    x, mask = torch.randn(2, 100, 64), torch.arange(100) < torch.tensor([100, 37])[:, None]
    x = torch.where(mask[..., None], x, 1e3 * x).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        out = layer(x, mask)
    out[mask].float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_dropout_acts_on_weights_and_in_training_only():
    mechanism = build("local", Place(d_model=8, num_heads=2, max_len=9), window=4, attn_dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(mechanism(x), mechanism(x))
    mechanism.eval()
    assert torch.equal(mechanism(x), mechanism(x))


@pytest.mark.parametrize("own", [{"window": 0}, {"pattern": "strided"}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="local"):
        build("local", Place(d_model=8, num_heads=2, max_len=9), **own)


def test_released_blocks_are_strided_and_their_masks_contiguous():
    """Seven tokens in blocks of four: n = 2, so tokens 0 2 4 6 and 1 3 5 (7), with masks of 0-3 and 4-7."""
    q, k, v = (torch.randn(1, 1, 8, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True, True, False, True, True, False, True]])
    found = released_attention(q, k, v, mask, window=4)[0, 0]

    def attend(i, keys):
        return (q[0, 0, i] @ k[0, 0, keys].T / 2).softmax(dim=-1) @ v[0, 0, keys]

    expected = {
        0: attend(0, [0, 2, 6]),  # masks 0 1 3 are True: places 0 1 3 of the even tokens, padded or not
        4: v[0, 0, [0, 2, 4, 6]].mean(dim=0),  # stands where mask 2 does: sees nothing, so the mean
        6: attend(6, [0, 2, 6]),
        1: attend(1, [1, 5, 7]),  # masks 4 and 6, though token 5 is padding, and the fill of the mask
        3: v[0, 0, [1, 3, 5, 7]].mean(dim=0),
        7: attend(7, [1, 5, 7]),  # beyond the length: real to all
    }
    for i, row in expected.items():
        torch.testing.assert_close(found[i], row, **EXACT)


def test_released_fills_its_bool_mask_with_a_number_that_is_true():
    """The code's own steps: inputs and mask padded alike, one cut into (w, n), the other into (n, w)."""
    length, w = 23, 4
    mask = np.arange(length)[None] < np.array([[length], [14]])
    filled = np.pad(mask, ((0, 0), (0, w - length % w)), constant_values=-1e9)
    n = filled.shape[1] // w
    q, k, v = torch.randn(3, 2, 1, n * w, 4, dtype=torch.float64).unbind(0)
    blocks = [x.reshape(2, w, n, 4).transpose(1, 2) for x in (q, k, v)]
    marks = torch.from_numpy(filled.reshape(2, n, w))
    unseen = ~(marks[..., None] & marks[..., None, :])
    bias = -1e300 * unseen.double()  # any score is lost beside it
    mixed = (blocks[0] @ blocks[1].mT / 2 + bias).softmax(dim=-1) @ blocks[2]
    expected = mixed.transpose(1, 2).reshape(2, 1, n * w, 4)
    found = released_attention(q, k, v, torch.from_numpy(mask), window=w)
    torch.testing.assert_close(found, expected, **EXACT)


def test_dropout_of_released_acts_on_weights():
    q, k, v = (x[..., :28, :] for x in qkv())
    mask = torch.ones(1, 27, dtype=torch.bool)
    found = released_attention(q, k, torch.ones_like(v), mask, window=4, dropout=0.5)
    assert (found - 1).abs().max() > 0.1
    assert 0.8 < found.mean() < 1.2  # 1 in the mean, up to the noise of some 100 weights


def test_released_adds_a_whole_block_of_zero_inputs_where_the_length_fills_its_blocks():
    """Their keys are the bias alone, and real queries see them."""
    mechanism = build(
        "local", Place(d_model=4, num_heads=1, max_len=9), window=2, pattern="released"
    ).double()
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    found = mechanism(x)  # 3 blocks of 2: tokens 0 3, 1 (4), 2 (5)
    q, k, v = mechanism.qkv(torch.cat([x, torch.zeros(1, 2, 4)], dim=1))[0].chunk(3, dim=-1)
    pairs = [[0, 3], [1, 4], [2, 5]]
    rows = [
        (q[i] @ k[keys].T / 2).softmax(dim=-1) @ v[keys] for i, keys in zip((0, 1, 2), pairs, strict=True)
    ]
    torch.testing.assert_close(found[0, :3], mechanism.out(torch.stack(rows)), **EXACT)


def test_released_says_what_it_breaks():
    place = Place(d_model=8, num_heads=2, max_len=9)
    assert build("local", place).traits.packed
    traits = build("local", place, pattern="released").traits
    assert not traits.packed
    assert set(traits.exceptions()) == {"content_invariant", "length_invariant"}
