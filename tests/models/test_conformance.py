"""The conformance suite over every registered mechanism, with each set of arguments it is compared under."""

import pytest
import torch
from proofs import cases

import models
from lra.conformance import ALL_CHECKS, compiled_like_eager, leaks, subject
from lra.layer_cost import GROWTH_LENGTHS, broken_claims, layer_cost

NAMES = models.names()


def variants():
    """Every set of arguments that mechanisms are compared under, those that change a claim named so."""
    for name in NAMES:
        for own in [*cases(name), *([{"redraw_every": 1000}] if name == "performer" else [])]:
            if own:
                claims = subject(name, own).traits, subject(name).traits
                kind = ["unusual"] if claims[0] != claims[1] else []
                label = "-".join([*kind, name, *(f"{k}={v}" for k, v in own.items())])
                yield pytest.param(name, own, id=label)


COMPILED_BY_DEFAULT = ("softmax", "linear", "luna", "s4d", "hybrid")
COMPARED_ONCE = (
    "docstring_fields",
    "configuration_matches",
    "compiles",
    "equals_reference",
    "gradients_equal_reference",
    "equals_limits",
    "equals_oracles",
    "faults_are_caught",
)


def conforming():
    """Every mechanism under every check; tracing takes seconds each, so that of most is slow."""
    for name in NAMES:
        for check in ALL_CHECKS:
            slow = check.__name__ == "compiles" and name not in COMPILED_BY_DEFAULT
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(name, check, id=f"{name}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("name", "check"), list(conforming()))
def test_mechanism_conforms(name, check):
    assert_passes(check(subject(name)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), list(variants()))
def test_variant_conforms(name, own):
    for check in ALL_CHECKS:
        if check.__name__ not in COMPARED_ONCE:
            assert_passes(check(subject(name, own)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_default_compiler_matches_eager(name):
    assert_passes_outcome(compiled_like_eager(subject(name), "inductor"))


@pytest.mark.parametrize("name", ["fnet", "linear", "nystrom"])
def test_leaks_agree_with_the_traits(name):
    traits = subject(name).traits
    expected = {
        "content": traits.content_invariant,
        "length": traits.length_invariant,
        "batch": traits.batch_invariant,
    }
    measured = leaks(name)
    assert {kind: value <= 1e-9 for kind, value in measured.items()} == expected, measured


def test_redrawn_features_are_written_in_place():
    found = {check.__name__: check for check in ALL_CHECKS}["updates_in_place"](
        subject("performer", {"redraw_every": 1000})
    )
    assert found.detail == "writes layers.0.features"


def test_a_check_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    ALL_CHECKS[0](subject("performer"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_mechanism_conforms_on_a_gpu(name, check):
    assert_passes(check(subject(name, device="cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_default_compiler_matches_eager_on_a_gpu(name):
    assert_passes_outcome(compiled_like_eager(subject(name, device="cuda"), "inductor"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "own"), [(n, {}) for n in NAMES if n != "identity"] + [("softmax", {"kernel": "math"})]
)
def test_peak_memory_grows_as_claimed(name, own):
    rows = [layer_cost(name, length, own, timed=False) for length in GROWTH_LENGTHS]
    assert broken_claims(rows) == []


def assert_passes(check):
    assert check.status != "fail", f"{check.claim}: {check.detail} (measured {check.measured})"


def assert_passes_outcome(outcome):
    assert outcome.status == "pass", f"{outcome.detail} (measured {outcome.measured})"
