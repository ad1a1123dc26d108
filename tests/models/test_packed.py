"""Packed rows read as a padded batch."""

import pytest
import torch

from models.packed import pad_packed, read_padded


@pytest.mark.parametrize("lengths", [(5, 0, 1), (0, 0)])
@pytest.mark.parametrize("filler", [0, 3])
def test_rows_are_read_as_they_are_written_into_a_padded_batch_with_their_gradients(lengths, filler):
    """Without any row, and no filler, there are zeros."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(lengths) + filler, 2, 3, dtype=torch.float64, requires_grad=True)
    (found,) = read_padded(bounds, 6, x)
    expected = pad_packed(x, bounds, 6)[0]
    assert torch.equal(found, expected) and found.shape == (len(lengths), 6, 2, 3)
    grads = [torch.autograd.grad(padded.sin().sum(), x)[0] for padded in (found, expected)]
    assert torch.equal(*grads)
