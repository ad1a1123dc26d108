"""The recurrences that mechanisms share equal a loop over positions, in values and gradients."""

import numpy
import pytest
import torch

from models.directions import both_directions, short_conv
from models.fft_conv import fast_size, fft_conv
from models.scan import decayed_attention, matrix_scan, scan
from models.ssm import exponential_kernel, held_input


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loop(decay, update):
    """h_t = decay_t h_{t-1} + update_t over dimension 1."""
    state, states = torch.zeros_like(update[:, 0]), []
    for t in range(update.shape[1]):
        state = decay[:, t] * state + update[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def attention_loop(q, k, v, log_decay):
    b, length, h, d = q.shape
    state, out = q.new_zeros(b, h, d, v.shape[-1]), []
    for t in range(length):
        state = log_decay[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(out, dim=1)


def same_with_gradients(found, expected, *inputs):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weight = draw(*found.shape, seed=9, dtype=found.dtype)
    pairs = [torch.autograd.grad((out * weight).abs().square().sum(), inputs) for out in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 64, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_scan_equals_the_loop(length, dtype):
    decay = (draw(2, length, 3, 1, dtype=dtype) * 0.4).requires_grad_()
    update = draw(2, length, 3, 4, seed=1, dtype=dtype).requires_grad_()
    same_with_gradients(scan(decay, update), loop(decay, update), decay, update)


def test_a_real_decay_may_move_a_complex_state():
    decay = draw(2, 9, 3).sigmoid().requires_grad_()
    update = draw(2, 9, 3, seed=1, dtype=torch.complex128).requires_grad_()
    same_with_gradients(scan(decay, update), loop(decay, update), decay, update)


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_a_scan_of_matrices_equals_the_loop(length):
    transition = (draw(2, 3, length, 4, 4) * 0.3).requires_grad_()
    update = draw(2, 3, length, 4, 5, seed=1).requires_grad_()
    state, states = torch.zeros_like(update[:, :, 0]), []
    for n in range(length):
        state = transition[:, :, n] @ state + update[:, :, n]
        states.append(state)
    same_with_gradients(matrix_scan(transition, update), torch.stack(states, dim=2), transition, update)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("scale", [0.1, 5.0, 400.0])
def test_decayed_attention_equals_the_loop(length, width, scale):
    q, k, v = draw(3, 2, length, 3, 4)
    log_decay = -scale * draw(2, length, 3, width, seed=1).abs()
    q, k, v, log_decay = (x.clone().requires_grad_() for x in (q, k, v, log_decay))
    decay = log_decay.expand(2, length, 3, 4)
    same_with_gradients(
        decayed_attention(q, k, v, log_decay), attention_loop(q, k, v, decay), q, k, v, log_decay
    )


@pytest.mark.parametrize("width", [1, 4])
def test_decays_that_underflow_give_finite_gradients_in_single_precision(width):
    q, k, v = draw(3, 1, 200, 1, 4, dtype=torch.float32)
    log_decay = torch.where(torch.arange(200) % 7 == 3, -1e4, -1e-3)[None, :, None, None].float()
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay.expand(1, 200, 1, width))]
    decayed_attention(*leaves).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("width", [1, 4])
def test_autocast_leaves_products_of_decayed_attention_in_float32(width):
    q, k, v = draw(3, 2, 150, 3, 4, dtype=torch.float32)
    leaves = [q, k, v, -draw(2, 150, 3, width, seed=1, dtype=torch.float32).abs()]
    leaves = [x.clone().requires_grad_() for x in leaves]
    expected = decayed_attention(*(x.double() for x in leaves))
    with torch.autocast("cpu", torch.bfloat16):
        found = decayed_attention(*leaves)
        assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weight = draw(2, 150, 3, 4, seed=9)
    pairs = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_retention_like_decays_may_be_shared_by_the_batch():
    q, k, v = draw(3, 2, 150, 3, 4)
    log_decay = -draw(1, 150, 3, 1, seed=1).abs()
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay)]
    whole = leaves[3].expand(2, 150, 3, 4)
    same_with_gradients(decayed_attention(*leaves), attention_loop(*leaves[:3], whole), *leaves)


@pytest.mark.parametrize("length", [1, 2, 5, 31, 64])
@pytest.mark.parametrize(("taps", "taps_back"), [(1, None), (3, None), (200, None), (5, 200), (200, 1)])
def test_the_fft_convolution_equals_the_explicit_sum_and_never_wraps(length, taps, taps_back):
    x, kernel = draw(2, length, 3).requires_grad_(), draw(3, taps, seed=1).requires_grad_()
    back = None if taps_back is None else draw(3, taps_back, seed=2).requires_grad_()
    matrix = torch.zeros(3, length, length, dtype=torch.float64)
    for t in range(length):
        for s in range(length):
            if 0 <= t - s < taps:
                matrix[:, t, s] = kernel[:, t - s]
            elif back is not None and 0 <= s - t - 1 < taps_back:
                matrix[:, t, s] = back[:, s - t - 1]
    expected = torch.einsum("cts,bsc->btc", matrix, x)
    leaves = [x, kernel] if back is None or length == 1 else [x, kernel, back]
    same_with_gradients(fft_conv(x, kernel, back), expected, *leaves)


@pytest.mark.parametrize("part", [500, 1])  # of 160 numbers a channel: groups of three channels, of one
def test_a_long_convolution_in_parts_is_the_same(monkeypatch, part):
    leaves = [draw(2, 40, 7), draw(7, 40, seed=1), draw(7, 39, seed=2)]  # x, kernel, back
    leaves = [leaf.requires_grad_() for leaf in leaves]
    whole = fft_conv(*leaves)
    gradients = torch.autograd.grad(whole.pow(3).sum(), leaves)
    monkeypatch.setattr("models.fft_conv.PART", part)
    found = fft_conv(*leaves)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found.pow(3).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


