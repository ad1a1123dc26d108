"""Packed sequences as one row: every row has its place, and recurrences start anew with each sequence."""

import logging

import pytest
import torch

from models import Place, build, fla_kernels
from models.directions import packed_directions, short_conv
from models.long_row import LongRow
from models.scan import Starts, decayed_attention, entering, matrix_scan, scan

LENGTHS = (5, 70, 0, 64, 1, 9)
FILLER = 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def packed(*, chunk=1, gap=0):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    num_rows = sum(LENGTHS) + FILLER
    return LongRow.of(cu_seqlens, num_rows, max(LENGTHS), chunk=chunk, gap=gap), num_rows


def one_by_one(recurrence, *streams):
    """What `recurrence` gives for each sequence alone, [t ...], without filler."""
    parts = zip(*(x[: sum(LENGTHS)].split(LENGTHS) for x in streams), strict=True)
    return torch.cat([recurrence(*(x[None] for x in part))[0] for part in parts if part[0].shape[0]])


@pytest.mark.parametrize(("chunk", "gap"), [(1, 0), (1, 3), (8, 0), (8, 3), (64, 70)])
def test_rows_come_back_from_their_places_and_filler_has_no_gradient(chunk, gap):
    row, num_rows = packed(chunk=chunk, gap=gap)
    x = draw(num_rows, 2).requires_grad_()
    laid = row.lay_out(x)
    assert laid.shape[1] == row.num_places and laid.abs().sum(-1).count_nonzero() == sum(LENGTHS)
    real = sum(LENGTHS)
    torch.testing.assert_close(row.take_back(laid)[:real], x[:real], rtol=0, atol=0)
    weight = draw(1, row.num_places, 2, seed=1)
    (grad,) = torch.autograd.grad((laid * weight).sum(), x)
    torch.testing.assert_close(grad[:real], row.take_back(weight)[:real], rtol=0, atol=0)
    assert not grad[real:].any()


