"""Nystromformer: dense attention when every token is a landmark; its inverse, its masks and its options."""

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.landmarks import iterated_inverse
from models.nystrom import nystrom_attention, segment_means, start_norm

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=24, sharpness=1.0):
    q, k, v = torch.randn(3, 2, 2, length, 8, dtype=torch.float64).unbind(0)
    return sharpness * q, sharpness * k, v


@pytest.mark.parametrize("num_landmarks", [24, 64])
def test_as_many_landmarks_as_tokens_give_dense_attention_whatever_the_mask(num_landmarks):
    q, k, v = qkv()
    mask = torch.rand(2, 24) < 0.6
    found = nystrom_attention(q, k, v, mask, num_landmarks=num_landmarks)
    torch.testing.assert_close(found, dense_attention(q, k, v, mask), **EXACT)


def test_one_landmark_is_the_mean_of_values_seen_from_the_mean_query():
    q, k, v = qkv()
    expected = dense_attention(q.mean(dim=2, keepdim=True), k, v).expand_as(v)
    torch.testing.assert_close(nystrom_attention(q, k, v, num_landmarks=1), expected, **EXACT)


def test_iterated_inverse_converges_to_the_pseudo_inverse():
    a = (2 * torch.randn(3, 6, 6, dtype=torch.float64)).softmax(dim=-1)
    a[1, 4:] = a[1, :, 4:] = 0  # landmarks that are not there
    inverses = [iterated_inverse(a, start_norm(a), n) for n in (4, 8, 30)]
    errors = [(inverse - torch.linalg.pinv(a)).abs().max().item() for inverse in inverses]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9
    assert not inverses[0][1, 4:].any() and not inverses[0][1, :, 4:].any()


def test_segment_means_are_over_real_tokens_and_tell_empty_segments():
    x = torch.arange(7.0).view(1, 1, 7, 1)
    real = torch.tensor([[True, False, True, True, False, False, True]])
    means, used = segment_means(x, real, 4)  # segments: 0 1 | 2 3 | 4 5 | 6
    assert used.tolist() == [[True, True, False, True]]
    assert means.flatten().tolist() == [0.0, 2.5, 0.0, 6.0]


def test_empty_segments_do_not_take_part():
    q, k, v = qkv()
    mask = torch.arange(24) < torch.tensor([[16], [16]])
    found = nystrom_attention(q, k, v, mask, num_landmarks=6)[:, :, :16]
    cut = nystrom_attention(*(x[:, :, :16] for x in (q, k, v)), num_landmarks=4)  # the same segments of 4
    torch.testing.assert_close(found, cut, rtol=0, atol=1e-9)  # the same numbers through the iteration


def test_counted_padding_is_a_token_of_zeros_and_a_landmark():
    q, k, v = qkv()
    mask = torch.arange(24) < torch.tensor([[10], [24]])  # the third segment of 4 is half padding
    found = nystrom_attention(q, k, v, mask, num_landmarks=6, count_padding=True)[0]
    q, k = (x[0] * mask[0, :, None] / 8**0.25 for x in (q, k))
    q_mean, k_mean = (torch.stack([part.sum(dim=1) / 4 for part in x.split(4, dim=1)], dim=1) for x in (q, k))
    assert not q_mean[:, 3:].any() and k_mean[:, 2].any()
    a = (q_mean @ k_mean.mT).softmax(dim=-1)
    z = a.mT / a.sum(dim=1).amax(dim=-1)[:, None, None]
    for _ in range(6):
        az = a @ z
        z = z @ (13 * torch.eye(6) - az @ (15 * torch.eye(6) - az @ (7 * torch.eye(6) - az))) / 4
    to_keys = (q_mean @ k[:, :10].mT).softmax(dim=-1) @ v[0, :, :10]
    expected = (q @ k_mean.mT).softmax(dim=-1) @ z @ to_keys
    torch.testing.assert_close(found[:, :10], expected[:, :10], rtol=0, atol=1e-11)


def test_counted_padding_changes_nothing_without_padding():
    q, k, v = qkv()
    without = nystrom_attention(q, k, v, num_landmarks=6)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, num_landmarks=6, count_padding=True), without, **EXACT
    )