def test_fast_sizes_are_even_and_hardly_larger_than_asked_for():
    for least in range(1, 3000):
        assert fast_size(least) % 2 == 0
        assert least <= fast_size(least) <= max(2, 1.25 * least + 2)


def one_way(x, log_decay):
    return scan(log_decay.exp(), x)


def test_a_padded_row_is_reversed_among_its_real_tokens_alone():
    x, log_decay = draw(3, 12, 4), -draw(3, 12, 4, seed=1).abs()
    real = [12, 5, 1]
    mask = torch.arange(12) < torch.tensor(real)[:, None]
    there, back = both_directions(one_way, (x, log_decay), mask)
    for row, length in enumerate(real):
        alone, decay = x[row : row + 1, :length], log_decay[row : row + 1, :length]
        torch.testing.assert_close(there[row : row + 1, :length], one_way(alone, decay))
        flipped = one_way(alone.flip(1), decay.flip(1)).flip(1)
        torch.testing.assert_close(back[row : row + 1, :length], flipped)


def test_streams_of_the_way_back_are_zeroed_at_padding_too():
    x, decay, other = draw(2, 6, 4), -draw(2, 6, 4, seed=1).abs(), -draw(2, 6, 4, seed=2).abs()
    mask = torch.arange(6) < torch.tensor([6, 3])[:, None]
    poisoned = [torch.where(mask[..., None], part, 1e4) for part in (x, other)]
    for back in (None, one_way):
        clean = both_directions(one_way, (x, decay), mask, back=back, back_streams=(x, other))
        found = both_directions(one_way, (x, decay), mask, back=back, back_streams=poisoned)
        torch.testing.assert_close(found[1][mask], clean[1][mask], rtol=0, atol=0)
        alone = one_way(x[1:, :3].flip(1), other[1:, :3].flip(1)).flip(1)
        torch.testing.assert_close(found[1][1:, :3], alone)


def test_each_direction_may_have_its_own_recurrence_and_streams():
    x, decay, other = draw(2, 6, 4), -draw(2, 6, 4, seed=1).abs(), -draw(2, 6, 4, seed=2).abs()
    tied = both_directions(one_way, (x, decay), back_streams=(x, other))
    untied = both_directions(one_way, (x, decay), back=lambda *s: 2 * one_way(*s), back_streams=(x, other))
    torch.testing.assert_close(untied[0], tied[0])
    torch.testing.assert_close(untied[1], 2 * tied[1])
    torch.testing.assert_close(tied[1], one_way(x.flip(1), other.flip(1)).flip(1))


def test_the_short_convolution_looks_at_the_past_alone():
    x, weight, bias = draw(2, 9, 3), draw(3, 4, seed=1), draw(3, seed=2)
    for t in range(9):
        expected = bias + sum(weight[:, j] * x[:, t - j] for j in range(4) if t - j >= 0)
        torch.testing.assert_close(short_conv(x, weight, bias)[:, t], expected)


@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_the_short_convolution_of_two_sets_of_weights_has_the_gradients_of_its_sum(length):
    x, weight = draw(2, 3, length, 5).requires_grad_(), draw(2, 1, 5, 4, seed=1).requires_grad_()
    rows = [
        sum((weight[..., j] * x[:, :, t - j] for j in range(min(4, t + 1))), torch.zeros(2, 3, 5).double())
        for t in range(length)
    ]
    same_with_gradients(short_conv(x, weight), torch.stack(rows, dim=2), x, weight)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_an_exponential_kernel_equals_its_sum(length, dtype):
    weights = draw(3, 5, dtype=dtype).requires_grad_()
    log_factors = draw(3, 5, seed=1, dtype=dtype)
    log_factors = (log_factors - 2 - log_factors.real.clamp_min(0)).requires_grad_()
    steps = torch.arange(length, dtype=torch.float64)
    expected = (weights[..., None] * (log_factors[..., None] * steps).exp()).sum(1).real
    same_with_gradients(exponential_kernel(weights, log_factors, length), expected, weights, log_factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("wide", [False, True])
def test_the_angles_of_an_exponential_kernel_are_taken_in_float64(dtype, wide):
    """Log factors may be wider than the weights, and real or complex by themselves."""
    weights, log_factors = draw(3, 4, dtype=dtype), -3 * draw(3, 4, seed=1, dtype=dtype).abs()
    log_factors = (
        torch.complex(0 * log_factors - 1e-4, log_factors) if dtype.is_complex else 1e-4 * log_factors
    )
    exact = exponential_kernel(weights + 0 * draw(1), log_factors + 0 * draw(1), 16_384)
    assert exact.dtype == torch.float64
    found = exponential_kernel(weights, log_factors + 0 * draw(1) if wide else log_factors, 16_384)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 4e-7 * exact.abs().max()  # found 1e-7; angles in float32: 2e-4


def test_a_held_input_has_its_limit_at_zero_and_no_seam():
    z = torch.tensor([0, 1e-12, 1e-5j, -0.00999, 0.00999j, -0.01001, 0.01001j, 0.5 + 3j, -40])
    z = z.to(torch.complex128).requires_grad_()
    nodes, weights = numpy.polynomial.legendre.leggauss(60)  # the integral of exp(z s) over s from 0 to 1
    s, weights = torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)
    expected = ((z[:, None] * s).exp() * weights).sum(-1)
    same_with_gradients(held_input(z), expected, z)
