"""Every mechanism has a whole proof, and what the proof's checks do not vary is varied here."""

import pytest
from proofs import PROOFS, cases
from proofs.faults import FAULT_NAMES, Plant

import models
from lra import conformance_proofs
from lra.conformance import ALL_CHECKS, subject
from lra.conformance_subject import EXACT

NAMES = models.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_has_a_whole_proof(name):
    assert name in PROOFS, f"models/{name}.py has no proof: write tests/models/proofs/{name}.py"
    proof = PROOFS[name]
    assert callable(proof.reference)
    assert proof.CASES
    assert set(proof.FAULTS) == set(FAULT_NAMES) == set(conformance_proofs.FAULT_NAMES)
    tolerances = [p.tolerance for p in (*getattr(proof, "LIMITS", []), *getattr(proof, "ORACLES", []))]
    assert all(0 < tolerance <= 1e-3 for tolerance in tolerances), tolerances
    assert bool(getattr(proof, "LIMITS", [])) != bool(getattr(proof, "NO_LIMIT", ""))
    assert bool(getattr(proof, "ORACLES", [])) != bool(getattr(proof, "NO_ORACLE", ""))


def test_every_proof_has_a_mechanism():
    assert set(PROOFS) <= set(NAMES)


@pytest.mark.parametrize("name", sorted(PROOFS))
def test_a_proof_takes_nothing_from_the_mechanism_for_its_reference(name):
    """`build` and pure functions are there for limits and oracles alone: a reference never calls them."""
    globals_read = names_read(PROOFS[name].reference, PROOFS[name])
    ours = {
        n for n in globals_read if getattr(vars(PROOFS[name]).get(n), "__module__", "").startswith("models")
    }
    assert not ours, f"the reference of {name} calls {', '.join(sorted(ours))} from models/"


def names_read(function, module, seen=None):
    """Names of globals that a function reads, and the functions of its own file that it calls."""
    seen = set() if seen is None else seen
    codes = [function.__code__]
    for cell in function.__closure__ or ():
        if callable(cell.cell_contents) and hasattr(cell.cell_contents, "__code__"):
            codes.append(cell.cell_contents.__code__)
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if hasattr(c, "co_names")]
        for n in code.co_names:
            if n not in seen and n in vars(module):
                seen.add(n)
                inner = vars(module)[n]
                if getattr(inner, "__module__", "") == module.__name__ and hasattr(inner, "__code__"):
                    names_read(inner, module, seen)
    return seen


@pytest.mark.parametrize(
    "place", [{"rotary_base": 10_000.0}, {"bias": False}, {"d_head": 6}, {"num_heads": 1}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_every_place_equals_the_reference(name, place):
    error = conformance_proofs.output_error(subject(name), PROOFS[name], cases(name)[-1], 17, **place)
    assert error <= EXACT


PLANTED = [
    pytest.param(name, fault, id=f"{name}-{fault.replace(' ', '_')}")
    for name, proof in PROOFS.items()
    for fault, plant in proof.FAULTS.items()
    if isinstance(plant, Plant) and plant.check
]


@pytest.mark.parametrize(("name", "fault"), PLANTED)
def test_a_planted_fault_is_caught_by_the_conformance_suite(name, fault):
    plant = PROOFS[name].FAULTS[fault]
    checks = {check.__name__: check for check in ALL_CHECKS}
    assert checks[plant.check](subject(name, plant.own)).status == "pass"
    with plant.planted(name):
        found = checks[plant.check](subject(name, plant.own))
    assert found.status == "fail"
    assert found.measured is not None


@pytest.mark.parametrize(("name", "pattern"), [("local", p) for p in ("sliding", "block", "neighbours")])
@pytest.mark.parametrize("by", [-2, 2])
def test_every_window_off_by_one_is_caught(name, pattern, by):
    own = {"window": 6, "pattern": pattern}
    step = by if pattern == "sliding" else by // 2

    def alter(args, kwargs):
        return args, {**kwargs, "window": kwargs["window"] + step}

    with Plant("local_attention", alter).planted(name):
        assert conformance_proofs.output_error(subject(name), PROOFS[name], own, 63) > EXACT
