"""Five classical mistakes, and ways to plant them in a mechanism's file.

`FAULTS[fault]` in a proof is a `Plant`, or a sentence that says why the mechanism cannot have the fault.
"""

import importlib
from contextlib import contextmanager

FAULT_NAMES = ("no scale", "no mask", "k and v swapped", "window off by one", "wrong eps")
NO_SCALE = "the formula has no scale"
NO_KEYS = "it has no keys and values"
NO_WINDOW = "it looks at all positions alike"
NO_EPS = "the formula has no eps; softmax divides by at least 1"


class Plant:
    """Wraps `function` of models/<name>.py: its arguments pass through `alter(args, kwargs)` first.

    `own` are the mechanism's arguments under which the fault shows; `check` is a check of the conformance
    suite that finds it without a reference.
    """

    def __init__(self, function, alter, own=None, check=None):
        self.function, self.alter, self.own, self.check = function, alter, own or {}, check

    @contextmanager
    def planted(self, name):
        module = importlib.import_module(f"models.{name}")
        honest = getattr(module, self.function)

        def faulty(*args, **kwargs):
            args, kwargs = self.alter(list(args), dict(kwargs))
            return honest(*args, **kwargs)

        setattr(module, self.function, faulty)
        try:
            yield
        finally:
            setattr(module, self.function, honest)


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
    """Arguments 1 and 2 are keys and values."""
    args[1], args[2] = args[2], args[1]
    return args, kwargs


def late(*places):
    """The arguments at these places one position late, the last one first."""

    def alter(args, kwargs):
        return [x.roll(1, dims=1) if i in places else x for i, x in enumerate(args)], kwargs

    return alter


def changed(**values):
    """Keyword arguments become `values[name](old value)`."""

    def alter(args, kwargs):
        return args, {**kwargs, **{name: value(kwargs[name]) for name, value in values.items()}}

    return alter


def other_eps(args, kwargs):
    return args, {**kwargs, "eps": 100 * kwargs.get("eps", 1e-5)}


def attention_faults(function, **own):
    """The faults of a function called as function(q, k, v, mask, ...) without a window or an eps."""
    return {
        "no scale": Plant(function, unscaled(), own),
        "no mask": Plant(function, unmasked, own, check="content_invariance"),
        "k and v swapped": Plant(function, swapped, own),
        "window off by one": NO_WINDOW,
        "wrong eps": NO_EPS,
    }
