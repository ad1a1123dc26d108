"""Checks of the interface, of padding, and of rows and order: what one token may do to another."""

import itertools
import math

import torch
from torch import Tensor

from lra.conformance_packed import carry_error, packed_error, padded_rows
from lra.conformance_subject import (
    EXACT,
    POISON,
    SIZES,
    Outcome,
    Subject,
    as_claimed,
    change,
    check,
    failed,
    largest,
    not_applicable,
    passed,
    within,
)
from models.common import Block, Mixer, own_parameters

SINGLE = 1e-4  # float32 rounding through one layer at inputs of size 1; found 1e-7 to 1e-5
HALF = 2e-2  # bfloat16 keeps 8 bits, 4e-3 per operation; root mean square over the output, found 2e-3 to 4e-3


@check("interface", "every length from 1 to a small max_len works, and one batch row or three")
def any_length(subject: Subject) -> Outcome:
    small = 16 if subject.traits.uses_grid else 70
    probe = subject.probe(max_len=small, dtype=torch.float32)
    lengths = subject.lengths(*range(1, small + 1))
    for length in lengths:
        for batch_size in (1, 3):
            x = subject.inputs(batch_size, length, dtype=torch.float32)
            _same_form(x, probe(x, subject.prefix([length] * batch_size, length)))
    return passed(f"{len(lengths)} lengths")


