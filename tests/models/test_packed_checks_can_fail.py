"""The checks of packed paths can fail for blocks too: broken ones, each caught by the check it breaks."""

import pytest
from torch import nn, ones_like
from torch.autograd import Function

from lra.conformance import ALL_CHECKS
from lra.conformance_subject import Subject
from models import Block, Place, Traits
from models.packed import pad_packed, unpad_packed

CHECKS = {check.__name__: check for check in ALL_CHECKS}


class AddsMeans(Block):
    """Adds what the layer before handed on, its means of the real tokens, in both layouts: conforms."""

    traits = Traits(packed=True)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.up, self.is_last = nn.Linear(place.d_model, place.d_model), place.layer_index == 1

    def forward(self, x, mask, carry):
        x = self.up(x) if carry is None else self.up(x + carry[:, None])
        mask = ones_like(x[..., 0]) > 0 if mask is None else mask
        total = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return x, None if self.is_last else total

    def forward_packed(self, x, cu_seqlens, max_len, carry):
        padded, mask = pad_packed(x, cu_seqlens, max_len)
        padded, carry = self(padded, mask, carry)
        return unpad_packed(padded, cu_seqlens, x.shape[0]), carry


class DropsThePackedCarry(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, None)
        return out, carry


class HandsOnNothingPacked(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        return super().forward_packed(x, cu_seqlens, max_len, carry)[0], None


class HandsOnNaNOfEmptySequences(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, carry)
        return out, None if carry is None else carry / cu_seqlens.diff()[:, None].clamp_max(1)


class ShiftsPackedRows(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, carry)
        return out.roll(1, dims=0), carry


class TakesThePlaceForTheBatch(AddsMeans):
    """Right only where no sequence may be longer than the longest of the batch."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.limit = place.max_len

    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, carry)
        return out * (max_len / self.limit), carry


class LetsFillerIn(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, carry)
        return out + 1e-3 * x[-1].clamp(100, 1e4).sub(100), carry


class _FillerInGradients(Function):
    """The identity, whose gradient has a part of the filler where that is large."""

    @staticmethod
    def forward(ctx, out, x):
        ctx.save_for_backward(x)
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.saved_tensors[0][-1].clamp_min(100).sub(100), None


class LetsFillerIntoGradients(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, carry)
        return _FillerInGradients.apply(out, x), carry


class ReadsPackedLengthsBack(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        return super().forward_packed(x, cu_seqlens, int(cu_seqlens.diff().max().item()), carry)


class BranchesOnPackedLengths(AddsMeans):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        out, carry = super().forward_packed(x, cu_seqlens, max_len, carry)
        return (out if cu_seqlens[1] > 0 else -out), carry


class ClaimsAPackedPathItHasNot(AddsMeans):
    forward_packed = Block.forward_packed


class HidesAPackedPath(AddsMeans):
    traits = Traits()


class DividesByThePaddedLength(AddsMeans):
    """Conforms, and packed rows alone, without padding, would give something else."""

    traits = Traits(packed=True, length_invariant=False)

    def forward(self, x, mask, carry):
        out, carry = super().forward(x, mask, carry)
        share = 1 if mask is None else mask.to(x.dtype).mean(1, keepdim=True)
        return out, None if carry is None else carry * share


class DividesPackedRowsByTheirNumber(DividesByThePaddedLength):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        padded, mask = pad_packed(x, cu_seqlens, max_len)
        padded, carry = AddsMeans.forward(self, padded, mask, carry)
        return unpad_packed(padded, cu_seqlens, x.shape[0]), carry


class DropsTokens(AddsMeans):
    def __init__(self, place: Place, *, dropout: float = 0.0) -> None:
        super().__init__(place)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, carry):
        return super().forward(self.dropout(x), mask, carry)


class DropsNoPackedTokens(DropsTokens):
    def forward_packed(self, x, cu_seqlens, max_len, carry):
        padded, mask = pad_packed(x, cu_seqlens, max_len)
        padded, carry = AddsMeans.forward(self, padded, mask, carry)
        return unpad_packed(padded, cu_seqlens, x.shape[0]), carry


@pytest.mark.parametrize(("cls", "status"), [(DropsTokens, "pass"), (DropsNoPackedTokens, "fail")])
def test_dropout_is_looked_for_in_the_packed_path_too(cls, status):
    found = CHECKS["dropout_acts"](Subject("drops", cls))
    assert found.status == status, found
    assert status == "pass" or found.detail == "dropout=0.5 changes nothing in training over packed rows"


def test_a_packed_path_of_the_padded_length_passes_where_that_length_is_claimed_to_matter():
    found = CHECKS["packed_agrees"](Subject("means", DividesByThePaddedLength))
    assert found.status == "pass", found


@pytest.mark.parametrize("check", ["packed_agrees", "compiles", "capturable"])
def test_a_block_with_a_packed_path_passes(check):
    found = CHECKS[check](Subject("means", AddsMeans))
    assert found.status == "pass", found


@pytest.mark.parametrize(
    ("check", "cls"),
    [
        ("packed_agrees", DropsThePackedCarry),
        ("packed_agrees", HandsOnNothingPacked),
        ("packed_agrees", HandsOnNaNOfEmptySequences),
        ("packed_agrees", ShiftsPackedRows),
        ("packed_agrees", TakesThePlaceForTheBatch),
        ("packed_agrees", LetsFillerIn),
        ("packed_agrees", LetsFillerIntoGradients),
        ("packed_agrees", DividesPackedRowsByTheirNumber),
        ("packed_agrees", ClaimsAPackedPathItHasNot),
        ("packed_agrees", HidesAPackedPath),
        ("compiles", BranchesOnPackedLengths),
        ("capturable", ReadsPackedLengthsBack),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_block_whose_packed_path_differs_fails(check, cls):
    assert CHECKS[check](Subject("broken", cls)).status == "fail"
