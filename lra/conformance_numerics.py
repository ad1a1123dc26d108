"""Checks of gradients, of determinism and state, and of what is written about a mechanism."""

import inspect
import io
import math
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lra.conformance_subject import (
    BACKBONE_SETTINGS,
    EXACT,
    Outcome,
    Probe,
    Subject,
    change,
    check,
    deterministic,
    failed,
    largest,
    not_applicable,
    passed,
    tensors_of,
    within,
)
from models.common import own_parameters

DOCSTRING_FIELDS = ("Paper", "Computes", "Cost", "Exact", "Padding", "Differs")
REDRAW_STEPS = (0, 1, 2, 10, 100, 999, 1000, 1001, 5000, 10_000)


@check("gradients", "gradcheck: derivatives by every input and parameter match finite differences in float64")
def gradcheck(subject: Subject) -> Outcome:
    tiny = Subject(
        subject.name, subject.cls, subject.own, max_len=9, d_model=4, num_heads=2, device=subject.device
    )
    probe, (length,) = tiny.probe(), tiny.lengths(5)
    names, parameters = (
        zip(*probe.named_parameters(), strict=True) if any(True for _ in probe.parameters()) else ((), ())
    )
    mask = tiny.prefix([length, max(1, length - 2)], length)

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        out = torch.func.functional_call(probe, dict(zip(names, values, strict=True)), (x, mask))
        return out * mask[..., None]

    leaves = [t.detach().clone().requires_grad_() for t in (tiny.inputs(2, length), *parameters)]
    surrogate = subject.traits.surrogate_gradient
    with subject.repeatable():
        right = torch.autograd.gradcheck(outputs, leaves, fast_mode=True, raise_exception=not surrogate)
    if surrogate and right:
        return failed("claims surrogate_gradient=True, yet all derivatives match")
    return passed("surrogate_gradient=True" if surrogate else f"{len(leaves)} tensors")


