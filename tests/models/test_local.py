"""Local attention: dense attention under a band, without a length by length matrix."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import Place, build
from models.common import dense_attention
from models.local import PATTERNS, local_attention

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


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 28, 29, 30, 57, 58, 100])
def test_equals_dense_attention_under_the_band(pattern, window):
    q, k, v = qkv()
    mask = torch.arange(29) < torch.tensor([29, 11])[:, None]
    allowed = band(29, window, pattern) & mask[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed.expand(2, 2, 29, 29))
    found = local_attention(q, k, v, mask, window=window, pattern=pattern)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1, :, :11], expected[1, :, :11], **EXACT)


@pytest.mark.parametrize(("pattern", "window"), [("sliding", 58), ("block", 29), ("neighbours", 29)])
def test_wide_window_gives_dense_attention(pattern, window):
    q, k, v = qkv()
    found = local_attention(q, k, v, window=window, pattern=pattern)
    torch.testing.assert_close(found, dense_attention(q, k, v), **EXACT)


def test_sliding_window_of_one_gives_the_values():
    q, k, v = qkv()
    torch.testing.assert_close(local_attention(q, k, v, window=1), v, **EXACT)


@pytest.mark.parametrize("length", [28, 29])
@pytest.mark.parametrize(
    ("pattern", "window", "options"),
    [
        ("block", 7, {"look_backward": 0, "look_forward": 0}),
        ("neighbours", 7, {"look_backward": 1, "look_forward": 1}),
        ("sliding", 14, {"look_backward": 1, "look_forward": 1, "exact_windowsize": True}),
    ],
)
def test_parity_with_the_local_attention_package(pattern, window, options, length):
    package = pytest.importorskip("local_attention", exc_type=ImportError)
    oracle = package.LocalAttention(7, autopad=True, use_rotary_pos_emb=False, **options)
    q, k, v = qkv(length)
    mask = torch.arange(length) < torch.tensor([length, 16])[:, None]
    found = local_attention(q, k, v, mask, window=window, pattern=pattern)
    expected = oracle(q, k, v, mask=mask)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1, :, :16], expected[1, :, :16], **EXACT)


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


@pytest.mark.parametrize("pattern", PATTERNS)
def test_memory_grows_with_length_and_not_with_its_square(pattern):
    peaks = []
    for length in (500, 1000, 2000):
        q, k, v = qkv(length)
        with LargestTensor() as seen:
            local_attention(q, k, v, window=16, pattern=pattern)
        peaks.append(seen.elements)
        assert seen.elements <= 4 * length * 4 * 16  # heads and rows, keys seen per query
    assert all(after < 2.1 * before for before, after in pairwise(peaks))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_row_without_real_keys_gives_zeros_and_finite_gradients(pattern):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = local_attention(q, k, v, torch.tensor([[True] * 29, [False] * 29]), window=6, pattern=pattern)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck(pattern):
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    leaves = [x.requires_grad_() for x in qkv(length=5)]
    attend = lambda q, k, v: local_attention(q, k, v, mask, window=2, pattern=pattern)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("pattern", PATTERNS)
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
@pytest.mark.parametrize("pattern", PATTERNS)
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
