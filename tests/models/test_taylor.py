"""Taylor attention: how its error falls with the order, its blocks of monomials and their memory."""

import math

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.taylor import blocks, coefficients, monomials, taylor_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=200)


def qkv(length=13, d=8):
    return torch.randn(3, 2, 2, length, d, dtype=torch.float64).unbind(0)


def test_error_against_softmax_falls_with_the_order_as_the_first_term_left_out():
    q, k, v = qkv(length=32)
    for order in (1, 2, 3):
        errors = []
        for size in (0.4, 0.2):  # half the size of queries is half a score
            found = taylor_attention(size * q, k, v, order=order)
            errors.append((found - dense_attention(size * q, k, v)).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.35), errors


@pytest.mark.parametrize(("width", "degree"), [(7, 2), (16, 2), (5, 3), (6, 3)])
@pytest.mark.parametrize("limit", [1, 20, 256])
def test_monomials_of_all_blocks_give_the_power_of_the_scalar_product(width, degree, limit):
    q, k = torch.randn(2, 50, width, dtype=torch.float64)
    total, seen = 0, []
    for start, stop in blocks(width, degree, limit):
        weight = coefficients(width, start, stop, degree, q)
        made = monomials(q, start, stop, degree) * weight, monomials(k, start, stop, degree)
        total = total + (made[0] * made[1]).sum(dim=-1)
        seen += range(start, stop)
        assert made[0].shape[-1] <= limit or stop - start == 1
    assert seen == list(range(width))
    torch.testing.assert_close(total, (q * k).sum(dim=-1) ** degree / math.factorial(degree), **EXACT)


def test_single_leading_factors_make_each_monomial_of_order_two_once():
    made = sum(monomials(torch.zeros(9), start, stop, 2).shape[-1] for start, stop in blocks(9, 2, 1))
    assert made == math.comb(9 + 1, 2)


def test_the_size_of_blocks_changes_nothing():
    q, k, v = qkv()
    whole = taylor_attention(q, k, v, order=3, block=10_000)
    torch.testing.assert_close(taylor_attention(q, k, v, order=3, block=1), whole, **EXACT)


def test_memory_kept_for_the_gradient_holds_no_monomials():
    """64 wide heads have 2,145 monomials of order 2; kept are q, k, v, the ones, sums and the output."""
    q, k, v = (torch.randn(1, 1, 500, 64, requires_grad=True) for _ in range(3))
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        taylor_attention(q, k, v)
    assert sum(kept.values()) < 12 * q.nbytes


def test_weights_of_order_two_are_at_least_a_half():
    q, k, _ = qkv()
    ones, values = torch.ones_like(q), torch.eye(13, dtype=torch.float64).expand(2, 2, 13, 13)
    torch.testing.assert_close(taylor_attention(10 * q, k, ones), ones, **EXACT)
    assert (taylor_attention(10 * q, k, values) > 0).all()


def test_a_sum_of_weights_near_zero_keeps_its_sign():
    q, v = torch.full((1, 1, 1, 1), 1.0).double(), torch.full((1, 1, 1, 1), 5.0).double()
    for key, expected in [(-1 + 0.01, 0.01 * 5 / 0.25), (-1 - 0.01, 0.01 * 5 / 0.25), (-1.5, 5.0)]:
        found = taylor_attention(q, torch.full_like(q, key), v, order=1, eps=0.25)  # the weight is 1 + key
        assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_row_without_real_keys_gives_zeros_and_finite_gradients(order):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = taylor_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]), order=order)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradcheck():
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in qkv(length=3, d=4)]
    attend = lambda q, k, v: taylor_attention(q, k, v, mask, order=3, block=5)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("own", [{}, {"order": 3, "d_feature": 5}])
def test_packed_path_equals_each_sequence_alone(own):
    mechanism = build("taylor", PLACE, **own).double()
    x = torch.randn(20, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(x[None, :5])[0], mechanism(x[None, 5:])[0]])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), alone, **EXACT)


def test_the_state_counts_monomials_and_the_normaliser():
    assert build("taylor", PLACE).state_size(100) == 2 * (1 + 8 + 36) * (8 + 1)
    assert build("taylor", PLACE, order=3, d_feature=4).state_size(100) == 2 * (1 + 4 + 10 + 20) * (8 + 1)


@pytest.mark.parametrize(
    "own", [{"order": 0}, {"order": 4}, {"order": 2.0}, {"d_feature": -1}, {"eps": 0.0}, {"eps": math.nan}]
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="taylor needs order 1, 2 or 3"):
        build("taylor", PLACE, **own)
