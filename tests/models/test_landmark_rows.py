"""Sums over the landmarks of packed sequences: those of equal parts of the padded length."""

import pytest
import torch
from interpreter import interpreted

from models.landmark_rows import LandmarkRows
from models.packed import pad_packed

LENGTHS, FILLER, MAX_LEN = (19, 0, 1, 23, 6), 4, 23
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def test_sums_are_those_of_equal_parts_of_the_padded_length():
    x, y = torch.randn(2, sum(LENGTHS) + FILLER, 2, 3, dtype=torch.float64).unbind()
    landmarks = LandmarkRows.of(CU_SEQLENS, len(x), MAX_LEN, 6)
    for part, total in zip((x, y), landmarks.sums(x, y), strict=True):
        padded = pad_packed(part, CU_SEQLENS, 24)[0]
        torch.testing.assert_close(total, padded.unflatten(1, (6, 4)).sum(2), rtol=0, atol=1e-12)


def test_every_row_knows_its_landmark_and_filler_has_none():
    landmarks = LandmarkRows.of(CU_SEQLENS, sum(LENGTHS) + FILLER, MAX_LEN, 6)
    rows = torch.tensor(LENGTHS)[:, None] - 4 * torch.arange(6)
    assert torch.equal(landmarks.counts(), rows.clamp(0, 4).int())
    assert torch.equal(
        landmarks.owner.bincount(minlength=31), torch.tensor([*landmarks.counts().flatten(), 4])
    )
    assert landmarks.owner.diff().ge(0).all()


@pytest.mark.slow
def test_kernel_in_the_interpreter_equals_float64_in_outputs_and_gradients():
    """Needs Triton but no GPU. Gradients are rounded to the dtype of the rows."""
    *found, opcheck = interpreted("landmark_rows")
    assert len(found) == 4 and opcheck == ["opcheck"]
    limits = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}
    for name, *differences in found:
        assert all(float(x) < limits[name] for x in differences), (name, differences)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_it_equals_float64(dtype):
    lengths = (700, 0, 1, 2048, 129)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    made = torch.randn(sum(lengths) + 7, 3, 2, 32, device="cuda").to(dtype)
    found = []
    for kind in (dtype, torch.float64):
        rows = made.to(kind).requires_grad_()
        sums = LandmarkRows.of(cu_seqlens, len(rows), 2048, 64).sums(*rows.unbind(1)[:2])
        found.append([*sums, torch.autograd.grad(sum(x.sin().sum() for x in sums), rows)[0]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)
