"""Each check against a proof can fail: linear attention beside proofs that it does not fit."""

import math
import types

import pytest
from proofs import PROOFS
from proofs.faults import Plant
from proofs.kit import Limit, Oracle

from lra import conformance_proofs
from lra.conformance import ALL_CHECKS, subject
from lra.conformance_subject import checks_in

CHECKS = {check.__name__: check for check in ALL_CHECKS}


def half(module, x, mask=None):
    return PROOFS["linear"].reference(module, x, mask) / 2


def detached(module, x, mask=None):
    """The right outputs with gradients that miss the inputs."""
    return PROOFS["linear"].reference(module, x.detach(), mask) + 0 * x


def off_by_a_little():
    return 1e-3


def not_a_number():
    return math.nan


def unchanged(args, kwargs):
    return args, kwargs


BROKEN_PROOFS = [
    ("equals_reference", {"reference": half}),
    ("gradients_equal_reference", {"reference": detached}),
    ("equals_limits", {"LIMITS": [Limit("a case", off_by_a_little)]}),
    ("equals_limits", {"LIMITS": [Limit("a case", not_a_number), Limit("another", lambda: 0.0)]}),
    ("equals_oracles", {"ORACLES": [Oracle("package 1.0", "outputs", off_by_a_little)]}),
    ("faults_are_caught", {"FAULTS": PROOFS["linear"].FAULTS | {"wrong eps": ""}}),
    (
        "faults_are_caught",
        {"FAULTS": PROOFS["linear"].FAULTS | {"no mask": Plant("feature_map", lambda a, k: (a, k))}},
    ),
]


@pytest.mark.parametrize(("check", "broken"), BROKEN_PROOFS)
def test_a_mechanism_that_does_not_fit_its_proof_fails(monkeypatch, check, broken):
    assert CHECKS[check](subject("linear")).status != "fail"
    proof = types.SimpleNamespace(**{**vars(PROOFS["linear"]), **broken})
    monkeypatch.setattr(conformance_proofs, "proof_of", lambda subject: proof)
    assert CHECKS[check](subject("linear")).status == "fail"


def test_a_mechanism_of_the_repository_without_a_proof_fails(monkeypatch):
    monkeypatch.setitem(PROOFS, "linear", None)
    assert CHECKS["equals_reference"](subject("linear")).status == "fail"


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    def missing():
        raise ImportError("no such package")

    proof = types.SimpleNamespace(CASES=[{}], ORACLES=[Oracle("package 1.0", "outputs", missing)])
    monkeypatch.setattr(conformance_proofs, "proof_of", lambda subject: proof)
    found = CHECKS["equals_oracles"](subject("linear"))
    assert found.status == "n/a" and found.detail == "package 1.0 is not installed"


def test_a_wheel_without_tests_has_no_proofs(monkeypatch):
    monkeypatch.setattr(conformance_proofs, "proofs", lambda: None)
    found = CHECKS["equals_reference"](subject("linear"))
    assert found.status == "n/a" and "clone" in found.detail


def test_every_check_against_a_proof_is_shown_to_fail():
    assert {check for check, _ in BROKEN_PROOFS} == {
        check.__name__ for check in checks_in(conformance_proofs)
    }
