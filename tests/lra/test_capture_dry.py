"""Captured steps without a GPU: what is replayed, when, from which buffers, and what happens if it fails.

A capture keeps the call and its arguments, and a replay makes it again, so that all but the graph is real.
"""

from collections.abc import Callable

import pytest
import torch

from lra import workbench
from lra.capture import CapturedStep, Graph
from lra.config import compose
from lra.data.prepare import prepare
from lra.train import Trainer


class Again:
    """Makes a call again; what it returns lies where it lay the first time."""

    def __init__(self, function: Callable, inputs: tuple) -> None:
        self.function, self.inputs = function, inputs
        self.result = function(*inputs)

    def replay(self) -> None:
        for kept, found in zip(self.result or (), self.function(*self.inputs) or (), strict=True):
            kept.copy_(found)


def dry_capture(step: CapturedStep, function: Callable, inputs: tuple) -> Graph:
    kept = [(tensor, tensor.clone()) for tensor in step._changing()]
    random_state = torch.get_rng_state()
    graph = Again(function, inputs)
    with torch.no_grad():
        for tensor, before in kept:
            tensor.copy_(before)
    torch.set_rng_state(random_state)
    return Graph(graph, graph.result)


@pytest.fixture(autouse=True)
def dry(monkeypatch):
    workbench.clear()
    monkeypatch.setattr(CapturedStep, "_capture", dry_capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Trainer, "_measure_cost", lambda self: {})
    yield
    workbench.clear()


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """A trainer after three steps and their evaluations, by steps that the test chooses."""

    def made(mode: str, *more: str, compiled: bool = False) -> Trainer:
        monkeypatch.setattr(workbench, "choose_step", lambda *_, **__: (mode, compiled, "as the test wants"))
        workbench.clear()
        folder = tmp_path / mode
        folder.mkdir()
        config = compose([*tiny("train.num_steps=3", "train.log_every=1", "train.eval_every=2"), *more])
        found = Trainer(config, prepare(config.task, config.length), folder)
        found.run()
        return found

    return made


def assert_same(one: Trainer, other: Trainer) -> None:
    lines = [(made.folder / "metrics.jsonl").read_text() for made in (one, other)]
    assert lines[0] == lines[1] and lines[0]
    tensors = [
        {**made.model.state_dict(), **made.step.optimizer.state(), **made.step.state()["meter"]}
        for made in (one, other)
    ]
    assert [n for n, x in tensors[0].items() if not torch.equal(x, tensors[1][n])] == []


MECHANISMS = {
    "linear": ["model.norm=batch", "model.dropout=0.1"],
    "performer": ["model.num_features=8", "model.redraw_every=2"],
    "routing": ["train.data=stream"],
    "s4d": ["train.layout=padded"],
}


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("micro_batch", [16, 6])
def test_replayed_calls_train_and_predict_as_plain_ones(trained, name, micro_batch):
    settings = [f"model={name}", *MECHANISMS[name], f"train.micro_batch={micro_batch}"]
    captured = trained("captured", *settings)
    assert captured.step.mode == "captured" and not captured.step.notes
    kinds = {key[0] for key in captured.step._graphs}
    assert kinds == {"predict", "step"} if micro_batch == 16 else kinds == {"predict", "part", "finish"}
    assert_same(captured, trained("compiled", *settings))  # not compiled, and filled up as captured batches


def failing(monkeypatch, error: Exception, *, when: Callable[[CapturedStep], bool]) -> None:
    def capturing(step: CapturedStep, function: Callable, inputs: tuple) -> Graph:
        if when(step):
            raise error
        return dry_capture(step, function, inputs)

    monkeypatch.setattr(CapturedStep, "_capture", capturing)


def test_what_cannot_be_compiled_is_captured_as_it_is(trained, monkeypatch):
    failing(monkeypatch, RuntimeError("a graph\nbreak"), when=lambda step: step.compiled)
    made = trained("captured", "model.dropout=0.1", compiled=True)
    assert (made.step.mode, made.step.compiled) == ("captured", False) and made.step._graphs
    assert made.step.notes == ["could not be compiled: RuntimeError: a graph break"]
    assert made.how()["extra"]["step_reason"] == f"as the test wants; {made.step.notes[0]}"
    assert_same(made, trained("compiled", "model.dropout=0.1"))


def test_what_cannot_be_captured_runs_eagerly(trained, monkeypatch):
    failing(monkeypatch, RuntimeError("it asks the host"), when=lambda step: step.model.training is False)
    made = trained("captured", "model.dropout=0.1")
    assert made.step.mode == "eager" and not any(made.step._graphs.values())
    assert made.step.notes == ["could not be captured: RuntimeError: it asks the host"]
    assert_same(made, trained("compiled", "model.dropout=0.1"))


@pytest.mark.parametrize(
    ("error", "more"),
    [
        (RuntimeError("it asks the host"), ["train.step_mode=captured"]),
        (torch.OutOfMemoryError("no room"), []),
    ],
)
def test_no_other_step_is_taken_where_this_one_is_asked_for_or_memory_ran_out(
    trained, monkeypatch, error, more
):
    failing(monkeypatch, error, when=lambda step: True)
    with pytest.raises(type(error), match=str(error)):
        trained("captured", *more)
