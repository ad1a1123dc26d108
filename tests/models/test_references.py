"""Every mechanism against its float64 reference: outputs, and gradients of inputs and parameters."""

import pytest
import torch
from references import CASES, REFERENCES, cases, run

import models
from lra.conformance import subject
from lra.conformance_subject import change, largest

LENGTHS = (1, 2, 17, 63, 150)
EXACT = 1e-9  # float64; the largest found is 1e-12, through Nystrom's iterated inverse

NAMES = models.names()
EVERY_CASE = [
    pytest.param(name, own, id="-".join([name, *(f"{k}={v}" for k, v in own.items())]))
    for name in NAMES
    for own in cases(name)
]


def inputs_of(s, length, scale=1.0, seed=0):
    """x [3 l d] and the masks it is compared under: none, ragged prefixes, and one with holes."""
    x = s.inputs(3, length, seed=seed) * scale
    holes = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.6
    holes[:, length // 2] = True
    return x, (None, s.prefix([length, max(1, length // 2 + 1), 1], length), holes)


def output_error(name, own, length, scale=1.0, **place):
    """The largest relative difference between mechanism and reference over the masks."""
    s = subject(name, own, max_len=160)
    probe = s.probe(**place)
    x, masks = inputs_of(s, length, scale)
    with torch.no_grad():
        return largest([change(run(name, probe, x, mask), probe(x, mask), mask) for mask in masks])


@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_has_a_reference(name):
    assert name in REFERENCES, (
        f"models/{name}.py has no reference: write `{name}` in tests/models/references.py from its formula, "
        "without using anything from models/, and list the arguments to compare under in CASES"
    )


def test_every_reference_has_a_mechanism():
    assert set(REFERENCES) | set(CASES) <= set(NAMES)


@pytest.mark.parametrize(("name", "own"), EVERY_CASE)
def test_outputs_equal_the_reference(name, own):
    errors = {(n, scale): output_error(name, own, n, scale) for n in LENGTHS for scale in (1.0, 4.0)}
    assert all(error <= EXACT for error in errors.values()), errors


@pytest.mark.parametrize(("name", "own"), EVERY_CASE)
def test_gradients_equal_the_reference(name, own):
    s = subject(name, own, max_len=32)
    probe = s.probe()
    for length in (2, 17):
        x, masks = inputs_of(s, length)
        weight = s.inputs(3, length, seed=5)
        for mask in masks:
            grads = []
            for forward in (lambda x, mask: run(name, probe, x, mask), probe):  # noqa: B023
                leaf = x.clone().requires_grad_()
                out = forward(leaf, mask) * weight
                loss = (out if mask is None else out[mask]).sum()
                leaves = {"x": leaf, **dict(probe.named_parameters())}
                found = (
                    torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                    if loss.requires_grad
                    else ()
                )
                grads.append({n: g for n, g in zip(leaves, found, strict=False) if g is not None and g.any()})
            expected, found = grads
            size = max([1e-300, *(g.abs().max().item() for g in expected.values())])
            for n in expected.keys() | found.keys():
                zero = torch.zeros(())
                difference = (expected.get(n, zero) - found.get(n, zero)).abs().max().item()
                assert difference <= EXACT * size, (
                    f"gradient of {n}, length {length}: {difference / size:.1e}"
                )


@pytest.mark.parametrize(
    "place", [{"rotary_base": 10_000.0}, {"bias": False}, {"d_head": 6}, {"num_heads": 1}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_every_place_equals_the_reference(name, place):
    assert output_error(name, cases(name)[-1], 17, **place) <= EXACT


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_a_vanishing_normaliser_equals_the_reference(name):
    """Queries and keys far below zero leave features that are hardly more than eps."""
    s = subject(name, max_len=32)
    probe = s.probe()
    with torch.no_grad():
        inner = s.d_model
        probe.first.qkv.bias[: 2 * inner] -= 9.0
        x, masks = inputs_of(s, 17, 0.3)
        for mask in masks:
            assert change(run(name, probe, x, mask), probe(x, mask), mask) <= EXACT
