"""However a step runs, it is the same training: on every task 200 steps follow the curve of the eager one.

Each pair sees the same batches and starts from the same weights, without dropout. It takes the same sums in
another order; over 200 updates the rounding of float32 may grow to 1e-3 of a loss (found on a CPU: 3e-5, of
losses that are down to 1e-3 by then, and 1e-6 elsewhere).
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_tasks import MODEL, TASKS

from lra import workbench
from lra.config import compose
from lra.data.prepare import prepare
from lra.train import Trainer

TOLERANCE = 1e-3
RUN = [
    *MODEL,
    "batch_size=8",
    "train.num_steps=200",
    "train.eval_every=200",
    "train.log_every=1",
    "train.lr=1e-3",
]
SMALLER = {"pathx": ["batch_size=1"]}
CASES = [(task, "linear") for task in TASKS] + [("listops", "softmax"), ("text", "softmax")]

EAGER = ["train.step_mode=eager"]
ON_CPU = {
    "compiled": ["train.step_mode=compiled"],
    "padded": [*EAGER, "train.layout=padded"],
}
CAPTURED = ["train.step_mode=captured"]
ON_GPU = {
    "captured": [*CAPTURED, "train.compile=false"],
    "captured and compiled": [*CAPTURED, "train.compile=true"],
    "captured, padded": [*CAPTURED, "train.compile=false", "train.layout=padded"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def eager_curves() -> dict[tuple, list[float]]:
    """The curves that others are compared with, by task, mechanism and device, as far as they were drawn."""
    return {}


@pytest.fixture(autouse=True)
def data_of_these_tests_alone(folders, sources, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(sources / "data"))
    yield
    workbench.clear()


def curve(overrides: list[str], folder: Path) -> list[float]:
    """The loss of each step and, last, of the validation rows. The step must have run as it was asked to."""
    workbench.clear()
    folder.mkdir()
    config = compose(overrides)
    trainer = Trainer(config, prepare(config.task, config.length), folder)
    trainer.run()
    step, asked = trainer.step, config.train
    assert (step.mode, step.notes) == (asked.step_mode, [])
    assert step.compiled == (asked.step_mode == "compiled" or bool(asked.compile))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [lines[-1]["val_loss"]]


@pytest.fixture
def check_agreement(sources, eager_curves, tmp_path) -> Callable[[str, str, str, list[str]], None]:
    def check(task: str, model: str, device: str, way: list[str]) -> None:
        asked = [f"model={model}", f"train.device={device}"]
        overrides = [*TASKS[task](sources / task), *RUN, *SMALLER.get(task, []), *asked]
        if (task, model, device) not in eager_curves:
            eager_curves[task, model, device] = curve([*overrides, *EAGER], tmp_path / "eager")
        eager = eager_curves[task, model, device]
        assert len(eager) == 201 and max(eager) > 0.1, "a curve that says something"
        assert curve([*overrides, *way], tmp_path / "other") == pytest.approx(eager, rel=TOLERANCE)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("way", ON_CPU)
@pytest.mark.parametrize(("task", "model"), CASES)
def test_200_steps_on_a_cpu_agree_with_eager_packed_ones(task, model, way, check_agreement):
    check_agreement(task, model, "cpu", ON_CPU[way])


@pytest.mark.gpu
@pytest.mark.parametrize("way", ON_GPU)
@pytest.mark.parametrize(("task", "model"), CASES)
def test_200_steps_on_a_gpu_agree_with_eager_packed_ones(task, model, way, check_agreement):
    check_agreement(task, model, "cuda", ON_GPU[way])
