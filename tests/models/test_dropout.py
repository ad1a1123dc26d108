"""Dropout by a hash: its masks, its key, and where it stands in for torch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.dropout import Dropout, dropout, hashed_dropout, kept, new_key, threshold

NUM = 2**18


def keys(num):
    return [new_key(torch.device("cpu")) for _ in range(num)]


def dropped(key, p, shape=(NUM,)):
    return ~kept(key, torch.Size(shape), p)


def correlation(a, b, p):
    """Of two masks of one probability, in standard deviations of what independent ones have."""
    together = (a.double() - p) * (b.double() - p)
    return together.sum().item() / (p * (1 - p) * math.sqrt(a.numel()))


def triple32(position, key):
    """The hash in Python's whole numbers, from its source, with the key put in around the first product."""
    state = (position ^ key[0]) % 2**32
    state = ((state ^ state >> 17) * 0xED5AD4BB + key[1]) % 2**32
    state = (state ^ state >> 11) * 0xAC4C1B51 % 2**32
    return (state ^ state >> 15) * 0x31848BAB % 2**32


def two_rounds_kept(key, shape, p):
    """By lowbias32, a hash of two multiplications."""
    state = torch.arange(shape[0], dtype=torch.int32) ^ key[0]
    state = (state ^ (state >> 16 & 0xFFFF)) * 0x7FEB352D + key[1]
    return (state ^ (state >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32) >= threshold(p)


def compiled(call):
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")


def test_the_hash_is_that_of_unsigned_32_bit_numbers():
    p, places = 0.3, range(2**16 - 50, 2**16 + 50)
    drawn = keys(6)
    assert {key[0].item() < 0 for key in drawn} == {True, False}
    for key in drawn:
        found = kept(key, torch.Size([places.stop]), p)[places.start :].tolist()
        hashes = [triple32(place, key.tolist()) for place in places]
        # The comparison is one of signed numbers, which puts the upper half of the unsigned ones first.
        assert found == [(number + 2**31) % 2**32 >= round(p * 2**32) for number in hashes]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_fraction_that_is_dropped_is_the_probability(p):
    away = [(dropped(key, p).sum().item() - p * NUM) / math.sqrt(p * (1 - p) * NUM) for key in keys(20)]
    assert max(map(abs, away)) < 4.5
    assert 0.5 < torch.tensor(away).std() < 1.6  # as spread as counts of independent draws are


def test_what_is_kept_is_scaled_to_the_same_mean():
    x = torch.rand(64, 33, dtype=torch.float64)
    out = hashed_dropout(x, 0.2)
    torch.testing.assert_close(out[out != 0], (x / 0.8)[out != 0], rtol=1e-15, atol=0)
    assert 0.1 < (out == 0).double().mean() < 0.3


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_an_element_is_dropped_whatever_becomes_of_its_neighbours(p):
    found = []
    for key in keys(4):
        mask = dropped(key, p)
        steps = (1, 2, 3, 4, 8, 16, 31, 32, 33, 63, 64, 65, 128, 256, 1024, 2**16, 2**17)
        found += [correlation(mask[step:], mask[:-step], p) for step in steps]
    assert max(map(abs, found)) < 4.5
    assert torch.tensor(found).std() < 1.5


def test_over_many_keys_elements_far_apart_are_dropped_independently_as_those_of_two_rounds_are_not():
    torch.manual_seed(0)
    found, drawn, num = {}, keys(6), 2**21
    for draw in (two_rounds_kept, kept):
        masks = [~draw(key, torch.Size([num]), 0.5) for key in drawn]
        for step in (1024, 8192):
            alike = [(mask[step:] == mask[:-step]).count_nonzero().item() for mask in masks]
            total = len(drawn) * (num - step)
            found[draw, step] = abs(2 * sum(alike) - total) / math.sqrt(total)  # in standard deviations
    assert found[two_rounds_kept, 8192] > 8
    assert max(found[kept, 1024], found[kept, 8192]) < 4


@pytest.mark.parametrize("width", [8, 64])
def test_rows_drop_binomial_numbers_of_elements(width):
    p, rows = 0.1, NUM // width
    choices = [math.comb(width, i) * p**i * (1 - p) ** (width - i) * rows for i in range(width + 1)]
    expected = torch.tensor(choices, dtype=torch.float64)
    likely = expected > 5
    for key in keys(4):
        counts = torch.bincount(dropped(key, p, (rows, width)).sum(1), minlength=width + 1)
        chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
        degrees = likely.sum().item() - 1
        assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_calls_draw_masks_that_do_not_depend_on_each_other():
    masks = [dropped(key, 0.1) for key in keys(8)]
    found = [correlation(masks[i], masks[j], 0.1) for i in range(8) for j in range(i)]
    assert max(map(abs, found)) < 4.5


def test_keys_that_share_their_first_number_draw_other_masks():
    first, second = (torch.stack([torch.tensor(5, dtype=torch.int32), key[1]]) for key in keys(2))
    assert abs(correlation(dropped(first, 0.1), dropped(second, 0.1), 0.1)) < 4.5


def test_the_seed_of_torch_decides_the_mask():
    x, found = torch.ones(1000), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(hashed_dropout(x, 0.5))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_the_gradient_has_the_mask_of_the_output():
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    again = lambda x, p: checkpoint(hashed_dropout, x, p, use_reentrant=False)  # noqa: E731
    for call in (hashed_dropout, compiled(hashed_dropout), compiled(again)):
        out = call(x, 0.3)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, out.detach()) and 0 < (grad == 0).sum() < 1000