def test_convolution_is_along_the_length_with_one_filter_a_head_and_zeros_at_padding():
    q, k, v = qkv()
    weight = torch.randn(2, 1, 3, 1, dtype=torch.float64)
    mask = torch.arange(24) < torch.tensor([24, 5])[:, None]
    without = nystrom_attention(q, k, v, mask, num_landmarks=6)
    found = nystrom_attention(q, k, v, mask, num_landmarks=6, conv_weight=weight) - without
    v = torch.nn.functional.pad(v * mask[:, None, :, None], (0, 0, 1, 1))
    expected = sum(weight[:, 0, t, 0].view(2, 1, 1) * v[:, :, t : t + 24] for t in range(3))
    torch.testing.assert_close(found, expected, **EXACT)


def test_lengths_just_above_the_number_of_landmarks_stay_finite():
    for length in range(60, 140):
        q, k, v = (x.float() for x in qkv(length, sharpness=3.0))
        assert nystrom_attention(q, k, v, num_landmarks=64).isfinite().all()


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    out = nystrom_attention(q, k, v, torch.tensor([[True] * 24, [False] * 24]), num_landmarks=6)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("coupled_start", [False, True])
def test_gradcheck(coupled_start):
    mask = torch.arange(7) < torch.tensor([7, 2])[:, None]
    leaves = [x.requires_grad_() for x in (*qkv(length=7), torch.randn(2, 1, 3, 1, dtype=torch.float64))]

    def attend(q, k, v, weight):
        options = {"num_landmarks": 3, "conv_weight": weight, "coupled_start": coupled_start}
        return nystrom_attention(q, k, v, mask, **options)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_autocast_leaves_the_inverse_in_float32():
    q, k, v = (x.float() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        found = nystrom_attention(q, k, v, num_landmarks=6)
    torch.testing.assert_close(found, nystrom_attention(q, k, v, num_landmarks=6), rtol=0, atol=1e-5)


def test_coupled_start_ties_a_row_to_its_batch_and_says_so():
    q, k, v = qkv(sharpness=3.0)
    leak = {}
    for coupled in (False, True):
        options = {"num_landmarks": 6, "coupled_start": coupled}
        beside = nystrom_attention(q, torch.cat([k[:1], 10 * k[1:]]), v, **options)[0]
        leak[coupled] = (beside - nystrom_attention(q[:1], k[:1], v[:1], **options)[0]).abs().max().item()
    assert leak[False] < 1e-12 < 1e-4 < leak[True]
    place = Place(d_model=8, num_heads=2, max_len=30)
    assert build("nystrom", place).traits.batch_invariant
    assert (
        "batch_invariant" in build("nystrom", place, num_landmarks=6, coupled_start=True).traits.exceptions()
    )


@pytest.mark.parametrize("kernel_size", [0, 1, 3])
@pytest.mark.parametrize("coupled_start", [False, True])
@pytest.mark.parametrize("num_landmarks", [29, 30])
def test_a_landmark_for_every_token_leaves_order_to_the_convolution_and_nothing_to_padding(
    kernel_size, coupled_start, num_landmarks
):
    place = Place(d_model=8, num_heads=2, max_len=30)
    own = {"kernel_size": kernel_size, "coupled_start": coupled_start, "num_landmarks": num_landmarks}
    mixer = build("nystrom", place, **own).double()
    x = torch.randn(1, 30, 8, dtype=torch.float64) * 3
    turned = [0, 2, 1, *range(3, 30)]
    moves = (mixer(x[:, turned]) - mixer(x)[:, turned]).abs().max() > 1e-9
    assert mixer.traits.uses_order == moves
    dense = num_landmarks == 30
    assert mixer.traits.uses_order == (not dense or kernel_size > 1)
    assert mixer.traits.length_invariant == dense
    assert mixer.traits.batch_invariant == (dense or not coupled_start)


def test_kernel_zero_leaves_the_convolution_out():
    place = Place(d_model=8, num_heads=2, max_len=30)
    assert build("nystrom", place, kernel_size=0).conv_weight is None
    assert build("nystrom", place, kernel_size=5).conv_weight.shape == (2, 1, 5, 1)


@pytest.mark.parametrize(
    "own",
    [
        {"num_landmarks": 0},
        {"num_landmarks": 8.0},
        {"num_iterations": 0},
        {"num_iterations": 1.5},
        {"kernel_size": 4},
        {"kernel_size": -3},
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="nystrom needs"):
        build("nystrom", Place(d_model=8, num_heads=2, max_len=30), **own)
