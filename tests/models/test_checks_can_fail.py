"""Each check of the conformance suite can fail: broken mechanisms, each caught by the check it breaks."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lra import conformance_numerics, conformance_proofs
from lra.conformance import ALL_CHECKS, subject
from lra.conformance_subject import Subject, checks_in
from models import Block, Mixer, Place, Traits

CHECKS = {check.__name__: check for check in ALL_CHECKS}


class Honest(Mixer):
    """A masked mean of the values of each head: conforms, so that what a subclass changes is what fails."""

    def attend(self, q, k, v, mask):
        mask = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
        weight = mask[:, None, :, None].to(v.dtype)
        return (
            ((v + q * k) * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1) + 0 * v + q
        )


class SumsPaddingToo(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None)


class DividesByThePaddedLength(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) / q.shape[2]


class ClaimsTooLittle(Honest):
    traits = Traits(content_invariant=False, length_invariant=False, batch_invariant=False, uses_order=True)


class NeedsNoPrefix(Honest):
    traits = Traits(needs_prefix_mask=True)


class LooksAtItsNeighbours(Honest):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + x.detach().mean(0, keepdim=True)


class AddsPositions(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + torch.arange(q.shape[2], dtype=q.dtype)[:, None]


class OnlyMultiplesOfFour(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask).unflatten(2, (-1, 4)).flatten(2, 3)


class AlwaysFloat32(Honest):
    def forward(self, x, mask=None):
        return super().forward(x, mask).float()


class FixedHeadWidth(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask).unflatten(-1, (8, -1)).flatten(-2)


class ForgetsRotation(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(replace(place, rotary_base=None))


class VectorLoss(Honest):
    def aux_loss(self):
        return torch.ones(2)


class SumsInHalfPrecision(Honest):
    def attend(self, q, k, v, mask):
        if v.dtype != torch.bfloat16:
            return super().attend(q, k, v, mask)
        return super().attend(*((part + 64) - 64 for part in (q, k, v)), mask)


class NoEffect(Honest):
    def __init__(self, place: Place, *, attn_dropout: float = 0.0) -> None:
        super().__init__(place)


class OverflowsAtPadding(Honest):
    def attend(self, q, k, v, mask):
        weight = torch.ones_like(k) if mask is None else mask[:, None, :, None].to(k.dtype)
        return q + (k.square().exp() * weight * v).sum(2, keepdim=True)


class ScalesWithoutMask(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) * (2.0 if mask is None else 1.0)


class DividesByRealTokens(Honest):
    def attend(self, q, k, v, mask):
        out = super().attend(q, k, v, mask)
        return out if mask is None else out / (mask.sum(1) / mask.sum(1))[:, None, None, None]


class TakesOnlyPrefixes(Honest):
    def attend(self, q, k, v, mask):
        if mask is not None and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("only prefixes")
        return super().attend(q, k, v, mask)


class MixesPackedSequences(Honest):
    traits = Traits(packed=True)

    def forward_packed(self, x, cu_seqlens, max_len):
        return self.forward(x[None])[0]


class HidesItsPackedPath(MixesPackedSequences):
    traits = Traits()


class Detaches(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q.detach(), k, v, mask)


class HasAnIdleParameter(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.idle = nn.Parameter(torch.ones(3))


class DrawsFromElsewhere(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("shift", torch.tensor(random.random()), persistent=False)

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + self.shift


class DrawsAtEvaluation(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + torch.rand(())


class SaysItDraws(Honest):
    traits = Traits(stochastic_eval=True)


class ForgetsABuffer(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("shift", torch.rand(()), persistent=False)

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + self.shift


SHARED = torch.ones(3)


class SharesATensor(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("shared", SHARED)


class HoldsATensor(Honest):
    table = torch.ones(3)


class WritesToItsInput(Honest):
    def forward(self, x, mask=None):
        if not x.requires_grad:
            x.mul_(2)
        return super().forward(x, mask)


class ReadsUnwrittenMemory(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + torch.empty_like(v) * 0


class ReplacesABuffer(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("average", torch.zeros(3))

    def training_update(self, step):
        self.average = torch.full((3,), float(step))


class UpdatesAtRandom(ReplacesABuffer):
    def training_update(self, step):
        self.average.fill_(random.random())


class SizedByTheLimit(Honest):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.positions = nn.Parameter(torch.zeros(place.max_len))

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + self.positions.sum()


class SaysItIsSized(Honest):
    traits = Traits(fixed_length=True)


class ReadsAValueBack(Honest):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) * (1.0 if v.sum().item() < 1e30 else 0.5)


class GivesNoReason(Honest):
    traits = Traits(batch_invariant=False)


FAILURES = [
    ("any_length", OnlyMultiplesOfFour),
    ("shape_and_dtype", AlwaysFloat32),
    ("place_is_honoured", FixedHeadWidth),
    ("rotary_positions", ForgetsRotation),
    ("hooks_answer", VectorLoss),
    ("dropout_acts", NoEffect),
    ("bf16_close_to_fp32", SumsInHalfPrecision),
    ("content_invariance", SumsPaddingToo),
    ("content_invariance", ClaimsTooLittle),
    ("length_invariance", DividesByThePaddedLength),
    ("length_invariance", ClaimsTooLittle),
    ("poisoned_padding", OverflowsAtPadding),
    ("no_mask_means_all_real", ScalesWithoutMask),
    ("wholly_padded_row", DividesByRealTokens),
    ("mask_with_holes", TakesOnlyPrefixes),
    ("mask_with_holes", NeedsNoPrefix),
    ("batch_invariance", LooksAtItsNeighbours),
    ("batch_invariance", ClaimsTooLittle),
    ("order", AddsPositions),
    ("order", ClaimsTooLittle),
    ("packed_agrees", MixesPackedSequences),
    ("packed_agrees", HidesItsPackedPath),
    ("gradcheck", Detaches),
    ("gradients_reach_parameters", HasAnIdleParameter),
    ("no_gradient_at_padding", SumsPaddingToo),
    ("same_seed_same_bits", DrawsFromElsewhere),
    ("evaluation_repeats", DrawsAtEvaluation),
    ("evaluation_repeats", SaysItDraws),
    ("state_dict_round_trip", ForgetsABuffer),
    ("instances_share_nothing", SharesATensor),
    ("instances_share_nothing", HoldsATensor),
    ("inputs_untouched", WritesToItsInput),
    ("deterministic_algorithms", ReadsUnwrittenMemory),
    ("updates_in_place", ReplacesABuffer),
    ("updates_in_place", UpdatesAtRandom),
    ("fixed_length", SizedByTheLimit),
    ("fixed_length", SaysItIsSized),
    ("compiles", ReadsAValueBack),
    ("capturable", ReadsAValueBack),
    ("exceptions_have_reasons", GivesNoReason),
]


@pytest.mark.parametrize("check", CHECKS)
def test_an_honest_mechanism_passes(check):
    found = CHECKS[check](Subject("honest", Honest))
    assert found.status != "fail", found


@pytest.mark.parametrize(("check", "cls"), FAILURES, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_mechanism_fails_its_check(check, cls):
    assert CHECKS[check](Subject("broken", cls)).status == "fail"


def test_every_check_is_shown_to_fail():
    of_the_repository = {"docstring_fields", "configuration_matches"}
    of_proofs = {
        check.__name__ for check in checks_in(conformance_proofs)
    }  # tests/models/test_proofs_can_fail.py
    assert {check for check, _ in FAILURES} | of_the_repository | of_proofs == set(CHECKS)


def test_a_configuration_that_differs_from_the_constructor_fails(tmp_path, monkeypatch):
    file = tmp_path / "softmax.yaml"
    monkeypatch.setattr(conformance_numerics, "_configuration", lambda name: file)
    for text, status in (
        ("name: softmax\nkernel: fused\n", "pass"),
        ("name: softmax\nkernel: math\n", "fail"),
        ("name: softmax\n", "fail"),
        ("name: softmax\nkernel: fused\nwindow: 3\n", "fail"),
    ):
        file.write_text(text)
        assert CHECKS["configuration_matches"](subject("softmax")).status == status, text
    file.unlink()
    assert CHECKS["configuration_matches"](subject("softmax")).status == "fail"


def test_a_docstring_without_the_fields_fails(monkeypatch):
    monkeypatch.setattr("models.linear.__doc__", "Linear attention.\n\nPaper    one\nComputes nothing\n")
    found = CHECKS["docstring_fields"](subject("linear"))
    assert found.detail == "missing: Cost, Exact, Padding, Differs"


class Leaky(Block):
    """Hands a mean over all positions, padding included, to the next layer."""

    def __init__(self, place: Place, *, d_ff: int, gain: float = 1.0) -> None:
        super().__init__(place)
        self.up, self.gain = nn.Linear(place.d_model, d_ff), gain
        self.down = nn.Linear(d_ff, place.d_model)

    def init_carry(self, batch_size: int) -> Tensor:
        return self.up.weight.new_zeros(batch_size, self.place.d_model)

    def forward(self, x, mask, carry):
        return x + self.gain * self.down(self.up(x + carry[:, None])), x.mean(1)


def test_what_a_block_hands_on_is_seen():
    assert CHECKS["shape_and_dtype"](Subject("leaky", Leaky)).status == "pass"
    assert CHECKS["content_invariance"](Subject("leaky", Leaky)).status == "fail"


class ReadsAnImage(Honest):
    """Adds to each position the mean of its row and of its column."""

    because = {"length_invariant": "padding changes the rows", "uses_grid": "it means over rows and columns"}
    traits = Traits(uses_grid=True, length_invariant=False, uses_order=True, because=because)

    def attend(self, q, k, v, mask):
        side = int(v.shape[2] ** 0.5)
        if side**2 != v.shape[2]:
            raise ValueError(f"{v.shape[2]} positions are no square image")
        image = (v if mask is None else v * mask[:, None, :, None]).unflatten(2, (side, side))
        return q + k + (image + image.mean(2, keepdim=True) + image.mean(3, keepdim=True)).flatten(2, 3)


@pytest.mark.parametrize("check", CHECKS)
def test_a_mechanism_for_square_images_is_given_square_lengths(check):
    found = CHECKS[check](Subject("image", ReadsAnImage))
    assert found.status != "fail", found