@check("gradients", "every parameter gets a finite gradient")
def gradients_reach_parameters(subject: Subject) -> Outcome:
    probe, (length,) = subject.probe(), subject.lengths(100)
    x, mask = subject.inputs(2, length), subject.prefix([length, length // 2], length)
    out = probe.train()(x, mask)
    parameters = dict(probe.named_parameters())
    if not parameters:
        return not_applicable("no parameters")
    (out * subject.inputs(2, length, seed=3))[mask].sum().backward()
    missing = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
    if missing:
        return failed(f"no gradient reaches {', '.join(missing)}")
    broken = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    return failed(f"not finite: {', '.join(broken)}") if broken else passed(f"{len(parameters)} parameters")


@check("gradients", "inputs at padded positions get gradient zero")
def no_gradient_at_padding(subject: Subject) -> Outcome:
    if not subject.traits.content_invariant:
        return not_applicable("content_invariant=False")
    probe, (length,) = subject.probe(), subject.lengths(100)
    x, mask = subject.inputs(3, length).requires_grad_(), subject.prefix([length, length // 2, 1], length)
    out = probe(x, mask)
    if not out.requires_grad:
        return passed("outputs do not depend on inputs")
    (out * subject.inputs(3, length, seed=3))[mask].sum().backward()
    return within((x.grad[~mask].abs().max() / x.grad.abs().max().clamp_min(1e-300)).item(), 1e-12)


@check("determinism and state", "the same seed gives the same bits: state, outputs in training, gradients")
def same_seed_same_bits(subject: Subject) -> Outcome:
    def once() -> list[Tensor]:
        probe, (length,) = subject.probe(dtype=torch.float32), subject.lengths(64)
        torch.manual_seed(7)
        x = subject.inputs(2, length, dtype=torch.float32).requires_grad_()
        out = probe.train()(x, subject.prefix([length, length // 2], length))
        if out.requires_grad:
            out.square().sum().backward()
        grads = [x.grad, *(p.grad for p in probe.parameters())]
        return [*probe.state_dict().values(), out, *(g for g in grads if g is not None)]

    with subject.repeatable():
        torch.manual_seed(1)
        first = once()
        torch.manual_seed(2)
        torch.rand(3)
        same = [_same_bits(a, b) for a, b in zip(first, once(), strict=True)]
    return (
        passed(f"{len(same)} tensors")
        if all(same)
        else failed(f"{same.count(False)} of {len(same)} tensors differ")
    )


@check(
    "determinism and state", "two evaluations of one input are equal, unless the mechanism draws at random"
)
def evaluation_repeats(subject: Subject) -> Outcome:
    probe, moved = subject.probe(dtype=torch.float32), []
    for length in subject.lengths(17, 520):
        x, mask = (
            subject.inputs(2, length, dtype=torch.float32),
            subject.prefix([length, length // 2], length),
        )
        before = probe(x, mask)
        moved += [change(before, probe(x, mask), mask) for _ in range(3)]
    measured = largest(moved)
    if not subject.traits.stochastic_eval:
        return within(measured, 0.0, "stochastic_eval=False")
    seen = 0 < measured < math.inf
    return Outcome("pass" if seen else "fail", "stochastic_eval=True", measured, 0.0)


@check(
    "determinism and state", "a state_dict, saved and loaded into another instance, gives the same outputs"
)
def state_dict_round_trip(subject: Subject) -> Outcome:
    (length,) = subject.lengths(100)
    x, mask = subject.inputs(2, length, dtype=torch.float32), subject.prefix([length, length // 2], length)
    saved, other = subject.probe(dtype=torch.float32), subject.probe(seed=1, dtype=torch.float32)
    _train_a_little(saved, x, mask)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(3)
    before = saved(x, mask)
    torch.manual_seed(3)
    return within(change(before, other(x, mask), mask), 0.0)


@check("determinism and state", "two instances share no tensor, and no class holds one")
def instances_share_nothing(subject: Subject) -> Outcome:
    # In float32, since a conversion copies; both alive, or the second gets the memory of the first.
    probes = [subject.probe(dtype=torch.float32) for _ in range(2)]
    one, other = (_storages(probe) for probe in probes)
    both = [name for name, storage in one.items() if storage in set(other.values())]
    held = [
        f"{type(module).__name__}.{name}"
        for module in probes[0].modules()
        for base in type(module).__mro__
        for name, value in vars(base).items()
        if isinstance(value, Tensor)
    ]
    return failed(f"shared: {', '.join(both + held)}") if both + held else passed(f"{len(one)} tensors")


@check("determinism and state", "inputs are left as they were")
def inputs_untouched(subject: Subject) -> Outcome:
    probe, (length,) = subject.probe(), subject.lengths(33)
    x, mask = subject.inputs(2, length), subject.prefix([length, length // 2], length)
    before = x.clone(), mask.clone()
    probe(x, mask)
    return (
        passed()
        if _same_bits(before[0], x) and _same_bits(before[1], mask)
        else failed("x or mask was written to")
    )


@check(
    "determinism and state",
    "deterministic algorithms suffice, and no output depends on memory that nobody wrote",
)
def deterministic_algorithms(subject: Subject) -> Outcome:
    (length,) = subject.lengths(100)
    x, mask = subject.inputs(2, length), subject.prefix([length, length // 2], length)
    before = subject.probe()(x, mask)
    with deterministic():
        probe = subject.probe()
        out = probe(x.requires_grad_(), mask)
        if out.requires_grad:
            out.square().sum().backward()
    grads = [g for g in (x.grad, *(p.grad for p in probe.parameters())) if g is not None]
    if not all(g.isfinite().all() for g in grads):
        return failed("gradients hold values that nobody wrote")
    return within(change(before, out, mask), EXACT)


@check("determinism and state", "training_update writes in place, and equally for equal seeds")
def updates_in_place(subject: Subject) -> Outcome:
    probes = [subject.probe() for _ in range(2)]
    before, written = [_storages(probe) for probe in probes], []
    start = {name: value.clone() for name, value in probes[0].state_dict().items()}
    for probe in probes:
        torch.manual_seed(11)
        for step in REDRAW_STEPS:
            for layer in probe.layers:
                layer.training_update(step)
    if [_storages(probe) for probe in probes] != before:
        return failed("training_update replaced a tensor; copy into it instead")
    for name, value in probes[0].state_dict().items():
        if not _same_bits(value, probes[1].state_dict()[name]):
            return failed(f"{name} differs between two instances of equal seed")
        if not _same_bits(value, start[name]):
            written.append(name)
    return passed(f"writes {', '.join(written)}" if written else "writes nothing")


@check("determinism and state", "weights of one length limit fit another, unless parameters are sized by it")
def fixed_length(subject: Subject) -> Outcome:
    small, large = (subject.lengths(n)[0] for n in (256, subject.max_len))
    if small == large:
        return not_applicable("needs a max_len above 256")
    shapes = [{n: v.shape for n, v in subject.probe(max_len=n).state_dict().items()} for n in (small, large)]
    differ = sorted(
        name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
    )
    if subject.traits.fixed_length:
        return (
            passed(f"fixed_length=True: {', '.join(differ)}")
            if differ
            else failed("claims True, yet weights fit")
        )
    return (
        failed(f"claims fixed_length=False, yet these are sized by max_len: {', '.join(differ)}")
        if differ
        else passed()
    )


@check("what is written", "every unusual answer among its traits has a reason")
def exceptions_have_reasons(subject: Subject) -> Outcome:
    without = [name for name, reason in subject.traits.exceptions().items() if not reason.strip()]
    return failed(f"Traits.because has nothing about {', '.join(without)}") if without else passed()


@check("what is written", "its file's docstring has the fields that tables quote")
def docstring_fields(subject: Subject) -> Outcome:
    if not _in_repository(subject):
        return not_applicable("asked only of mechanisms in models/")
    lines = (inspect.getdoc(sys.modules[subject.cls.__module__]) or "").splitlines()
    missing = [name for name in DOCSTRING_FIELDS if not any(line.startswith(name + " ") for line in lines)]
    return failed(f"missing: {', '.join(missing)}") if missing else passed(lines[0])


@check("what is written", "conf/model/<name>.yaml holds the constructor's own parameters with its defaults")
def configuration_matches(subject: Subject) -> Outcome:
    path = _configuration(subject.name)
    if not _in_repository(subject) or path is None:
        return not_applicable("asked only of mechanisms in models/ beside their conf/")
    if not path.is_file():
        return failed(f"{path.name} does not exist in conf/model/")
    written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    expected = {"name": subject.name}
    for name, parameter in own_parameters(subject.cls).items():
        if name not in BACKBONE_SETTINGS:
            default = "???" if parameter.default is parameter.empty else parameter.default
            expected[name] = list(default) if isinstance(default, tuple) else default
    wrong = [
        f"{name}: file {written.get(name, 'nothing')!r}, constructor {expected.get(name, 'nothing')!r}"
        for name in sorted(written.keys() | expected.keys())
        if name not in written or name not in expected or written[name] != expected[name]
    ]
    return failed("; ".join(wrong)) if wrong else passed(f"{len(expected) - 1} parameters")


def _in_repository(subject: Subject) -> bool:
    return subject.cls.__module__ == f"models.{subject.name}"


def _configuration(name: str) -> Path | None:
    """conf/model/<name>.yaml beside the package, in a clone and in a wheel; None where there is no conf/."""
    here = Path(__file__).resolve().parent
    folders = [folder / "conf" / "model" for folder in (here.parent, here)]
    return next((folder / f"{name}.yaml" for folder in folders if folder.is_dir()), None)


def _train_a_little(probe: Probe, x: Tensor, mask: Tensor) -> None:
    """One forward and two updates, so that statistics and buffers are not what they were at the start."""
    probe.train()(x, mask)
    for layer in probe.layers:
        layer.training_update(0)
        layer.training_update(1000)
    probe.eval()


def _storages(module: nn.Module) -> dict[str, int]:
    return {name: value.untyped_storage().data_ptr() for name, value in tensors_of(module) if value.numel()}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach(), b.detach())
