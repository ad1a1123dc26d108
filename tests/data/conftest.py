"""An empty data root of its own for every test, and `lra data` as a function."""

import pytest

from lra.data import cli


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def run(capsys):
    """From the arguments of `lra data` to (exit status, standard output, standard error)."""

    def call(*argv):
        status = cli.main(list(argv))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
