"""Convolution along the length as products: equal to torch's, in outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.depthwise import BLOCK, band, conv_along, conv_rows, fits_kernels


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


def bounds(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw_rows(lengths, num_taps, width, filler=170):
    """Values as views of a projection, taps, and a tensor to add to with zeros at filler rows."""
    rows = torch.randn(sum(lengths) + filler, 3, 2, width, dtype=torch.float64)
    base = torch.randn_like(rows[:, 1]).index_fill(0, torch.arange(sum(lengths), len(rows)), 0)
    return [rows[:, 1], torch.randn(2, num_taps, dtype=torch.float64), base]


def row_results(call, given, lengths, added=True):
    """The output, and the gradients of values, taps and what is added to."""
    v, taps, base = leaves = [x.detach().requires_grad_() for x in given]
    out = call(v, taps, bounds(lengths, v.device), max(lengths), base=base if added else None)
    real = sum(lengths)
    weight = torch.linspace(-1, 2, out[:real].numel(), device=v.device, dtype=torch.float64)
    loss = (out[:real].double().flatten() * weight).sum()
    return [out, *torch.autograd.grad(loss, leaves if added else leaves[:2])]


def test_rows_of_a_sequence_are_convolved_as_if_it_were_alone():
    lengths = (70, 0, 1, 9)
    v, taps, base = draw_rows(lengths, 35, 5)
    found = row_results(conv_rows, (v, taps, base), lengths)

    def alone(v, taps, *rest, base):
        parts = v[: sum(lengths)].split(lengths)
        parts = [by_torch(x.transpose(0, 1)[None], taps)[0].transpose(0, 1) for x in parts if len(x)]
        return base + torch.cat([*parts, torch.zeros_like(v[sum(lengths) :])])

    for a, b in zip(found, row_results(alone, (v, taps, base), lengths), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    without = row_results(conv_rows, (v, taps, base), lengths, added=False)[0]
    torch.testing.assert_close(without, found[0] - base, rtol=1e-12, atol=1e-12)


def test_products_of_the_kernels_are_counted():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        bands, x = torch.empty(2, BLOCK, BLOCK + 34, requires_grad=True), torch.empty(100, 2, 8)
        out = torch.ops.lra.band_rows(bands, x.requires_grad_(), None, torch.empty(4, dtype=torch.int32), 60)
        torch.autograd.grad(out.sum(), (bands, x))
    assert counter.get_total_flops() == 3 * 2 * 100 * 2 * 8 * (BLOCK + 34)


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Taps and results are rounded to half precision."""
    *found, opcheck = interpreted("depthwise")
    assert len(found) == 7 and opcheck == ["opcheck"]
    for _, *differences in found:
        assert all(float(x) < 1e-3 for x in differences), differences


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_rows_on_a_gpu_equal_float64_and_themselves(dtype):
    lengths = (700, 0, 1, 4096, 129)
    given = [x.cuda() for x in draw_rows(lengths, 35, 32)]
    given[0], given[2] = given[0].to(dtype), given[2].to(dtype)
    given[1] = given[1].float()
    assert fits_kernels(*given[:2])
    found, again = row_results(conv_rows, given, lengths), row_results(conv_rows, given, lengths)
    expected = row_results(conv_rows, [x.double() for x in given], lengths)
    for a, b, c in zip(found, expected, again, strict=True):
        assert (a.double() - b).norm() < (1e-3 if dtype == torch.float16 else 8e-3) * b.norm()
        assert torch.equal(a, c)  # bit by bit
