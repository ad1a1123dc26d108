"""The packed path of a mechanism against its padded one: outputs, gradients and what a block hands on."""

import torch
from torch import Tensor

from lra.conformance_subject import POISON, Probe, Subject, change, largest


def packed_error(subject: Subject, rotary_base: float | None, limit: int) -> float:
    """Sequences of uneven lengths, one of them empty, and filler rows: packed against padded row by row.

    The longest has more rows than any chunk; the mechanism's own `max_len` may be above the batch's, 330.
    """
    max_len = max(subject.lengths(330))
    real = [subject.lengths(n)[0] for n in (5, 330, 0, 64, 1, 77)]
    probe = subject.probe(max_len=max(subject.lengths(limit)), rotary_base=rotary_base)
    total = sum(real)
    rows, weight = subject.inputs(1, total + 13)[0], subject.inputs(1, total, seed=3)[0]
    cu_seqlens = torch.tensor([0, *real], device=rows.device).cumsum(0).to(torch.int32)
    packed, packed_grads = _packed(probe, rows, weight, cu_seqlens, max_len)
    filler = torch.where(torch.arange(len(rows), device=rows.device)[:, None] < total, rows, POISON)
    refilled, refilled_grads = _packed(probe, filler, weight, cu_seqlens, max_len)

    x = rows.clone().requires_grad_()
    expected = padded_rows(subject, probe, x, real, max_len)
    expected_grads = _gradients((expected * weight).sum(), [x, *probe.parameters()])
    pairs = [(expected, packed), (expected, refilled), *zip(expected_grads, packed_grads, strict=True)]
    pairs += list(zip(expected_grads, refilled_grads, strict=True))
    largest_of_all = max([1e-300, *(grad.abs().max().item() for grad in expected_grads)])
    floor = 1e-6 * largest_of_all  # a gradient that is but rounding is compared with the others' size
    return largest([change(a, b) if a.abs().max() > floor else (b - a).abs().max().item() for a, b in pairs])


def padded_rows(subject: Subject, probe: Probe, x: Tensor, real: list[int], max_len: int) -> Tensor:
    """What the padded path makes of sequences of `real` rows of x [t d] -> [sum of real, d].

    Each is alone and without padding, but for a mechanism that claims to depend on either: then they are one
    batch of the padded length max_len.
    """
    total = sum(real)
    if subject.traits.length_invariant and subject.traits.batch_invariant:
        return torch.cat([probe(rows[None])[0] for rows in x[:total].split(real) if len(rows)])
    mask = subject.prefix(real, max_len)
    padded = x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x[:total])
    return probe(padded, mask)[mask]


def carry_error(subject: Subject) -> float:
    """What a block hands on from packed rows, against what it hands on from a padded batch, for empty
    sequences too; it is given what is no longer the initial carry.
    """
    probe, (length,) = subject.probe(), subject.lengths(150)
    real = [length, 0, 1, length // 2]
    x, mask = subject.inputs(4, length), subject.prefix(real, length)
    cu_seqlens = torch.tensor([0, *real], device=x.device).cumsum(0).to(torch.int32)
    rows = torch.cat([x[mask], x.new_full((5, x.shape[-1]), POISON)])
    carry = probe.first.init_carry(4)
    errors = []
    for _ in range(2):
        expected = probe.first(x, mask, carry)[1]
        found = probe.first.forward_packed(rows, cu_seqlens, length, carry)[1]
        if (expected is None) != (found is None):
            raise ValueError(f"forward hands on {type(expected)}, forward_packed {type(found)}")
        if expected is None:
            return 0.0
        errors.append(change(expected, found))
        carry = expected
    return largest(errors)


def _packed(
    probe: Probe, rows: Tensor, weight: Tensor, cu_seqlens: Tensor, max_len: int
) -> tuple[Tensor, list[Tensor]]:
    x = rows.clone().requires_grad_()
    out = probe.forward_packed(x, cu_seqlens, max_len)
    if not out.isfinite().all():
        raise ValueError("forward_packed gives values that are not finite")
    out = out[: len(weight)]
    return out, _gradients((out * weight).sum(), [x, *probe.parameters()])


def _gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in of]
    grads = torch.autograd.grad(loss, of, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, grads, strict=True)]