@check(
    "interface",
    "shape and dtype are kept at lengths 1, 2, 17, 63, 64, 1000 and max_len, in float32 and bfloat16",
)
def shape_and_dtype(subject: Subject) -> Outcome:
    for dtype in (torch.float32, torch.bfloat16):
        probe = subject.probe(dtype=dtype)
        for length in subject.lengths(1, 2, 17, 63, 64, 1000, subject.max_len):
            for batch_size in (1, 3):
                x = subject.inputs(batch_size, length, dtype=dtype)
                _same_form(
                    x, probe(x, subject.prefix([length] + [length // 2 + 1] * (batch_size - 1), length))
                )
    return passed()


@check("interface", "head width and bias of the place are honoured")
def place_is_honoured(subject: Subject) -> Outcome:
    x = subject.inputs(2, 16)
    for place in ({"d_head": 6}, {"bias": False}, {"num_heads": 1}):
        try:
            _same_form(x, subject.probe(max_len=64, **place)(x, subject.prefix([16, 9], 16)))
        except Exception as error:
            return failed(f"with {place}: {type(error).__name__}: {error}")
    return passed()


@check("interface", "rotary positions turn queries and keys where there are any")
def rotary_positions(subject: Subject) -> Outcome:
    probe = subject.probe(max_len=64)
    if not hasattr(probe.first, "qkv"):
        return not_applicable("it has no queries and keys; the backbone refuses positions=rotary for it")
    x = subject.inputs(2, *subject.lengths(33))
    moved = change(probe(x), subject.probe(max_len=64, rotary_base=10_000.0)(x))
    if not EXACT < moved < math.inf:
        return failed(f"Place.rotary_base changes the output by {moved:.1e}")
    return passed(f"outputs move by {moved:.1e}")


@check(
    "interface", "aux_loss is None or a scalar, state_size is None or a count that never shrinks with length"
)
def hooks_answer(subject: Subject) -> Outcome:
    probe = subject.probe()
    probe(subject.inputs(2, 16), subject.prefix([16, 9], 16))
    aux, sizes = probe.first.aux_loss(), [probe.first.state_size(length) for length in (1, 100, 1000)]
    if aux is not None and not (isinstance(aux, Tensor) and aux.dim() == 0 and aux.isfinite()):
        return failed(f"aux_loss() gave {aux!r}")
    if sizes == [None] * 3:
        return passed("state_size: None")
    if not all(isinstance(size, int) for size in sizes) or not 0 <= sizes[0] <= sizes[1] <= sizes[2]:
        return failed(f"state_size(1), (100), (1000) gave {sizes}")
    return passed(f"state_size(1000) = {sizes[2]}")


@check("interface", "every dropout it takes acts in training, repeatably for a seed, and not in evaluation")
def dropout_acts(subject: Subject) -> Outcome:
    names = [name for name in own_parameters(subject.cls) if "dropout" in name]
    x, mask = subject.inputs(2, 25), subject.prefix([25, 12], 25)
    bounds = torch.tensor([0, 25, 37], dtype=torch.int32, device=x.device)
    ways = {"": lambda probe: probe(x, mask)[mask]}
    if subject.traits.packed:
        ways[" over packed rows"] = lambda probe: probe.forward_packed(x[mask], bounds, 25)
    for name, (way, call) in itertools.product(names, ways.items()):
        plain = call(subject.with_own(dict.fromkeys(names, 0.0)).probe(max_len=25))
        probe = subject.with_own({**dict.fromkeys(names, 0.0), name: 0.5}).probe(max_len=25)
        if change(plain, call(probe)) > EXACT:
            return failed(f"{name}=0.5 acts in evaluation{way}")
        torch.manual_seed(3)
        dropped = call(probe.train())
        torch.manual_seed(3)
        if change(dropped, call(probe)) > EXACT:
            return failed(f"{name}=0.5 differs between two runs of one seed{way}")
        if not EXACT < change(plain, dropped) < math.inf:
            return failed(f"{name}=0.5 changes nothing in training{way}")
    return passed(", ".join(names)) if names else not_applicable("it takes none")


@check("interface", "bfloat16 weights, and autocast over float32 weights, stay close to float32")
def bf16_close_to_fp32(subject: Subject) -> Outcome:
    half = subject.probe(dtype=torch.bfloat16, stirred=False)
    wide = subject.probe(dtype=torch.float32, stirred=False)
    wide.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    errors = []
    for length in subject.lengths(64, 520):
        x, mask = subject.inputs(2, length).bfloat16(), subject.prefix([length, length // 2], length)
        with torch.no_grad():
            expected = wide(x.float(), mask)[mask]
            with torch.autocast(x.device.type, torch.bfloat16):
                mixed = wide(x.float(), mask)[mask].float()
            errors += [_rms_error(expected, half(x, mask)[mask].float()), _rms_error(expected, mixed)]
    return within(largest(errors), HALF)


@check("padding", "what stands at padded positions never reaches a real output")
def content_invariance(subject: Subject) -> Outcome:
    return as_claimed("content_invariant", subject.traits.content_invariant, content_leak(subject))


@check("padding", "more padding never changes a real output")
def length_invariance(subject: Subject) -> Outcome:
    return as_claimed("length_invariant", subject.traits.length_invariant, length_leak(subject))


@check(
    "padding",
    "values of 1e4 at padded positions, in float32, change no real output and make none infinite or NaN",
)
def poisoned_padding(subject: Subject) -> Outcome:
    probe, moved = subject.probe(dtype=torch.float32), []
    for length in subject.lengths(*SIZES):
        x, mask = subject.inputs(3, length, dtype=torch.float32), subject.prefix(_ragged(length), length)
        clean = probe(x * mask[..., None], mask)
        for poison in (POISON, -POISON, POISON * subject.inputs(3, length, seed=9, dtype=torch.float32)):
            poisoned = probe(torch.where(mask[..., None], x, poison), mask)
            if not poisoned[mask].isfinite().all():
                return failed(f"outputs at real positions are not finite at length {length}")
            moved.append(change(clean, poisoned, mask))
    if not subject.traits.content_invariant:
        return passed("finite; content_invariant=False allows the change")
    return within(largest(moved), SINGLE)


@check("padding", "mask None means that every position is real")
def no_mask_means_all_real(subject: Subject) -> Outcome:
    probe, moved = subject.probe(), []
    for length in subject.lengths(*SIZES):
        x = subject.inputs(2, length)
        moved.append(change(probe(x), probe(x, subject.prefix([length] * 2, length))))
    return within(largest(moved), EXACT)


@check(
    "padding",
    "a row that is padding throughout gives finite outputs and gradients and leaves other rows alone",
)
def wholly_padded_row(subject: Subject) -> Outcome:
    for dtype in (torch.float64, torch.float32):
        probe, (length,) = subject.probe(dtype=dtype), subject.lengths(25)
        x = subject.inputs(2, length, dtype=dtype).requires_grad_()
        out = probe(x, subject.prefix([length, 0], length))
        if out.requires_grad:
            out.square().sum().backward()
        grads = [g for g in (x.grad, *(p.grad for p in probe.parameters())) if g is not None]
        if not all(t.isfinite().all() for t in (out, *grads)):
            return failed(f"outputs or gradients are not finite in {dtype}")
        if subject.traits.batch_invariant and dtype == torch.float64:
            moved = change(probe(x[:1], subject.prefix([length], length)), out[:1])
    return within(moved, EXACT) if subject.traits.batch_invariant else passed("batch_invariant=False")


@check("padding", "a mask with holes is honoured, or raises ValueError where only prefixes are possible")
def mask_with_holes(subject: Subject) -> Outcome:
    probe, (length,) = subject.probe(), subject.lengths(100)
    x = subject.inputs(2, length)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(5)).to(x.device) < 0.6
    mask[:, 0], mask[:, 1] = False, True
    try:
        before = probe(x, mask)
    except ValueError as error:
        if subject.traits.needs_prefix_mask:
            return passed(f"raises: {error}")
        raise
    if subject.traits.needs_prefix_mask:
        return failed("claims needs_prefix_mask=True, yet takes a mask with holes without raising ValueError")
    after = probe(torch.where(mask[..., None], x, subject.inputs(2, length, seed=7)), mask)
    return as_claimed("content_invariant", subject.traits.content_invariant, change(before, after, mask))


@check("rows and order", "a row's output does not depend on the rows beside it")
def batch_invariance(subject: Subject) -> Outcome:
    return as_claimed("batch_invariant", subject.traits.batch_invariant, batch_leak(subject))


@check(
    "rows and order",
    "reordering tokens reorders outputs, unless the mechanism uses order, and then it does not",
)
def order(subject: Subject) -> Outcome:
    probe, moved = subject.probe(), []
    for length in subject.lengths(8, 64, 600):
        for seed in (0, 1):
            x = subject.inputs(2, length, seed=seed) * (1 + 3 * seed)
            where = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(x.device)
            moved.append(change(probe(x)[:, where], probe(x[:, where])))
    measured = largest(moved)
    if subject.traits.uses_order:
        seen = EXACT < measured < math.inf
        detail = (
            "uses_order=True" if seen else "claims uses_order=True, yet every permutation commutes with it"
        )
        return Outcome("pass" if seen else "fail", detail, measured, EXACT)
    return within(measured, EXACT, "uses_order=False")


@check(
    "rows and order",
    "the packed path agrees with the padded one, outputs and gradients, and filler rows reach nothing",
)
def packed_agrees(subject: Subject) -> Outcome:
    overrides = [name for name in ("forward_packed", "attend_packed") if _overrides(subject.cls, name)]
    if not subject.traits.packed:
        if overrides and not subject.cls.traits.packed:  # an option may close a path that the class has
            return failed(f"claims packed=False, yet defines {', '.join(overrides)}")
        return not_applicable("no packed path; the backbone pads around it")
    if not overrides:
        return failed("claims packed=True, yet defines neither forward_packed nor attend_packed")
    half, real = subject.probe(max_len=64, dtype=torch.bfloat16), [64, 30]
    rows = subject.inputs(1, sum(real), dtype=torch.bfloat16)[0]
    out = half.forward_packed(rows, torch.tensor([0, 64, 94], dtype=torch.int32, device=rows.device), 64)
    _same_form(rows, out)
    padded = padded_rows(subject, half, rows, real, 64)
    if not (error := _rms_error(padded.float(), out.float())) <= HALF:
        return failed(f"in bfloat16 packed and padded differ by {error:.1e}")
    rotary = [None, 10_000.0] if hasattr(subject.probe(max_len=8).first, "qkv") else [None]
    errors = [packed_error(subject, base, limit) for base in rotary for limit in (330, 400)]
    if subject.is_block:
        errors.append(carry_error(subject))
    return within(largest(errors), EXACT)


def content_leak(subject: Subject) -> float:
    """Largest relative change at real positions when only the content of padding changes."""
    probe, moved = subject.probe(), []
    for length in subject.lengths(*SIZES):
        mask = subject.prefix(_ragged(length), length)
        for seed, scale in ((0, 1.0), (1, 4.0)):
            x = subject.inputs(3, length, seed=seed) * scale
            before = probe(torch.where(mask[..., None], x, 0.0), mask)
            for other in (subject.inputs(3, length, seed=seed + 50), x.new_tensor(POISON)):
                moved.append(change(before, probe(torch.where(mask[..., None], x, other), mask), mask))
    return largest(moved)


def length_leak(subject: Subject) -> float:
    """Largest relative change at real positions when only padding is appended."""
    probe, moved = subject.probe(), []
    longer = {7: (8, 64), 100: (101, 256), 520: (600, 1024)}
    for length, targets in longer.items():
        for target in targets:
            if subject.lengths(length) == subject.lengths(target):
                continue
            (short,), (long,) = subject.lengths(length), subject.lengths(target)
            for seed, scale in ((0, 1.0), (1, 4.0)):
                x = subject.inputs(3, long, seed=seed) * scale
                real = _ragged(short)
                before = probe(x[:, :short], subject.prefix(real, short))
                after = probe(x, subject.prefix(real, long))[:, :short]
                moved.append(change(before, after, subject.prefix(real, short)))
    return largest(moved)


def batch_leak(subject: Subject) -> float:
    """Largest relative change of a row's real outputs when other rows stand beside it."""
    probe, moved = subject.probe(), []
    for length in subject.lengths(*SIZES):
        for seed, scale in ((0, 1.0), (1, 4.0)):
            x = subject.inputs(4, length, seed=seed)
            x = x * (
                scale * torch.tensor([1.0, 0.1, 3.0, 10.0], dtype=x.dtype, device=x.device)[:, None, None]
            )
            mask = subject.prefix([*_ragged(length), length], length)
            together = probe(x, mask)
            moved += [
                change(
                    probe(x[row : row + 1], mask[row : row + 1]), together[row : row + 1], mask[row : row + 1]
                )
                for row in range(4)
            ]
    return largest(moved)


def _ragged(length: int) -> list[int]:
    """Three row lengths: full, ragged, and a single token."""
    return [length, max(1, (2 * length) // 3 - 1), 1]


def _same_form(x: Tensor, out: Tensor) -> None:
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} gave {tuple(out.shape)} {out.dtype}")
    if not out.isfinite().all():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} gave values that are not finite")


def _rms_error(expected: Tensor, found: Tensor) -> float:
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return ((found - expected).square().mean().sqrt() / scale).item()


def _overrides(cls: type, name: str) -> bool:
    base = getattr(Block if issubclass(cls, Block) else Mixer, name, None)
    return getattr(cls, name, None) is not base
