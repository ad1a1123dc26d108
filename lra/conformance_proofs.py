"""Checks against what tests/models/proofs knows: a reference, limits, public implementations, planted faults.

In a clone they are part of `lra check-model`; an installed wheel has no tests, and they are n/a.
"""

import copy
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lra.conformance_subject import (
    EXACT,
    Outcome,
    Probe,
    Subject,
    change,
    check,
    failed,
    largest,
    not_applicable,
    passed,
    within,
)
from lra.errors import UserError

COMPARED_AT = ((1, 1.0), (2, 1.0), (17, 1.0), (17, 4.0), (63, 4.0), (150, 1.0))  # length, scale of the inputs
FAULTS_SHOW_AT = ((17, 1.0), (17, 4.0), (63, 1.0))
GRADIENT_LENGTHS = (2, 17)
FAULT_NAMES = ("no scale", "no mask", "k and v swapped", "window off by one", "wrong eps")


@check("proof", "outputs equal a float64 reference written from the formula alone, at five lengths, any mask")
def equals_reference(subject: Subject) -> Outcome:
    if (proof := proof_of(subject)) is None:
        return _no_proof(subject)
    cases = cases_of(subject, proof)
    errors = [output_error(subject, proof, own, *size) for own in cases for size in COMPARED_AT]
    return within(largest(errors), EXACT, _count(len(cases), "set", "of arguments"))


@check("proof", "gradients of inputs and parameters equal the reference's")
def gradients_equal_reference(subject: Subject) -> Outcome:
    if (proof := proof_of(subject)) is None:
        return _no_proof(subject)
    cases = cases_of(subject, proof)
    errors = [gradient_error(subject, proof, own, length) for own in cases for length in GRADIENT_LENGTHS]
    return within(largest(errors), EXACT, _count(len(cases), "set", "of arguments"))


@check("proof", "in its limit case it equals softmax or the dense kernel")
def equals_limits(subject: Subject) -> Outcome:
    if (proof := proof_of(subject)) is None:
        return _no_proof(subject)
    limits = getattr(proof, "LIMITS", [])
    if not limits:
        return _ruled_out(proof, "NO_LIMIT", "LIMITS")
    return _worst([(limit.claim, limit.measure(), limit.tolerance) for limit in limits])


@check("proof", "it equals an independent public implementation")
def equals_oracles(subject: Subject) -> Outcome:
    if (proof := proof_of(subject)) is None:
        return _no_proof(subject)
    found, missing = [], []
    for oracle in getattr(proof, "ORACLES", []):
        if lacking := [name for name in oracle.needs if not _is_installed(name)]:
            missing.append(f"{oracle.source}: not compared, {', '.join(lacking)} is not installed")
        else:
            found.append((f"{oracle.source}: {oracle.claim}", oracle.measure(), oracle.tolerance))
    if found:
        outcome = _worst(found)
        return replace(outcome, detail="; ".join([outcome.detail, *missing]))
    return not_applicable("; ".join(missing)) if missing else _ruled_out(proof, "NO_ORACLE", "ORACLES")


@check("proof", "each of five classical mistakes, planted in its file, moves its outputs off the reference")
def faults_are_caught(subject: Subject) -> Outcome:
    if (proof := proof_of(subject)) is None:
        return _no_proof(subject)
    told, honest, plants = [], {}, []
    for fault in FAULT_NAMES:
        plant = proof.FAULTS.get(fault, "")
        if isinstance(plant, str):
            if not plant.strip():
                return failed(f"{fault}: neither planted nor ruled out")
            told.append(f"{fault}: cannot be made, {plant}")
            continue
        if plant in plants:
            return failed(f"{fault}: the same plant stands for another fault")
        plants.append(plant)
        key = repr(plant.own)
        if key not in honest:
            honest[key] = fault_error(subject, proof, plant.own)
        with plant.planted(subject.name):
            moved = fault_error(subject, proof, plant.own)
        if not honest[key] <= EXACT:
            return failed(f"{fault}: off by {honest[key]:.1e} without the fault")
        if not EXACT < moved < float("inf"):
            return failed(f"{fault}: planted, and outputs are off by {moved:.1e}")
        told.append(f"{fault}: caught, {moved:.0e}")
    return passed("; ".join(told))


