"""Steps replayed from CUDA graphs: the same training as kernel by kernel, and nothing moved by a capture."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import Tensor

from lra import optimizer, records, run, workbench
from lra.config import compose
from lra.data.prepare import prepare
from lra.stop import Stop
from lra.train import Trainer
from models.common import Mixer, Place

pytestmark = pytest.mark.gpu

MODEL = ["model.d_model=32", "model.d_ff=64", "model.num_layers=2", "model.num_heads=2"]
EXACT = ["model=linear", "train.deterministic=true"]  # no kernel of it adds in an order of its own


@pytest.fixture(autouse=True)
def nothing_kept():
    workbench.clear()
    yield
    workbench.clear()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def task(tiny, tmp_path, monkeypatch):
    """Overrides of a small run on data like those of a task; further ones may follow."""

    def overrides(name: str, *more: str) -> list[str]:
        if name == "listops":
            return [*tiny(), *MODEL, "train.device=cuda", *more]
        monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
        data = ["task=pathfinder32", "task.num_images=100"]
        if name == "text":
            data = ["task=text", "length=128", f"task.source={tmp_path}"]
            for split, rows in (("train", 80), ("test", 40)):
                texts = [
                    f"{i} was a {('dull', 'fine')[i % 2]} film, {'really ' * (i % 13)}" for i in range(rows)
                ]
                body = "".join(f'"{text}",{i % 2}\n' for i, text in enumerate(texts))
                (tmp_path / f"{split}.csv").write_text("text,label\n" + body)
        return [
            *data,
            "batch_size=8",
            *MODEL,
            "train.num_steps=20",
            "train.log_every=5",
            "train.device=cuda",
            *more,
        ]

    return overrides


def trainer(overrides, folder) -> Trainer:
    config = compose(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepare(config.task, config.length), folder)


def train(overrides, folder) -> tuple[Trainer, dict]:
    """A whole run as in a process of its own."""
    workbench.clear()
    made = trainer(overrides, folder)
    return made, made.run()


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def step(made: Trainer, index: int, *, lr: float = 1e-3) -> float:
    batches = made.batches["train"]
    made.step.train(batches, batches.plans(index, micro_batch=made.config.train.micro_batch), lr=lr)
    return made.step.read()[0]


def everything(made: Trainer) -> dict[str, Tensor]:
    """What a step may change, copied."""
    state = {f"model.{name}": x for name, x in [*made.model.named_parameters(), *made.model.named_buffers()]}
    state |= {f"optimizer.{name}": x for name, x in made.step.optimizer.state().items()}
    state |= {f"meter.{name}": x for name, x in made.step.state()["meter"].items()}
    state |= {"random": torch.cuda.get_rng_state(made.device), "cpu random": torch.get_rng_state()}
    return {name: x.detach().clone() for name, x in state.items()}


ONECYCLE = ["train.schedule=onecycle", "train.cycle_momentum=true", "train.warmup_steps=60"]
CASES = {
    "listops": ("listops", ["model=softmax"]),
    "text": ("text", ["model=linear"]),
    "pixels": ("pixels", ["model=s4d"]),
    "padded": ("listops", ["model=softmax", "train.layout=padded"]),
    "streamed": ("listops", ["model=linear", "train.data=stream"]),
    "parts": ("listops", ["model=linear", "train.micro_batch=6"]),
    "clipping": ("listops", ["model=linear", "train.clip_norm=0.5", "train.clip_value=0.05"]),
    "batch norm": ("listops", ["model=linear", "model.norm=batch"]),
    "redraws": ("listops", ["model=performer", "model.num_features=16", "model.redraw_every=10"]),
    "moving rates": ("listops", ["model=linear", *ONECYCLE]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_hundred_captured_steps_are_two_hundred_eager_ones(task, tmp_path, case):
    name, more = CASES[case]
    for mode in ("eager", "captured"):
        settings = [*more, "train.num_steps=200", "train.eval_every=200", "train.log_every=20"]
        made, found = train(task(name, *settings, f"train.step_mode={mode}"), tmp_path / mode)
        assert made.step.mode == mode and not made.step.notes
        assert found["num_steps"] == 200 and (found["compile_s"] > 0) == (mode == "captured")
    curves = losses(tmp_path / "eager"), losses(tmp_path / "captured")
    assert len(curves[0]) == 10
    # Sums in another order, as batches are filled up: a relative 1e-7 that grows over the steps.
    np.testing.assert_allclose(*curves, rtol=1e-3)


def test_overflows_in_half_precision_move_the_scale_as_in_eager_steps(task, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "FIRST_SCALE", 2.0**40)  # far more than half precision holds
    settings = task(
        "listops", "model=linear", "train.precision=fp16", "train.clip_norm=1.0", "train.layout=padded"
    )
    states = []
    for mode in ("eager", "captured"):
        made, _ = train([*settings, "train.num_steps=60", f"train.step_mode={mode}"], tmp_path / mode)
        states.append(made.step.optimizer.state())
    eager, captured = states
    assert 30 < eager["count"].item() < 60, "the first steps overflowed, the later ones did not"
    for name in ("count", "scale", "good"):
        assert torch.equal(eager[name], captured[name]), name
    # The losses of the steps that overflowed are those of the first weights.
    np.testing.assert_allclose(losses(tmp_path / "eager"), losses(tmp_path / "captured"), rtol=1e-2)


def test_one_captured_step_leaves_the_running_statistics_of_one_eager_step(task, tmp_path):
    """The calls before a capture moved them too, which must be undone."""
    found = []
    for mode in ("eager", "captured"):
        settings = task(
            "listops", *EXACT, "model.norm=batch", "train.layout=padded", f"train.step_mode={mode}"
        )
        workbench.clear()
        made = trainer(settings, tmp_path / mode)
        before = {name: x.clone() for name, x in made.model.named_buffers()}
        step(made, 0)
        found.append(dict(made.model.named_buffers()))
    moved = [name for name, x in found[0].items() if not torch.equal(x, before[name])]
    assert any(name.endswith("running_mean") for name in moved)
    # A product may take another kernel on the stream of a capture; a step too many would move by a tenth.
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", ["_whole", "_predict"])
def test_a_capture_changes_nothing(task, tmp_path, function):
    settings = task(
        "listops", "model=performer", "model.norm=batch", "model.dropout=0.1", "train.precision=fp16"
    )
    made = trainer([*settings, "train.step_mode=captured"], tmp_path / "run")
    for index in range(3):
        step(made, index)
    before, batches = everything(made), made.batches["train"]
    made.step.optimizer.set_rates(0.1)
    training = function == "_whole"
    made.step._in_mode(training=training)
    inputs = made.step._resolved((batches, batches.plans(3)[0], *([1.0] if training else [])))
    with torch.set_grad_enabled(training):
        graph = made.step._capture(getattr(made.step, function), inputs)
    after = everything(made)
    assert [name for name, x in before.items() if not torch.equal(x, after[name])] == []
    graph.graph.replay()
    after = everything(made)
    changed = [name for name, x in before.items() if not torch.equal(x, after[name])]
    assert ("optimizer.count" in changed) == training and bool(changed) == training


def test_dropout_is_another_at_every_replay_and_the_same_in_another_run(task, tmp_path):
    seen = []
    for name in ("one", "other"):
        workbench.clear()
        settings = task("listops", *EXACT, "model.dropout=0.3", "train.step_mode=captured")
        made = trainer(settings, tmp_path / name)
        seen.append([step(made, 0, lr=0.0) for _ in range(6)])  # one batch, and weights that stay
    assert len(set(seen[0])) == 6
    assert seen[0] == seen[1]


@pytest.mark.parametrize("more", [[], ["train.micro_batch=6"], ["train.compile=true"]])
def test_runs_of_one_seed_have_the_same_bits(task, tmp_path, more):
    settings = task("listops", *EXACT, "model.dropout=0.1", "train.step_mode=captured", *more)
    first, second = (train(settings, tmp_path / name)[0] for name in ("first", "second"))
    assert first.step is not second.step and not second.step.notes
    assert (tmp_path / "first/metrics.jsonl").read_text() == (tmp_path / "second/metrics.jsonl").read_text()
    assert torch.equal(first.step.optimizer.weights, second.step.optimizer.weights)


def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(task, tmp_path):
    settings = task("listops", *EXACT, "model.dropout=0.1", "model.norm=batch", "train.step_mode=captured")
    whole, expected = train(settings, tmp_path / "whole")

    workbench.clear()
    broken = trainer(settings, tmp_path / "broken")
    update = broken.model.training_update

    def stop_at_13(index: int) -> None:
        if index == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        update(index)

    broken.model.training_update = stop_at_13
    with pytest.raises(Stop):
        broken.run()
    assert broken.state.step == 13
    resumed, found = train(settings, tmp_path / "broken")
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "broken/metrics.jsonl").read_text()
    assert found["test_accuracy"] == expected["test_accuracy"]
    mine, other = everything(whole), everything(resumed)
    assert [
        name for name, x in mine.items() if name != "cpu random" and not torch.equal(x, other[name])
    ] == []


def test_the_next_seed_replays_the_graphs_of_the_first_and_ends_as_in_a_fresh_process(task, tmp_path):
    settings = task("listops", *EXACT, "model.dropout=0.1", "train.layout=padded", "train.step_mode=captured")
    first = trainer([*settings, "seed=0"], tmp_path / "first")
    assert first.run()["compile_s"] > 0
    graphs = set(map(id, first.step._graphs.values()))
    second = trainer([*settings, "seed=1"], tmp_path / "second")
    found = second.run()
    assert second.step is first.step and set(map(id, second.step._graphs.values())) == graphs
    assert found["compile_s"] == 0
    weights = second.step.optimizer.weights.clone()

    fresh, expected = train([*settings, "seed=1"], tmp_path / "fresh")
    assert fresh.step is not second.step and expected["compile_s"] > 0
    assert (tmp_path / "second/metrics.jsonl").read_text() == (tmp_path / "fresh/metrics.jsonl").read_text()
    assert torch.equal(fresh.step.optimizer.weights, weights)
    assert losses(tmp_path / "first") != losses(tmp_path / "second")


def test_captured_predictions_are_the_eager_ones(task, tmp_path):
    """64 rows a batch: two are captured, and the 22 rows that remain are not."""
    found = []
    for mode in ("eager", "captured"):
        settings = task("listops", "model=softmax", "train.eval_batch_size=64", f"train.step_mode={mode}")
        workbench.clear()
        made = trainer(settings, tmp_path / mode)
        found.append([made.evaluate(split) for split in ("test", "val", "test")])
    for eager, captured in zip(*found, strict=True):
        assert (eager[2] == captured[2]).mean() > 0.98  # two classes may be a rounding apart
        assert captured[1] == pytest.approx(eager[1], rel=1e-4)
    assert (found[1][0][2] == found[1][2][2]).all() and len(found[1][0][2]) == 150


def test_the_peak_memory_of_captured_steps_is_about_that_of_eager_ones(task, tmp_path):
    large = ["batch_size=512", "model.d_model=256", "model.d_ff=1024", "train.layout=padded", "model=linear"]
    peaks = {}
    for mode in ("eager", "captured"):
        _, found = train(task("listops", *large, f"train.step_mode={mode}"), tmp_path / mode)
        peaks[mode] = found["peak_mem_mib"]
    assert peaks["eager"] > 200, "activations, not workspaces, must be what is measured"
    assert peaks["captured"] == pytest.approx(peaks["eager"], rel=0.3)


@pytest.mark.parametrize("where", ["before the first step", "in the first step"])
@pytest.mark.parametrize("mode", ["captured", "auto"])
def test_running_out_of_memory_is_a_result_and_the_next_run_is_well(task, monkeypatch, where, mode):
    """40 rows of 8 heads with 16,384 x 16,384 weights are 344 GB."""
    workbench.clear()
    run.release_memory()
    before = torch.cuda.memory_allocated()
    huge = ["length=16384", "train.layout=padded", "model=softmax", "model.kernel=math", "model.num_heads=8"]
    with monkeypatch.context() as patch:
        if where == "in the first step":
            patch.setattr(Trainer, "_measure_cost", lambda self: {})
        settings = task("text", *huge, "batch_size=40", f"train.step_mode={mode}")
        record = run.execute(compose(settings))
    assert (record.status, workbench._last) == ("oom", None) and "out of memory" in record.reason
    left = torch.cuda.memory_allocated() - before
    assert left < 2**28, "what the run had is given back"
    after = run.execute(compose(task("text", "model=linear", "train.step_mode=captured")))
    assert (after.status, after.step_mode) == ("ok", "captured")


class Asking(Mixer):
    """Waits for the device in every forward pass, which no capture can hold."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, projections=False)
        self.scale = torch.nn.Parameter(torch.ones(place.d_model))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * self.scale if x.detach().sum().item() < 1e30 else x


