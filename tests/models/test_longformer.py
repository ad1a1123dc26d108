"""Longformer: its window, its global tokens and their projections."""

import pytest
import torch

from lra.backbone import initialise
from models import Place, build
from models.local import local_attention
from models.longformer import longformer_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=29):
    return torch.randn(3, 2, 2, length, 4, dtype=torch.float64).unbind(0)


def layer(**own):
    return build("longformer", Place(d_model=8, num_heads=2, max_len=60), **own)


@pytest.mark.parametrize("window", [1, 2, 7, 16, 40, 100])
def test_without_global_tokens_it_is_sliding_local_attention(window):
    q, k, v = qkv()
    mask = torch.arange(29) < torch.tensor([29, 11])[:, None]
    expected = local_attention(q, k, v, mask, window=window)
    found = longformer_attention(q, k, v, mask, window=window)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1, :, :11], expected[1, :, :11], **EXACT)


@pytest.mark.parametrize("window", [2, 6, 40])
def test_even_window_of_the_released_benchmark_has_one_key_fewer_before_the_query(window):
    """Its code joins diagonals 0 to -(w - w // 2 - 1) and 1 to w // 2: w keys, where the paper has w + 1."""
    length = 50
    seen = sum(torch.diag(torch.ones(length - i), -i) for i in range(window - window // 2))
    seen = (seen + sum(torch.diag(torch.ones(length - i), i) for i in range(1, window // 2 + 1))).bool()
    assert (seen.sum(dim=1) == window).sum() == max(0, length - window + 1)
    q, k, v = qkv(length)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    found = longformer_attention(q, k, v, window=window, even_window=True)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_global_token_within_the_window_counts_once():
    q, k, v = qkv(5)
    found = longformer_attention(q, k, v, window=4, of_global=(q[:, :, :1], k, v))[:, :, 1]
    expected = (q[:, :, 1:2] @ k[:, :, :4].mT / 2).softmax(dim=-1) @ v[:, :, :4]
    torch.testing.assert_close(found, expected[:, :, 0], **EXACT)


def test_global_projections_act_on_global_tokens_alone():
    mechanism, x = layer(window=4, num_global=2).double(), torch.randn(1, 20, 8, dtype=torch.float64)
    before = mechanism(x)
    with torch.no_grad():
        mechanism.q_global.weight.normal_()
        mechanism.kv_global.weight.normal_()
    moved = (mechanism(x) - before).abs().amax(dim=-1)[0]
    assert (moved[:2] > 1e-3).all()
    assert not moved[2:].any()


def test_an_even_window_keeps_one_key_fewer():
    """2 numbers, key and value, of 8 for each key: of 6, and of 7 of the paper's window."""
    for even_window, seen in ((True, 6), (False, 7)):
        assert layer(window=6, num_global=0, even_window=even_window).state_size(50) == 2 * 8 * seen


@pytest.mark.parametrize("init", ["torch", "xavier"])
def test_global_projections_are_copies_unless_the_backbone_draws_them(init):
    mechanism = layer(num_global=2)
    initialise(mechanism, init)
    copied = torch.equal(mechanism.q_global.weight, mechanism.qkv.weight[:8])
    assert copied == (init == "torch")


def test_global_projections_start_as_the_others():
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    mechanism = layer(window=4, num_global=2).double()
    q, k, v = mechanism.project(mechanism.qkv, x)
    expected = longformer_attention(q, k, v, window=4, of_global=(q[:, :, :2], k, v))
    torch.testing.assert_close(mechanism(x), mechanism.out(expected.transpose(1, 2).flatten(2)), **EXACT)


def test_no_global_tokens_means_no_global_projections():
    assert {name.split(".")[0] for name, _ in layer(num_global=0).named_parameters()} == {"qkv", "out"}


@pytest.mark.parametrize("num_global", [1, 5, 60])
def test_lengths_up_to_the_number_of_global_tokens_work(num_global):
    mechanism = layer(window=4, num_global=num_global)
    for length in (1, 4, 5, 6, 17, 60):
        assert mechanism(torch.randn(2, length, 8)).shape == (2, length, 8)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.tensor([[True] * 29, [False] * 29])
    out = longformer_attention(q, k, v, mask, window=6, of_global=(q[:, :, :2], k, v))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("num_global", [0, 2])
def test_gradcheck(num_global):
    mask = torch.arange(20) < torch.tensor([20, 9])[:, None]
    leaves = [x.requires_grad_() for x in (*qkv(20), *qkv(20))]

    def attend(q, k, v, *others):
        of_global = (others[0][:, :, :num_global], *others[1:]) if num_global else None
        return longformer_attention(q, k, v, mask, window=4, of_global=of_global)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_dropout_acts_on_weights_and_in_training_only():
    for num_global in (0, 20):  # windows, global rows
        mechanism, x = layer(window=4, num_global=num_global, attn_dropout=0.5), torch.randn(2, 20, 8)
        assert not torch.equal(mechanism(x), mechanism(x))
        mechanism.eval()
        assert torch.equal(mechanism(x), mechanism(x))


@pytest.mark.parametrize("own", [{"window": 0}, {"num_global": -1}, {"window": 5, "even_window": True}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="longformer"):
        layer(**own)
