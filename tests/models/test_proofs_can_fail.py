"""Each check against a proof can fail: linear attention beside proofs that it does not fit."""

import math
import sys
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


def itself(module, x, mask=None):
    return module(x, mask)


def its_attention(module, x, mask=None):
    return PROOFS["linear"].reference(module, x, mask) + 0 * module.attend(
        *[x.unsqueeze(1)] * 3, mask
    ).squeeze(1)


PLANT = PROOFS["linear"].FAULTS["no mask"]

BROKEN_PROOFS = [
    ("equals_reference", {"CASES": []}),
    ("gradients_equal_reference", {"CASES": []}),
    ("equals_reference", {"reference": itself}),
    ("equals_reference", {"reference": its_attention}),
    ("equals_limits", {"LIMITS": [], "NO_LIMIT": " "}),
    ("equals_oracles", {"ORACLES": [], "NO_ORACLE": ""}),
    ("faults_are_caught", {"FAULTS": PROOFS["linear"].FAULTS | {"no mask": PLANT, "wrong eps": PLANT}}),
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
    absent = Oracle("package 1.0", "outputs", off_by_a_little, packages=("no-such-package",))
    said = "package 1.0: not compared, no-such-package is not installed"
    for others, status in (([], "n/a"), ([Oracle("torch", "outputs", lambda: 0.0)], "pass")):
        proof = types.SimpleNamespace(CASES=[{}], ORACLES=[*others, absent])
        monkeypatch.setattr(conformance_proofs, "proof_of", lambda subject, proof=proof: proof)
        found = CHECKS["equals_oracles"](subject("linear"))
        assert found.status == status and said in found.detail


def test_an_oracle_that_has_lost_a_name_fails(monkeypatch):
    def moved():
        from models.linear import nothing_of_that_name  # noqa: F401

    proof = types.SimpleNamespace(CASES=[{}], ORACLES=[Oracle("torch", "outputs", moved)])
    monkeypatch.setattr(conformance_proofs, "proof_of", lambda subject: proof)
    assert CHECKS["equals_oracles"](subject("linear")).status == "fail"


def test_another_module_called_proofs_is_refused(monkeypatch, tmp_path):
    other = types.ModuleType("proofs")
    other.__file__ = str(tmp_path / "proofs.py")
    monkeypatch.setitem(sys.modules, "proofs", other)
    found = CHECKS["equals_reference"](subject("linear"))
    assert found.status == "fail" and str(tmp_path) in found.detail


def test_a_wheel_without_tests_has_no_proofs(monkeypatch):
    monkeypatch.setattr(conformance_proofs, "proofs", lambda: None)
    found = CHECKS["equals_reference"](subject("linear"))
    assert found.status == "n/a" and "clone" in found.detail


def test_every_check_against_a_proof_is_shown_to_fail():
    assert {check for check, _ in BROKEN_PROOFS} == {
        check.__name__ for check in checks_in(conformance_proofs)
    }
