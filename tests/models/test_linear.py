"""Linear attention: dense attention with its own kernel, normalised, and summed in full precision."""

import math

import pytest
import torch

from models import Place, build
from models.linear import feature_map, linear_attention

PLACE = Place(d_model=8, num_heads=2, max_len=200)
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=13, dtype=torch.float64):
    return torch.randn(3, 2, 2, length, 4, dtype=dtype).unbind(0)


def test_weights_sum_to_one():
    q, k, _ = qkv()
    torch.testing.assert_close(linear_attention(q, k, torch.ones_like(q)), torch.ones_like(q), **EXACT)


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = linear_attention(q, k, v, torch.tensor([[True] * 13, [False] * 13]))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradcheck():
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in qkv(length=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: linear_attention(q, k, v, mask), leaves)


def test_half_precision_sums_do_not_drift_over_a_long_sequence():
    q, k, v = (x.half() for x in qkv(length=8000))
    found = linear_attention(q, k, v + 1).double()
    exact = linear_attention(q.double(), k.double(), (v + 1).double())
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)  # one rounding of the result to 11 bits


def test_autocast_leaves_the_sums_in_float32():
    q, k, v = qkv(length=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_attention(q, k, v)
    torch.testing.assert_close(found, linear_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("own", [{}, {"eps": 1.0, "add_eps": True}])
def test_packed_path_equals_each_sequence_alone(own):
    mechanism = build("linear", PLACE, **own).double()
    x = torch.randn(167, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 166, 167], dtype=torch.int32)
    alone = [mechanism(part[None])[0] for part in x.split(cu_seqlens.diff().tolist()) if len(part)]
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 200), torch.cat(alone), **EXACT)


def test_without_normaliser_sums_are_divided_by_the_root_of_the_padded_length():
    """Nystromformer's attention_linear.py divides both features by the length ** (1 / 4)."""
    q, k, v = qkv()
    mask = torch.arange(13) < torch.tensor([13, 5])[:, None]
    expected = torch.zeros_like(v)
    for i in range(13):
        for j in range(13):
            weight = ((feature_map(q[:, :, i]) / 13**0.25) * (feature_map(k[:, :, j]) / 13**0.25)).sum(dim=-1)
            expected[:, :, i] += (weight * mask[:, None, j])[..., None] * v[:, :, j]
    torch.testing.assert_close(linear_attention(q, k, v, mask, normalise=False), expected, **EXACT)


def test_added_eps_shrinks_a_single_token_by_eps_over_its_kernel():
    q, k, v = (torch.full((1, 1, 1, 2), value, dtype=torch.float64) for value in (0.0, 0.0, 5.0))
    found = linear_attention(q, k, v, eps=0.5, add_eps=True)  # features are 1, the kernel is 2
    torch.testing.assert_close(found, v * 2 / 2.5, **EXACT)
    torch.testing.assert_close(linear_attention(q, k, v, eps=0.5), v, **EXACT)


def test_the_state_has_a_normaliser_if_there_is_one():
    assert build("linear", PLACE).state_size(100) == 2 * 4 * (4 + 1)
    assert build("linear", PLACE, normalise=False).state_size(100) == 2 * 4 * 4


def test_without_mask_padding_is_attended_to_and_the_traits_say_so():
    blind = build("linear", PLACE, use_mask=False).double()
    x, mask = torch.randn(2, 13, 8, dtype=torch.float64), torch.arange(13) < torch.tensor([[5], [13]])
    torch.testing.assert_close(blind(x, mask), blind(x, None), **EXACT)
    assert (blind(x, mask)[0, :5] - blind(x[:1, :5])[0]).abs().max() > 1e-3
    assert set(blind.traits.exceptions()) == {"content_invariant", "length_invariant"}
    assert not blind.traits.packed
    assert build("linear", PLACE).traits.packed


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"eps": 0.0}, "eps > 0, got 0.0"),
        ({"eps": math.nan}, "eps > 0, got nan"),
        ({"eps": math.inf}, "eps > 0, got inf"),
        ({"add_eps": True, "normalise": False}, "no eps with normalise=False"),
        ({"eps": 1e-3, "normalise": False}, "no eps with normalise=False"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, said):
    with pytest.raises(ValueError, match=said):
        build("linear", PLACE, **own)