class Untraceable(Asking):
    """Cannot be compiled as one graph, but can be captured."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        torch._dynamo.graph_break()
        return x * self.scale


def test_what_cannot_be_captured_runs_eagerly_and_the_record_says_why(task):
    settings = task("listops", "model=custom", f"model.target={__name__}:Asking")
    record = run.execute(compose(settings))
    assert (record.status, record.step_mode, record.extra["compiled"]) == ("ok", "eager", False)
    assert "could not be captured: " in record.extra["step_reason"] and "Error" in record.extra["step_reason"]
    log = (records.runs_root() / record.run_id / "log.txt").read_text()
    assert log.count("could not be captured") == 1
    after = run.execute(compose(task("listops", "model=linear")))
    assert (after.status, after.step_mode) == ("ok", "captured"), "the failed capture left nothing behind"


def test_what_cannot_be_captured_trains_as_if_eager_had_been_asked_for(task, tmp_path):
    settings = task("listops", "model=custom", f"model.target={__name__}:Asking", "train.layout=padded")
    for mode in ("auto", "eager"):
        made, _ = train([*settings, "train.deterministic=true", f"train.step_mode={mode}"], tmp_path / mode)
        assert made.step.mode == "eager" and len(made.step.notes) == (mode == "auto")
    # The failed captures moved no weight and drew no number.
    np.testing.assert_allclose(losses(tmp_path / "auto"), losses(tmp_path / "eager"), rtol=1e-6)


def test_what_cannot_be_captured_fails_where_capturing_is_asked_for(task):
    settings = task("listops", "model=custom", f"model.target={__name__}:Asking", "train.step_mode=captured")
    record = run.execute(compose(settings))
    assert record.status == "failed" and "Error" in record.reason
    assert run.execute(compose(task("listops", "model=linear", "train.step_mode=captured"))).status == "ok"


def test_what_cannot_be_compiled_is_captured_as_it_is(task):
    settings = task("listops", "model=custom", f"model.target={__name__}:Untraceable", "train.compile=true")
    record = run.execute(compose(settings))
    assert (record.status, record.step_mode, record.extra["compiled"]) == ("ok", "captured", False)
    assert "could not be compiled: " in record.extra["step_reason"]
