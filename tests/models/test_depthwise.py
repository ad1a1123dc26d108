"""Convolution along the length as products: equal to torch's, in outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from models.depthwise import band, conv_along


def by_torch(v, taps):
    return F.conv2d(v, taps[:, None, :, None], padding=(taps.shape[-1] // 2, 0), groups=taps.shape[0])


def results(call, v, taps):
    leaves = [x.detach().requires_grad_() for x in (v, taps)]
    out = call(*leaves)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def draw(length, num_taps, dtype=torch.float64, batch_size=2, width=5):
    rows = torch.randn(batch_size, length, 3, 2, width, dtype=dtype)  # views, as a projection gives them
    return rows[:, :, 1].transpose(1, 2), torch.randn(2, num_taps, dtype=dtype)


@pytest.mark.parametrize(
    ("length", "num_taps"),
    [(1, 35), (7, 3), (64, 35), (65, 1), (190, 35), (128, 65), (300, 101), (5, 201)],
)
def test_equals_conv2d_in_outputs_and_gradients(length, num_taps):
    v, taps = draw(length, num_taps)
    for a, b in zip(results(conv_along, v, taps), results(by_torch, v, taps), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    leaves = [x.clone().requires_grad_() for x in draw(66, 3, batch_size=1)]
    assert torch.autograd.gradcheck(conv_along, leaves, fast_mode=True)


def test_band_holds_the_taps_of_a_head_along_its_diagonals():
    first, second = band(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 2).tolist()
    assert first == [[1, 2, 3, 0], [0, 1, 2, 3]]
    assert second == [[4, 5, 6, 0], [0, 4, 5, 6]]


def test_gradients_keep_1_7_times_the_values_and_no_more():
    v, taps = draw(2048, 35, width=32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.numel()), lambda size: None
    ):
        conv_along(v.requires_grad_(), taps.requires_grad_())
    assert 1.5 * v.numel() < sum(kept.values()) < 1.7 * v.numel()


@pytest.mark.slow
def test_is_compiled_whole_for_any_length():
    torch._dynamo.reset()
    call = torch.compile(conv_along, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 190, 33):
        v, taps = draw(length, 35)
        for a, b in zip(results(call, v, taps), results(conv_along, v, taps), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_on_a_gpu_in_float32_it_equals_float64_and_itself():
    v, taps = (x.cuda() for x in draw(2048, 35, torch.float32, batch_size=8, width=32))
    found, again = results(conv_along, v, taps), results(conv_along, v, taps)
    expected = results(by_torch, v.double(), taps.double())
    for a, b, c in zip(found, expected, again, strict=True):
        assert (a.double() - b).norm() < 2e-6 * b.norm()
        assert torch.equal(a, c)  # bit by bit