def test_a_layer_that_is_computed_again_draws_the_same_mask():
    x = torch.ones(500, dtype=torch.float64, requires_grad=True)

    def twice(x):
        return hashed_dropout(hashed_dropout(x, 0.3).sin(), 0.3)

    found = []
    for call in (twice, lambda x: checkpoint(twice, x, use_reentrant=False)):
        torch.manual_seed(3)
        out = call(x)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), x)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_two_dropouts_of_a_compiled_graph_draw_two_masks():
    a, b = compiled(lambda x: (hashed_dropout(x, 0.5), hashed_dropout(x, 0.5)))(torch.ones(1000))
    assert not torch.equal(a, b)


def test_one_trace_serves_any_number_of_rows():
    call = compiled(hashed_dropout)
    for rows in (40, 41, 97):
        torch.manual_seed(rows)
        found = call(torch.ones(rows, 6), 0.4)
        torch.manual_seed(rows)
        assert torch.equal(found, hashed_dropout(torch.ones(rows, 6), 0.4))


@pytest.mark.parametrize("p", [1e-12, 1 - 1e-12])
def test_thresholds_are_32_bit_numbers_at_the_ends(p):
    assert -(2**31) <= threshold(p) < 2**31


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_on_a_cpu_it_is_the_dropout_of_torch(p):
    x, found = torch.ones(300), []
    for call in (Dropout(p), nn.Dropout(p), compiled(Dropout(p)), lambda x: F.dropout(x, p)):
        torch.manual_seed(4)
        found.append(call(x))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(Dropout(p).eval()(x), x)


def test_the_module_shows_its_probability_and_has_no_state():
    assert repr(Dropout(0.25)) == "Dropout(p=0.25)"
    assert not Dropout(0.25).state_dict()
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_on_a_gpu_without_a_compiler_it_is_the_dropout_of_torch_bit_by_bit(p):
    x, found = torch.randn(3000, device="cuda"), []
    for call in (dropout, F.dropout):
        torch.manual_seed(4)
        found.append(call(x, p))
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_compiled_on_a_gpu_it_keeps_all_or_nothing_at_the_ends(p):
    torch._dynamo.reset()
    x = torch.randn(3000, device="cuda", requires_grad=True)
    out = torch.compile(lambda x: dropout(x, p), fullgraph=True)(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x * (1 - p)) and torch.equal(grad, torch.full_like(x, 1 - p))
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_compiled_step_in_a_captured_graph_draws_anew_with_one_mask_for_both_passes(dtype):
    torch._dynamo.reset()
    call = torch.compile(lambda x: F.layer_norm(x, (64,)) + dropout(x, 0.1), fullgraph=True)
    x = torch.ones(4096, 64, device="cuda", dtype=dtype, requires_grad=True)  # its normalised rows are zeros

    def step():
        out = call(x)
        return out, torch.autograd.grad(out.sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        out, grad = step()
    for _ in range(2):
        graph.replay()
        found.append(out != 0)
        assert torch.equal(grad.abs() > 0.5, found[-1])
        assert abs(found[-1].double().mean().item() - 0.9) < 4.5 * math.sqrt(0.09 / x.numel())
    assert abs(correlation(~found[0].flatten(), ~found[1].flatten(), 0.1)) < 4.5
    torch._dynamo.reset()