def proofs() -> ModuleType | None:
    """The package tests/models/proofs of the clone this runs from; None in an installed wheel."""
    file = Path(__file__).resolve().parent.parent / "tests" / "models" / "proofs" / "__init__.py"
    if not file.is_file():
        return None
    known = sys.modules.get("proofs")
    if known is None:
        where = [str(file.parent)]
        spec = importlib.util.spec_from_file_location("proofs", file, submodule_search_locations=where)
        known = sys.modules["proofs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(known)
    if Path(known.__file__ or "").resolve() != file:
        raise UserError(f"another module called 'proofs' is imported from {known.__file__}; it hides {file}")
    return known


def proof_of(subject: Subject) -> ModuleType | None:
    """The proof of a mechanism of this repository; None for one from outside, or without a proof."""
    package = proofs()
    ours = subject.cls.__module__ == f"models.{subject.name}"
    return package.PROOFS.get(subject.name) if package is not None and ours else None


def cases_of(subject: Subject, proof: ModuleType) -> list[dict]:
    """The arguments to compare under: those given to the subject, else all that the proof lists."""
    if not proof.CASES:
        raise ValueError(f"tests/models/proofs/{subject.name}.py lists no CASES to compare under")
    return [dict(subject.own)] if subject.own else proof.CASES


def run_reference(proof: ModuleType, probe: Probe, x: Tensor, mask: Tensor | None) -> Tensor:
    """The reference on the layers of a probe, called as the probe is; it may not call the mechanism."""
    with _without_forward(probe):
        if len(probe.layers) == 1:
            return proof.reference(probe.layers[0], x, mask)
        carry = None
        for layer in probe.layers:
            x, carry = proof.reference(layer, x, mask, carry)
        return x


@contextmanager
def _without_forward(probe: Probe) -> Iterator[None]:
    """Inside, the methods of the probe's mechanisms that mix raise: a reference is not the mechanism."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the reference calls the mechanism that it should prove")

    names = ("forward", "attend", "forward_packed", "attend_packed", "mix")
    for layer in probe.layers:
        for name in names:
            if hasattr(layer, name):
                layer.__dict__[name] = refuse
    try:
        yield
    finally:
        for layer in probe.layers:
            for name in names:
                layer.__dict__.pop(name, None)


def inputs_of(
    subject: Subject, length: int, scale: float = 1.0, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x [3 l d] with each mask it is compared under: none, ragged prefixes, and one with holes."""
    x = subject.inputs(3, length, seed=seed) * scale
    yield x, None
    yield x, subject.prefix([length, max(1, length // 2 + 1), 1], length)
    if not subject.traits.needs_prefix_mask:
        holes = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.6
        holes[:, length // 2] = True
        yield x, holes.to(x.device)


def output_error(
    subject: Subject,
    proof: ModuleType,
    own: Mapping[str, object],
    length: int,
    scale: float = 1.0,
    **place: object,
) -> float:
    """The largest relative difference between mechanism and reference over the masks."""
    s = _sized(subject, own, 160)
    (length,) = s.lengths(length)
    return _distance(s, proof, s.probe(**place), length, scale)


def gradient_error(subject: Subject, proof: ModuleType, own: Mapping[str, object], length: int) -> float:
    """Largest difference of a gradient, by the inputs or a parameter, relative to the largest gradient."""
    s = _sized(subject, own, 32)
    (length,) = s.lengths(length)
    probe, weight, errors = s.probe(), s.inputs(3, length, seed=5), []
    beside = copy.deepcopy(probe).cpu()
    for x, mask in inputs_of(s, length):
        expected = _gradients(
            beside, *_on_cpu(x, mask), weight.cpu(), lambda x, m: run_reference(proof, beside, x, m)
        )
        found = {n: g.cpu() for n, g in _gradients(probe, x, mask, weight, probe).items()}
        size = max([1e-300, *(g.abs().max().item() for g in expected.values())])
        zero = torch.zeros((), dtype=x.dtype)
        errors += [
            (expected.get(n, zero) - found.get(n, zero)).abs().max().item() / size
            for n in expected.keys() | found.keys()
        ]
    return largest(errors)


def fault_error(subject: Subject, proof: ModuleType, own: Mapping[str, object]) -> float:
    """How far outputs are off, also where queries and keys lie far below zero, so that an eps matters."""
    errors = [output_error(subject, proof, own, *size) for size in FAULTS_SHOW_AT]
    return largest([*errors, vanishing_error(subject, proof, own)])


def vanishing_error(subject: Subject, proof: ModuleType, own: Mapping[str, object]) -> float:
    """Queries and keys far below zero leave features that are hardly more than eps."""
    s = _sized(subject, own, 32)
    probe = s.probe()
    if not hasattr(probe.first, "qkv"):
        return 0.0
    with torch.no_grad():
        probe.first.qkv.bias[: 2 * s.d_model] -= 9.0
    return _distance(s, proof, probe, 17, 0.3)


@torch.no_grad()
def _distance(subject: Subject, proof: ModuleType, probe: Probe, length: int, scale: float) -> float:
    """The largest relative difference over the masks; the reference computes on the CPU, on a copy."""
    beside, errors = copy.deepcopy(probe).cpu(), []
    for x, mask in inputs_of(subject, length, scale):
        expected = run_reference(proof, beside, *_on_cpu(x, mask))
        errors.append(change(expected, probe(x, mask).cpu(), None if mask is None else mask.cpu()))
    return largest(errors)


def _on_cpu(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.cpu(), None if mask is None else mask.cpu()


def _sized(subject: Subject, own: Mapping[str, object], max_len: int) -> Subject:
    return Subject(subject.name, subject.cls, dict(own), max_len=max_len, device=subject.device)


def _gradients(probe, x, mask, weight, forward) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    out = forward(leaf, mask) * weight
    loss = (out if mask is None else out[mask]).sum()
    if not loss.requires_grad:
        return {}
    leaves = {"x": leaf, **dict(probe.named_parameters())}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: g for n, g in zip(leaves, found, strict=True) if g is not None and g.any()}


def _worst(found: list[tuple[str, float, float]]) -> Outcome:
    """The number nearest to its tolerance, or farthest past it; every claim is named with its own number."""
    told = "; ".join(f"{claim}: {measured:.1e}" for claim, measured, _ in found)
    _, measured, tolerance = max(found, key=lambda f: f[1] / f[2] if f[1] == f[1] else float("inf"))
    return within(measured, tolerance, told)


def _ruled_out(proof: ModuleType, reason: str, missing: str) -> Outcome:
    said = getattr(proof, reason, "").strip()
    return not_applicable(said) if said else failed(f"the proof has neither {missing} nor {reason}")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _count(number: int, noun: str, rest: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'} {rest}"


def _no_proof(subject: Subject) -> Outcome:
    if subject.cls.__module__ != f"models.{subject.name}":
        return not_applicable("asked only of mechanisms in models/")
    if proofs() is None:
        return not_applicable("the proofs are in tests/models/proofs of a clone")
    return failed(f"write tests/models/proofs/{subject.name}.py")
