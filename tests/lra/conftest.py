"""A tiny ListOps on disk and a folder for runs, for every test of the harness."""

import pytest

TINY = [
    "task=listops",
    "length=32",
    "task.num_train=600",
    "task.num_val=100",
    "task.num_test=150",
    "batch_size=16",
]
SMALL_MODEL = ["model.d_model=16", "model.d_ff=32", "model.num_layers=1"]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def folders(data_folder, tmp_path, monkeypatch):
    """Data made once a session, runs apart for each test."""
    monkeypatch.setenv("LRA_DATA", str(data_folder))
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def tiny():
    """Overrides of a run that takes a second; further ones may follow."""

    def overrides(*more: str) -> list[str]:
        return [*TINY, *SMALL_MODEL, "train.num_steps=20", "train.eval_every=10", "train.log_every=5", *more]

    return overrides
