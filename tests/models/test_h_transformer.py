"""H-Transformer-1D: which level a pair meets at, counts under masks, and why the package is no oracle."""

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.h_transformer import hierarchical_attention, pair_means

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=64):
    return torch.randn(3, 2, 2, length, 8, dtype=torch.float64).unbind(0)


def test_weights_sum_to_one_at_every_length_and_under_every_mask():
    for length in (1, 2, 9, 31, 32, 33, 64, 65, 100):
        q, k, v = qkv(length)
        mask = torch.rand(2, length) < 0.6
        mask[:, length // 2] = True
        for m in (None, mask):
            found = hierarchical_attention(3 * q, 3 * k, torch.ones_like(v), m, block_size=4)
            torch.testing.assert_close(found, torch.ones_like(v), **EXACT)


def test_a_far_key_is_seen_through_the_mean_of_its_cell_alone():
    q, k, v = qkv()
    other = k.clone()
    other[:, :, 20] += 1.0
    other[:, :, 21] -= 1.0  # the mean of cell 10 of level 1 stays
    moved = hierarchical_attention(q, other, v, block_size=4) - hierarchical_attention(q, k, v, block_size=4)
    moved = moved.abs().amax(dim=(0, 1, 3))
    assert moved[:16].max() < 1e-12 < 1e-4 < moved[16:28].min()  # blocks 4, 5 and 6 see the two tokens


def test_a_query_moves_the_outputs_of_its_coarsest_cell_alone():
    q, k, v = qkv()
    before = hierarchical_attention(q, k, v, block_size=4)
    q[:, :, 20] += 1.0
    moved = (hierarchical_attention(q, k, v, block_size=4) - before).abs().amax(dim=(0, 1, 3))
    assert (moved > 1e-6).nonzero().flatten().tolist() == list(range(16, 24))  # 8 tokens at level 3


def test_a_mean_counts_as_often_as_it_has_real_tokens():
    _, _, v = qkv()
    zeros, mask = torch.zeros_like(v), torch.rand(2, 64) < 0.5
    mask[:, 0] = True
    found = hierarchical_attention(zeros, zeros, v, mask, block_size=2)
    real = mask[:, None, :, None]
    expected = ((v * real).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True)).expand_as(v)
    torch.testing.assert_close(found, expected, **EXACT)


def test_pair_means_are_over_real_tokens():
    x, count = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 1, 6, 1), torch.tensor([[1.0, 0, 1, 3, 0, 0]])
    means, total = pair_means(x, count)
    assert means.flatten().tolist() == [1.0, (3 + 3 * 4) / 4, 0.0]
    assert total.tolist() == [[1.0, 4.0, 0.0]]


def test_scores_far_apart_stay_finite_in_float32():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = hierarchical_attention(100 * q, 100 * k, v, block_size=4)
    out.square().sum().backward()
    assert all(t.isfinite().all() for t in (out, q.grad, k.grad, v.grad))
    peaked = hierarchical_attention(100 * q[:, :, :8], 100 * k[:, :, :8], v[:, :, :8], block_size=4)
    expected = dense_attention(100 * q[:, :, :8], 100 * k[:, :, :8], v[:, :, :8])
    torch.testing.assert_close(peaked, expected, rtol=0, atol=1e-3)  # scores of 1e4 keep three digits


def test_dropout_leaves_the_normaliser_whole():
    """Of three equal weights a third each is dropped or doubled: sums of 0, 2/3, 4/3 or 2, one on average."""
    q, v = torch.zeros(4000, 1, 3, 2), torch.ones(4000, 1, 3, 2)
    found = hierarchical_attention(q, q, v, block_size=4, dropout=0.5)
    torch.testing.assert_close(found * 1.5, (found * 1.5).round(), rtol=0, atol=1e-5)
    assert found.mean().item() == pytest.approx(1.0, abs=0.03)  # five standard errors


def test_dropout_changes_no_mean_at_any_level():
    q, k, v = (x[:1, :1] for x in qkv(20))
    many = (x.expand(10_000, 1, 20, 8) for x in (q, k, v))
    found = hierarchical_attention(*many, block_size=2, dropout=0.3)
    expected = hierarchical_attention(q, k, v, block_size=2)[0]
    error = (found.mean(dim=0) - expected).abs() / (found.std(dim=0) / 100)
    assert error.max() < 5  # standard errors


def test_dropout_acts_at_every_level():
    q, k, v = qkv()
    assert not hierarchical_attention(q, k, v, block_size=4, dropout=1.0).any()


def test_scores_past_the_range_of_float16_stay_finite():
    q, k, v = (1000 * x.half() for x in qkv())
    out = hierarchical_attention(q, k, v, block_size=4)
    assert out.dtype == torch.float16 and out.isfinite().all()


def test_state_is_keys_and_values_of_all_levels():
    module = build("h_transformer", Place(d_model=16, num_heads=2, max_len=64), block_size=4)
    assert module.state_size(64) == 2 * (64 + 32 + 16 + 8) * 16


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = hierarchical_attention(q, k, v, torch.tensor([[True] * 64, [False] * 64]), block_size=4)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradcheck():
    mask = torch.arange(9) < torch.tensor([9, 6])[:, None]
    leaves = [x[:, :1, :, :3].clone().requires_grad_() for x in qkv(9)]
    attend = lambda q, k, v: hierarchical_attention(q, k, v, mask, block_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_autocast_leaves_the_sums_in_float32():
    q, k, v = (x.float() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        found = hierarchical_attention(q, k, v, block_size=4)
    torch.testing.assert_close(found, hierarchical_attention(q, k, v, block_size=4), rtol=0, atol=1e-5)


def test_the_package_is_no_oracle():
    """h-transformer-1d 0.1.9 lacks the coarsest level, and its weights do not sum to one."""
    package = pytest.importorskip("h_transformer_1d.h_transformer_1d", exc_type=ImportError)
    layer = package.HAttention1D(16, heads=2, dim_head=8, block_size=4).double()
    with torch.no_grad():
        layer.to_out.weight.copy_(torch.eye(16))
        layer.to_out.bias.zero_()
        layer.to_qkv.weight[32:].copy_(torch.eye(16))  # values are the inputs
        x = torch.randn(1, 64, 16, dtype=torch.float64)
        other = torch.where(torch.arange(64)[:, None] < 32, x, 5.0)
        torch.testing.assert_close(layer(x)[:, :32], layer(other)[:, :32], **EXACT)  # half sees itself alone
        assert (layer(torch.ones_like(x)) - 1).abs().max() > 0.5


@pytest.mark.parametrize("block_size", [0, 1, 5, -2])
def test_blocks_that_have_no_halves_are_refused(block_size):
    with pytest.raises(ValueError, match=f"even block_size >= 2, got {block_size}"):
        build("h_transformer", Place(d_model=8, num_heads=2, max_len=30), block_size=block_size)
