"""`lra check-model all`: a line per mechanism, and an exit status that tells whether all conform."""

import pytest

from lra import conformance
from lra.conformance import main
from lra.errors import UserError


def test_every_mechanism_gets_a_line(monkeypatch, capsys):
    monkeypatch.setattr(conformance.registry, "names", lambda: ["fnet", "identity"])
    assert main(["all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["fnet", "identity"]
    assert "conforms  length_invariant" in lines[1]
    assert lines[-1].startswith("2 of 2 mechanisms conform")


def test_a_failing_mechanism_is_named_with_its_checks(monkeypatch, capsys):
    monkeypatch.setattr(conformance.registry, "names", lambda: ["identity"])

    def failing(subject):
        return conformance.Check("some_check", "group", "claim", "fail")

    monkeypatch.setattr(conformance, "ALL_CHECKS", [*conformance.ALL_CHECKS, failing])
    assert main(["all"]) == 1
    assert "FAILS some_check" in capsys.readouterr().out


def test_it_takes_no_parameters():
    with pytest.raises(UserError, match="no two mechanisms"):
        main(["all", "model.window=4"])