@pytest.mark.parametrize("gap", [0, 3])
def test_sequences_start_at_whole_chunks_and_gaps_follow_them(gap):
    row, num_rows = packed(chunk=8, gap=gap)
    used = row.lay_out(torch.ones(num_rows, 1))[0, :, 0].bool()
    starts = (row.where.position == 0) & row.where.real
    assert row.first[row.slot[starts] // 8].all() and not (row.slot[starts] % 8).any()
    assert all(not used[slot - gap : slot].any() for slot in row.slot[starts].tolist() if slot)
    needed = [-(-(n + gap) // 8) for n in LENGTHS]
    assert max(needed) <= row.reach and row.first.sum() == row.last.sum() == sum(n > 0 for n in needed) + 1


@pytest.mark.parametrize("reach", [1, 2, 3, 7, 20, 65, 200])
@pytest.mark.parametrize("matrices", [False, True])
def test_a_scan_of_bounded_reach_equals_the_unbounded_one(reach, matrices):
    length = 211
    fresh = torch.arange(length) % reach == 0
    if matrices:
        decay = (0.3 * draw(2, length, 3, 3)).masked_fill(fresh[:, None, None], 0).requires_grad_()
        update, run = draw(2, length, 3, 4, seed=1).requires_grad_(), matrix_scan
    else:
        decay = draw(2, length, 4, dtype=torch.complex128) / 2
        decay = decay.masked_fill(fresh[:, None], 0).requires_grad_()
        update, run = draw(2, length, 4, seed=1, dtype=torch.complex128).requires_grad_(), scan
    results = []
    for bound in (reach, None):
        states = run(decay, update, reach=bound)
        loss = (states * draw(*states.shape, seed=2)).abs().square().sum()
        results.append((states.detach(), *torch.autograd.grad(loss, (decay, update))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reach", [8, 16, 32, 512])
def test_a_sequence_as_long_as_the_reach_may_start_at_an_odd_place(reach):
    """Where pairs of positions become one, it lies in one pair more than half its length."""
    length = 2 * reach + 3
    decay, update = 0.8 + draw(1, length, 1).sigmoid() / 5, draw(1, length, 1, seed=1)
    decay[:, [0, 1, 1 + reach]] = 0
    update[:, 1 + 2 * reach :] = 0
    torch.testing.assert_close(scan(decay, update, reach=reach), scan(decay, update), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("retnet", {"directions": "untied"}),
        ("gla", {"directions": "untied"}),
        ("hgrn", {"directions": "untied"}),
        ("mamba", {}),
    ],
)
def test_packed_sequences_are_those_alone_beside_filler_of_any_size(name, own):
    """States are kept for long, so that whatever entered another sequence would show."""
    torch.manual_seed(0)
    mixer = build(name, Place(d_model=16, num_heads=2, max_len=80), **own).double()
    if name == "mamba":
        torch.nn.init.constant_(mixer.A_log, -7.0)
    x, total = draw(sum(LENGTHS) + FILLER, 16), sum(LENGTHS)
    x[total:] = 1e30
    x.requires_grad_()
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    inputs = [x, *mixer.parameters()]
    found = mixer.forward_packed(x, cu_seqlens, max(LENGTHS))[:total]
    expected = one_by_one(mixer, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    weight = draw(*found.shape, seed=2)
    pairs = [
        torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (found, expected)
    ]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "directions"), [("retnet", "tied"), ("retnet", "untied"), ("gla", "untied"), ("hgrn", "untied")]
)
def test_filler_whose_square_overflows_leaves_gradients_finite(name, directions):
    torch.manual_seed(0)
    mixer = build(name, Place(d_model=16, num_heads=2, max_len=80), directions=directions)
    x = torch.cat([torch.randn(9, 16), torch.full((3, 16), 1e30)]).requires_grad_()
    out = mixer.forward_packed(x, torch.tensor([0, 4, 9], dtype=torch.int32), 5)[:9]
    for grad in torch.autograd.grad(out.square().sum(), [x, *mixer.parameters()]):
        assert grad.isfinite().all()


def test_no_state_enters_where_a_sequence_starts():
    fresh = torch.tensor([[True, False, True, True, False], [True, False, False, False, True]])
    decay, update = draw(2, 5, 1).sigmoid(), draw(2, 5, 3, seed=1)
    found = entering(decay, update, Starts(fresh, reach=4), dim=1)
    expected = torch.zeros_like(update)
    for b in range(2):
        for t in range(1, 5):
            if not fresh[b, t]:
                expected[b, t] = decay[b, t - 1] * expected[b, t - 1] + update[b, t - 1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("directions", ["tied", "forward"])
def test_directions_of_packed_rows_are_those_of_each_sequence(directions):
    """A convolution and a recurrence: neither reaches over a border, from either side."""
    row, num_rows = packed(chunk=8, gap=3)
    weight = draw(2, 4, seed=5)

    def recurrence(q, k, v, log_decay, starts=None):
        k = short_conv(k.flatten(2), weight).unflatten(-1, (1, 2)) * (v != 0).all(-1, keepdim=True)
        return decayed_attention(q, k, v, log_decay, chunk=8, starts=starts)

    def alone(*streams):
        there = recurrence(*streams)
        return there if directions == "forward" else there + recurrence(*(x.flip(1) for x in streams)).flip(1)

    streams = [draw(num_rows, 1, 2, seed=i) for i in range(3)] + [-draw(num_rows, 1, 2, seed=3).abs() / 20]
    streams = [x.requires_grad_() for x in streams]
    found = packed_directions(recurrence, streams, row, directions=directions)[: sum(LENGTHS)]
    expected = one_by_one(alone, *streams)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pairs = [torch.autograd.grad(out.square().sum(), streams) for out in (found, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-9)


PACKED_NAMES = ("gla", "retnet", "mamba2", "deltanet", "gated_deltanet")


@pytest.mark.parametrize("name", PACKED_NAMES)
def test_fla_s_kernels_alone_close_the_packed_path(name):
    place = Place(d_model=8, num_heads=2, max_len=16)
    assert build(name, place).traits.packed
    closed = build(name, place, kernel="fla").traits
    assert not closed.packed and "lengths on the host" in closed.because["packed"]


@pytest.mark.parametrize("name", PACKED_NAMES)
def test_packed_rows_are_computed_in_torch_and_the_log_says_so(name, monkeypatch, caplog):
    monkeypatch.setattr(fla_kernels, "unavailable", lambda device: "")
    mixer = build(name, Place(d_model=8, num_heads=2, max_len=16))
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    with caplog.at_level(logging.INFO, logger="lra"), fla_kernels.choices() as made:
        with torch.autocast("cpu", torch.bfloat16):
            mixer.forward_packed(torch.randn(9, 8), cu_seqlens, 4)
    assert fla_kernels.taken(made) is None and "lengths on the host" in caplog.text
