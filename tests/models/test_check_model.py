"""`lra check-model` on mechanisms outside the repository, as its user sees it."""

import itertools
import re
import sys

import pytest

from lra.conformance import ALL_CHECKS, check_model, main
from lra.errors import UserError

OUTSIDE = """
import torch
from models import Mixer

class Mean(Mixer):
    def __init__(self, place, *, gain: float = 1.0, size: int = 3):
        super().__init__(place)
        self.gain = gain

    def attend(self, q, k, v, mask):
        weight = torch.ones_like(v[..., :1]) if mask is None else mask[:, None, :, None].to(v.dtype)
        mean = (v * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
        return q + self.gain * k + mean

class Leaks(Mean):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None)

class Crashes(Mean):
    def attend(self, q, k, v, mask):
        raise RuntimeError("out of order")

class Needs(Mean):
    def __init__(self, place, *, size: int):
        super().__init__(place)

class Other:
    pass
"""

modules = (f"outside_{i}" for i in itertools.count())


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The name of a module in the current folder, which is nowhere on sys.path yet."""
    name = next(modules)
    (tmp_path / f"{name}.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return name


def test_a_conforming_class_outside_the_repository_gives_0(outside, capsys):
    assert main([f"{outside}:Mean", "model.gain=0.5"]) == 0
    text = capsys.readouterr().out
    assert f"mean: {outside}.Mean  gain=0.5" in text
    assert f"mean conforms. {len(ALL_CHECKS)} checks: {len(ALL_CHECKS) - 9} pass, 0 fail, 9 n/a." in text


def test_a_leaking_class_gives_1_and_says_by_how_much(outside, capsys):
    assert main([f"{outside}:Leaks"]) == 1
    text = capsys.readouterr().out
    assert "leaks does not conform (content_invariance, " in text
    assert "claims content_invariant=True, yet outputs move" in text


def test_a_class_that_raises_is_reported_not_raised(outside, capsys):
    assert main([f"{outside}:Crashes"]) == 1
    assert "RuntimeError: out of order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nystom"], "unknown model 'nystom'; did you mean 'nystrom'"),
        (["linear", "model.epsilon=1"], "unknown parameter of model linear 'epsilon'; did you mean 'eps'"),
        (["linear", "eps=1"], "model.key=value"),
        (["linear", "model.eps"], "model.key=value"),
        (["local", "model.pattern=spiral"], "local: unknown pattern 'spiral'"),
        (["local", "--device", "abacus"], "--device abacus is not available"),
        (["MODULE:Mena"], "did you mean 'Mean'"),
        (["MODULE:Other"], "not a subclass"),
        (["MODULE:Needs"], "parameters without a default: size"),
        (["nowhere_at_all:Mean"], "cannot import 'nowhere_at_all'"),
    ],
)
def test_bad_arguments_are_a_user_error(outside, arguments, message):
    with pytest.raises(UserError, match=message):
        main([argument.replace("MODULE", outside) for argument in arguments])


def test_the_report_shows_exceptions_with_their_reasons():
    text = check_model("fnet").render()
    assert "length_invariant=False: the frequencies are those of the padded length" in text
    assert text.rstrip().splitlines()[-1].startswith("fnet conforms.")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.window=abc", "model.window"),
        ("model.window=null", "model.window"),
        ("model.window=2.5", "model.window"),
        ("model.window.x=3", "model.window"),
        ("model.window=[1", "cannot read"),
        ("model.windw=3", "did you mean 'window'"),
    ],
)
def test_an_argument_of_a_wrong_type_is_a_message(override, said):
    with pytest.raises(UserError, match=re.escape(said)):
        main(["local", override])
