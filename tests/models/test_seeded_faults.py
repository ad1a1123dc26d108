"""Five classical mistakes, planted in each mechanism where they can be made, are each caught.

`FAULTS[name][fault]` plants the fault by wrapping one function that the mechanism's file uses, or says why
the mechanism cannot have it. A fault counts as caught when a measured number is off: outputs differ from the
reference, or a conformance check fails without an exception.
"""

import importlib
import math

import pytest
from references import run
from test_references import EXACT, inputs_of, output_error

import models
from lra.conformance import ALL_CHECKS, subject
from lra.conformance_subject import change

FAULT_NAMES = ("no scale", "no mask", "k and v swapped", "window off by one", "wrong eps")
NO_SCALE = "the formula has no scale"
NO_KEYS = "it has no keys and values"
NO_WINDOW = "it looks at all positions alike"
NO_EPS = "the formula has no eps; softmax divides by at least 1"


class Plant:
    """Wraps `function` of models/<name>.py: its arguments pass through `alter` first.

    `own` are the mechanism's arguments under which the fault shows; `check` finds it without a reference.
    """

    def __init__(self, function, alter, own=None, check=None):
        self.function, self.alter, self.own, self.check = function, alter, own or {}, check

    def into(self, monkeypatch, name):
        module = importlib.import_module(f"models.{name}")
        honest = getattr(module, self.function)

        def faulty(*args, **kwargs):
            args, kwargs = self.alter(list(args), dict(kwargs))
            return honest(*args, **kwargs)

        monkeypatch.setattr(module, self.function, faulty)


def unscaled(power=0.5, both=False):
    """Multiplies the division by d ** power away, from the queries or from both sides."""

    def alter(args, kwargs):
        d = args[0].shape[-1] // kwargs.get("num_heads", 1)
        for i in range(2 if both else 1):
            args[i] = args[i] * d**power
        return args, kwargs

    return alter


def unmasked(args, kwargs):
    """The mask is the last positional argument of every pure function."""
    args[-1] = None
    return args, kwargs


def swapped(args, kwargs):
    args[1], args[2] = args[2], args[1]
    return args, kwargs


def swapped_by_name(args, kwargs):
    args[1], kwargs["values"] = kwargs["values"], args[1]
    return args, kwargs


def wider(by):
    def alter(args, kwargs):
        return args, {**kwargs, "window": kwargs["window"] + by}

    return alter


def shifted_kernel(args, kwargs):
    return args, {**kwargs, "conv_weight": kwargs["conv_weight"].roll(1, dims=-2)}


def other_eps(args, kwargs):
    return args, {**kwargs, "eps": 100 * kwargs.get("eps", 1e-5)}


def attention_faults(function, **own):
    """The faults of a function called as function(q, k, v, mask)."""
    return {
        "no scale": Plant(function, unscaled(), own),
        "no mask": Plant(function, unmasked, own, check="content_invariance"),
        "k and v swapped": Plant(function, swapped, own),
        "window off by one": NO_WINDOW,
        "wrong eps": NO_EPS,
    }


FAULTS = {
    "softmax": attention_faults("softmax_fused", kernel="fused"),
    "linear": {
        **attention_faults("linear_attention"),
        "no scale": NO_SCALE,
        "wrong eps": Plant("linear_attention", other_eps),
    },
    "performer": {
        **attention_faults("favor_attention"),
        "no scale": Plant("favor_attention", unscaled(power=0.25, both=True)),
        "wrong eps": Plant("favor_attention", other_eps),
    },
    "linformer": {**attention_faults("linformer_attention", proj_len=8)},
    "nystrom": {
        **attention_faults("nystrom_attention", num_landmarks=4),
        "window off by one": Plant("nystrom_attention", shifted_kernel, {"num_landmarks": 4}),
    },
    "luna": {
        "no scale": Plant("luna_attention", unscaled()),
        "no mask": Plant("luna_attention", unmasked, check="content_invariance"),
        "k and v swapped": Plant("luna_attention", swapped_by_name, {"tie_kv": False}),
        "window off by one": NO_WINDOW,
        "wrong eps": Plant("make_norm", other_eps),
    },
    "local": {
        **attention_faults("local_attention"),
        "window off by one": Plant("local_attention", wider(2), {"window": 4}),
    },
    "fnet": {
        "no scale": "the transform is not scaled, and equal to the reference's",
        "no mask": Plant("fourier_mix", unmasked, check="content_invariance"),
        "k and v swapped": NO_KEYS,
        "window off by one": NO_WINDOW,
        "wrong eps": "the formula has no eps",
    },
    "global_mean": {
        "no scale": NO_SCALE,
        "no mask": Plant("global_mean", unmasked, check="content_invariance"),
        "k and v swapped": NO_KEYS,
        "window off by one": NO_WINDOW,
        "wrong eps": "counts are at least 1",
    },
    "identity": dict.fromkeys(FAULT_NAMES, "its output is zero whatever its input"),
}

PLANTED = [
    pytest.param(name, fault, id=f"{name}-{fault.replace(' ', '_')}")
    for name, faults in FAULTS.items()
    for fault, plant in faults.items()
    if isinstance(plant, Plant)
]


@pytest.mark.parametrize("name", models.names())
def test_every_fault_is_planted_or_ruled_out(name):
    assert name in FAULTS, (
        f"say in FAULTS how each of {FAULT_NAMES} is planted in models/{name}.py, or why it cannot be"
    )
    assert set(FAULTS[name]) == set(FAULT_NAMES)


@pytest.mark.parametrize(("name", "fault"), PLANTED)
def test_a_planted_fault_is_caught_by_the_reference(monkeypatch, name, fault):
    plant = FAULTS[name][fault]
    assert distance(name, plant.own) <= EXACT
    plant.into(monkeypatch, name)
    far = distance(name, plant.own)
    assert EXACT < far < math.inf, f"{fault} moved {name} by {far:.1e}"


@pytest.mark.parametrize(("name", "pattern"), [("local", p) for p in ("sliding", "block", "neighbours")])
@pytest.mark.parametrize("by", [-2, 2])
def test_every_window_off_by_one_is_caught(monkeypatch, name, pattern, by):
    own = {"window": 6, "pattern": pattern}
    Plant("local_attention", wider(by if pattern == "sliding" else by // 2)).into(monkeypatch, name)
    assert distance(name, own) > EXACT


@pytest.mark.parametrize(("name", "fault"), [p for p in PLANTED if FAULTS[p.values[0]][p.values[1]].check])
def test_a_forgotten_mask_is_caught_by_the_conformance_suite(monkeypatch, name, fault):
    plant = FAULTS[name][fault]
    checks = {check.__name__: check for check in ALL_CHECKS}
    assert checks[plant.check](subject(name, plant.own)).status == "pass"
    plant.into(monkeypatch, name)
    found = checks[plant.check](subject(name, plant.own))
    assert found.status == "fail"
    assert found.measured is not None


def distance(name, own):
    """The largest difference from the reference over what tests/models/test_references.py compares."""
    errors = [output_error(name, own, length, scale) for length in (17, 63) for scale in (1.0, 4.0)]
    return max([*errors, vanishing(name, own)])


def vanishing(name, own):
    """The same where queries and keys lie far below zero, so that an eps matters."""
    s = subject(name, own, max_len=32)
    probe = s.probe()
    if not hasattr(probe.first, "qkv"):
        return 0.0
    probe.first.qkv.bias.data[: 2 * s.d_model] -= 9.0
    x, masks = inputs_of(s, 17, 0.3)
    return max(change(run(name, probe, x, mask), probe(x, mask), mask) for mask in masks)
