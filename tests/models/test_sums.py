"""Softmax attention over the packed rows of each sequence, in chunks."""

import pytest
import torch

from models.packed import Chunks
from models.sums import segment_softmax

LENGTHS = (7, 0, 1, 4)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)


def draw(num_rows=14, dtype=torch.float64):
    """q [b m h d], k [t h d], v [t h e], a key [b h d] and a value [b h e] of each sequence's own."""
    shapes = ((4, 3, 2, 6), (num_rows, 2, 6), (num_rows, 2, 5), (4, 2, 6), (4, 2, 5))
    q, k, v, *own = (torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v, own


def by_sequence(q, k, v, own=None):
    """One softmax a sequence, in float64."""
    mixed = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        rows = slice(int(CU_SEQLENS[i]), int(CU_SEQLENS[i]) + n)
        keys, values = (
            x[rows].double() if own is None else torch.cat([x[rows], one[i : i + 1]]).double()
            for x, one in zip((k, v), own or (None, None), strict=True)
        )
        if len(keys):
            scores = torch.einsum("mhd,nhd->hmn", q[i].double(), keys) / 6**0.5
            mixed[i] = torch.einsum("hmn,nhe->mhe", scores.softmax(-1), values)
    return mixed


def packed(q, k, v, own=None, *, size=3, dropout=0.0):
    chunks = Chunks.of(CU_SEQLENS, len(k), size=size)
    k, v = (chunks.lay_out(x) for x in (k, v))
    return segment_softmax(q, k, v, chunks, own=own, dropout=dropout)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e4, -1e4])  # with the last two every score is far from the next
def test_equals_a_softmax_of_each_sequence(size, with_own, scale):
    q, k, v, own = draw()
    k, own = scale * k, [scale * own[0], own[1]]
    own = own if with_own else None
    found = packed(q, k, v, own, size=size)
    torch.testing.assert_close(found, by_sequence(q, k, v, own), rtol=0, atol=1e-10)  # 1e-12 for scale 1
    assert with_own or not found[1].any()


def test_scores_of_one_sign_far_from_zero_leave_no_sequence_without_weight():
    q, k, v, _ = draw()
    q, k = q.abs(), -1e6 * k.abs()
    torch.testing.assert_close(packed(q, k, v), by_sequence(q, k, v), rtol=0, atol=1e-8)


@pytest.mark.parametrize("with_own", [False, True])
def test_gradcheck(with_own):
    leaves = [x.requires_grad_() for x in (*draw()[:3], *draw()[3])]

    def attend(q, k, v, *own):
        return packed(q, k, v, own if with_own else None) + 0 * sum(x.sum() for x in own)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_accurate(autocast):
    q, k, v, own = draw(dtype=torch.bfloat16)
    q, k, expected = 3 * q, 3 * k, by_sequence(3 * q, 3 * k, v, own)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = (
            packed(q.float(), k.float(), v.float(), [x.float() for x in own])
            if autocast
            else packed(q, k, v, own)
        )
    assert (found - expected).square().mean().sqrt() < 1e-2 * expected.square().mean().sqrt()  # found 3e-3


@pytest.mark.parametrize("with_own", [False, True])
def test_dropout_keeps_the_mean_of_the_weights(with_own):
    q, k, v, own = draw()
    own = own if with_own else None
    draws = torch.stack([packed(q, k, v, own, dropout=0.5) for _ in range(400)])
    away = (draws.mean(0) - by_sequence(q, k, v, own)).abs() / (draws.std(0) / 400**0.5 + 1e-12)
    assert draws.std(0)[[0, 2, 3]].min() > 0
    assert away.max() < 5  # standard errors, of 120 means
