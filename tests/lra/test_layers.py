"""Norms and feed-forward that the backbone and whole blocks share."""

import pytest
import torch
from torch import nn

from models.layers import BatchNorm, FeedForward, ScaleNorm, make_norm


def test_batch_norm_over_real_tokens_ignores_padding():
    norm = BatchNorm(4)
    x = torch.randn(3, 7, 4)
    real = torch.arange(7) < torch.tensor([[7], [3], [1]])
    poisoned = torch.where(real[..., None], x, 1e4)
    torch.testing.assert_close(norm(x, real)[real], norm(poisoned, real)[real])


def test_batch_norm_over_real_tokens_equals_torch_on_those_tokens():
    ours, theirs = BatchNorm(4), nn.BatchNorm1d(4)
    x = torch.randn(3, 7, 4)
    real = torch.arange(7) < torch.tensor([[7], [3], [1]])
    torch.testing.assert_close(ours(x, real)[real], theirs(x[real]))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x, real)[real], theirs.eval()(x[real]))


def test_batch_norm_over_all_positions_equals_torch_on_the_padded_batch():
    ours, theirs = BatchNorm(4, stats="all"), nn.BatchNorm1d(4)
    x = torch.randn(3, 7, 4)
    real = torch.arange(7) < torch.tensor([[7], [3], [1]])
    torch.testing.assert_close(ours(x, real), theirs(x.transpose(1, 2)).transpose(1, 2))


def test_scale_norm_makes_the_root_mean_square_the_scale():
    norm = ScaleNorm(8, eps=0.0)
    nn.init.constant_(norm.scale, 3.0)
    rms = norm(torch.randn(5, 8)).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full((5,), 3.0))


def test_gated_feed_forward_multiplies_value_by_activated_gate():
    ffn = FeedForward(4, 6, activation="silu", glu=True)
    x = torch.randn(2, 4)
    value, gate = (x @ ffn.up.weight.T + ffn.up.bias).split(6, dim=-1)
    expected = (value * gate * torch.sigmoid(gate)) @ ffn.down.weight.T + ffn.down.bias
    torch.testing.assert_close(ffn(x), expected)


@pytest.mark.parametrize("make", [lambda: make_norm("bach", 4), lambda: FeedForward(4, 4, activation="gulu")])
def test_an_unknown_kind_is_refused(make):
    with pytest.raises(ValueError, match="choose from"):
        make()
