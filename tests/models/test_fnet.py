"""FNet: the real part of a two-dimensional Fourier transform, and what padding does to it."""

import pytest
import torch

from models import Place, build
from models.fnet import fourier_mix


def test_equals_one_transform_after_the_other():
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    expected = torch.fft.fft(torch.fft.fft(x, dim=2), dim=1).real
    torch.testing.assert_close(fourier_mix(x), expected, rtol=0, atol=1e-12)


def test_is_not_scaled():
    x = torch.zeros(1, 5, 3)
    x[0, 0, 0] = 1
    assert torch.equal(fourier_mix(x), torch.ones(1, 5, 3))


def test_content_of_padding_is_zeroed():
    x = torch.randn(2, 13, 6)
    mask = torch.arange(13) < torch.tensor([13, 4])[:, None]
    poisoned = x.masked_fill(~mask[..., None], 1e4)
    assert torch.equal(fourier_mix(x, mask), fourier_mix(poisoned, mask))


def test_more_padding_changes_the_output():
    x = torch.randn(1, 8, 6)
    longer = torch.nn.functional.pad(x, (0, 0, 0, 1))
    mask = torch.arange(9)[None] < 8
    assert (fourier_mix(longer, mask)[:, :8] - fourier_mix(x)).abs().max() > 1
    assert not build("fnet", Place(d_model=6, num_heads=2, max_len=9)).traits.length_invariant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_transformed_in_float32(dtype):
    x = torch.randn(2, 1000, 6).to(dtype)
    out = fourier_mix(x)
    assert out.dtype == dtype
    assert torch.equal(out, fourier_mix(x.float()).to(dtype))


def test_gradcheck():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fourier_mix(x, mask), [x])


def test_use_mask_false_transforms_what_stands_at_padding():
    place = Place(d_model=6, num_heads=2, max_len=13)
    quirk = build("fnet", place, use_mask=False)
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    mask = torch.arange(13) < torch.tensor([13, 4])[:, None]
    angle = torch.arange(13, dtype=torch.float64)[:, None] * torch.arange(13) * 2 * torch.pi / 13
    width = torch.fft.fft(x, dim=2)
    expected = (torch.complex(angle.cos(), -angle.sin()) @ width).real  # a sum over all 13 positions
    torch.testing.assert_close(quirk(x, mask), expected, rtol=0, atol=1e-12)
    assert (quirk(x, mask) - build("fnet", place)(x, mask)).abs().max() > 1
    assert set(quirk.traits.exceptions()) == {"content_invariant", "length_invariant"}


def test_it_has_no_parameters():
    assert not list(build("fnet", Place(d_model=6, num_heads=2, max_len=9)).parameters())
