"""Norms and feed-forward that the backbone and whole blocks share."""

import pytest
import torch
from torch import nn

from models.layers import BatchNorm, FeedForward, ScaleNorm, hashed_dropout, make_norm


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


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_hashed_dropout_drops_its_share_without_a_pattern(rate):
    """Shares and correlations within five standard errors; a hash that is poor shows tens of them."""
    rows, width, calls = 256, 128, 12
    error, before = (rows * width) ** -0.5, None
    generator = torch.Generator().manual_seed(3)
    for _ in range(calls):
        seed = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, generator=generator)
        out = hashed_dropout(torch.ones(rows, width), rate, seed)
        assert out.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        drawn = ((out == 0).float() - rate) / (rate * (1 - rate)) ** 0.5
        flat = drawn.flatten()
        found = [drawn.mean(), *((flat[:-k] * flat[k:]).mean() for k in (1, 2, 64, width, 2 * width))]
        found += [] if before is None else [(before * drawn).mean()]
        assert max(abs(x.item()) for x in found) < 5 * error
        assert drawn.mean(0).abs().max() < 5 * rows**-0.5 and drawn.mean(1).abs().max() < 5.5 * width**-0.5
        before = drawn


def test_hashed_dropout_has_the_gradient_of_what_it_kept_and_traces_with_any_number_of_rows():
    forms = []

    def backend(graph, inputs):
        forms.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(hashed_dropout, backend=backend, fullgraph=True)
    for rows in (7, 300):
        x = torch.randn(rows, 6, requires_grad=True)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        seed = torch.ops.lra.dropout_seed(x)
        out = compiled(x, 0.25, seed)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(out, hashed_dropout(x, 0.25, seed))
        assert torch.equal(gradient, torch.where(out == 0, 0.0, torch.tensor(1 / 0.75)))
    assert len(forms) == 1


def test_seeds_of_hashed_dropout_follow_the_generator():
    torch.manual_seed(5)
    first, second = (torch.ops.lra.dropout_seed(torch.zeros(1)) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(torch.ops.lra.dropout_seed(torch.zeros(1)), first) and not torch.equal(first, second)
