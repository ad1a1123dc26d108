"""Which step a run takes and why, what it counts and reports, and that a resumed run goes on as it was."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lra import run
from lra.assembly import choose_step
from lra.cli import main
from lra.config import RunConfig, compose
from lra.data.prepare import prepare
from lra.errors import UserError
from lra.stop import Stop
from lra.train import Diverged, Trainer
from models.common import Mixer, Place, Traits

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)  # this one is only spoken of


class Unfit(Mixer):
    """Says that it cannot be captured."""

    traits = Traits(capturable=False, because={"capturable": "it asks the host for advice"})

    def __init__(self, place: Place) -> None:
        super().__init__(place, projections=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


@pytest.fixture(scope="module")
def usual() -> RunConfig:
    return compose(["task=listops", "length=32", "model=softmax", "train.num_steps=1000"])


def chosen(config: RunConfig, device=GPU, *, rows: float = 1000.0, **train) -> tuple[str, bool, str]:
    return choose_step(
        dataclasses.replace(config, train=dataclasses.replace(config.train, **train)), device, rows
    )


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_mode_that_is_asked_for_is_taken(usual, mode, device):
    assert chosen(usual, device, step_mode=mode) == (mode, mode == "compiled", "as asked")
    assert chosen(usual, GPU, step_mode="captured") == ("captured", False, "as asked")
    assert chosen(usual, GPU, step_mode="captured", compile=True) == ("captured", True, "as asked")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("value", [True, False])
def test_compile_beside_a_mode_that_says_it_is_refused(usual, mode, value):
    with pytest.raises(UserError, match=f"train.compile={str(value).lower()} is for captured steps.*leave"):
        chosen(usual, step_mode=mode, compile=value)


def test_without_a_gpu_auto_is_eager_and_says_why(usual):
    assert chosen(usual, CPU) == ("eager", False, "CUDA graphs need a GPU")
    assert chosen(usual, CPU, compile=True) == ("compiled", True, "as asked")
    assert chosen(usual, CPU, compile=False) == ("eager", False, "CUDA graphs need a GPU")


def test_a_captured_step_without_a_gpu_ends_the_command_with_one_message(tiny, capsys):
    assert main(["train", *tiny("train.step_mode=captured", "train.device=cpu")]) == 2
    assert "train.step_mode=captured: CUDA graphs need a GPU; use train.step_mode=auto or eager" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        ({"name": "custom", "target": f"{__name__}:Unfit"}, {}, "model=Unfit: it asks the host for advice"),
        ({"name": "search"}, {}, "a search takes a second step"),
        ({}, {"activation_checkpointing": True}, "activation checkpointing"),
    ],
)
def test_what_cannot_be_captured_is_eager_with_the_reason_or_refused(usual, model, train, reason):
    config = dataclasses.replace(usual, model=dataclasses.replace(usual.model, own={}, **model))
    mode, compiled, why = chosen(config, **train)
    assert (mode, compiled) == ("eager", False) and reason in why
    assert chosen(config, compile=True, **train)[:2] == ("compiled", True)
    with pytest.raises(UserError, match=f"train.step_mode=captured: .*{reason}"):
        chosen(config, step_mode="captured", **train)


def test_on_a_gpu_auto_is_captured_and_compiled_where_that_pays(usual):
    """At width 64 and two layers compiling takes 20 s by the estimate, and saves 0.8 ms a step and more."""
    few, many = chosen(usual, num_steps=10_000), chosen(usual, num_steps=40_000)
    assert few[:2] == ("captured", False) and "would take about 20 s and save about 8 s" in few[2]
    assert many[:2] == ("captured", True) and "takes about 20 s and saves about 33 s" in many[2]
    assert chosen(usual, num_steps=10_000, rows=1e6)[:2] == ("captured", True), "wide batches save more"
    for asked in (True, False):
        assert chosen(usual, compile=asked)[:2] == ("captured", asked)


def trainer(overrides, folder) -> Trainer:
    config = compose([*overrides, "train.device=cpu"])
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepare(config.task, config.length), folder)


def step(made: Trainer, index: int) -> None:
    batches = made.batches["train"]
    made.step.train(batches, batches.plans(index, micro_batch=made.config.train.micro_batch), lr=1e-3)


def before_step(made: Trainer, when: int, act) -> None:
    update = made.model.training_update

    def acting(index: int) -> None:
        if index == when:
            act()
        update(index)

    made.model.training_update = acting


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("micro_batch", [16, 5])
def test_read_gives_the_mean_loss_of_the_steps_since_the_last_call(tiny, tmp_path, micro_batch):
    made = trainer(tiny(f"train.micro_batch={micro_batch}"), tmp_path / "run")
    losses = []
    for index in range(4):
        (whole,) = made.batches["train"].train(index)
        losses.append(F.cross_entropy(made.step.logits(whole), whole.labels).item())
        step(made, index)
        if index == 0:
            made.step.read()
    assert made.step.read() == (pytest.approx(np.mean(losses[1:]), rel=1e-6), None)
    assert math.isnan(made.step.read()[0]), "there was no step"


@pytest.mark.parametrize("log_every", [1, 50])
def test_the_first_step_without_a_finite_loss_is_the_one_reported(tiny, tmp_path, log_every):
    made = trainer(tiny(f"train.log_every={log_every}"), tmp_path / "run")
    before_step(made, 3, lambda: made.model.head.layers[-1].weight.data.fill_(float("nan")))
    with pytest.raises(Diverged, match="not finite at step 3$"):
        made.run()
    assert made.state.step == (4 if log_every == 1 else 10), "found when the run looks, not by waiting"


def test_it_is_reported_after_a_resume_too(tiny, tmp_path):
    settings = tiny("train.log_every=50", "train.eval_every=20")
    broken = trainer(settings, tmp_path / "run")
    before_step(broken, 3, lambda: broken.model.head.layers[-1].weight.data.fill_(float("inf")))
    before_step(broken, 8, stop)
    with pytest.raises(Stop):
        broken.run()
    with pytest.raises(Diverged, match="not finite at step 3$"):
        trainer(settings, tmp_path / "run").run()


def keys(made: Trainer, monkeypatch) -> list[tuple]:
    """Those of the calls that a captured step would replay, as they come."""
    seen, run = [], made.step._run
    monkeypatch.setattr(made.step, "_run", lambda key, *rest: (seen.append(key), run(key, *rest))[1])
    return seen


def test_a_batch_in_parts_is_one_call_a_part_and_one_to_finish(tiny, tmp_path, monkeypatch):
    made = trainer(tiny("train.micro_batch=6", "train.layout=padded"), tmp_path / "run")
    seen = keys(made, monkeypatch)
    for index in range(2):
        step(made, index)
    first, other = ("part", 6, 6 * 32, 6 / 16), ("part", 4, 4 * 32, 4 / 16)
    assert seen == [(*first, True), (*first, False), (*other, False), ("finish",)] * 2


def test_a_whole_batch_is_one_call(tiny, tmp_path, monkeypatch):
    made = trainer(tiny("train.layout=padded"), tmp_path / "run")
    seen = keys(made, monkeypatch)
    step(made, 0)
    assert [key[:3] for key in seen] == [("step", 16, 16 * 32)]


def test_the_last_smaller_batch_of_an_evaluation_is_no_call_of_its_own_shape(tiny, tmp_path, monkeypatch):
    made = trainer(tiny("train.eval_batch_size=64", "train.layout=padded"), tmp_path / "run")
    seen = keys(made, monkeypatch)
    predictions = made.evaluate("test")[2]
    assert seen == [("predict", 64, 64 * 32)] * 2 and len(predictions) == 150
    whole = trainer(tiny("train.eval_batch_size=150", "train.layout=padded"), tmp_path / "whole")
    assert (whole.evaluate("test")[2] == predictions).all()


def rows_of(made: Trainer) -> list[list[int]]:
    """The rows of every batch trained on from now on."""
    seen, batches = [], made.batches["train"]
    plans = batches.plans

    def watched(index: int, **options):
        found = plans(index, **options)
        seen.append(np.concatenate([plan.rows for plan in found]).tolist())
        return found

    batches.plans = watched
    return seen


@pytest.mark.parametrize("more", [[], ["train.micro_batch=30", "train.precision=fp16"]])
def test_a_run_resumed_inside_an_epoch_goes_on_with_its_very_batches_and_bits(
    tiny, tmp_path, monkeypatch, more
):
    monkeypatch.setattr(Trainer, "_measure_cost", lambda self: {})
    settings = tiny("train.optimizer=adam", "train.weight_decay=0.01", "train.clip_norm=0.5", *more)
    settings += ["batch_size=100", "train.num_steps=14", "train.log_every=4", "model.dropout=0.1"]
    whole = trainer(settings, tmp_path / "whole")
    expected = rows_of(whole)
    whole.run()
    broken = trainer(settings, tmp_path / "broken")
    found = rows_of(broken)
    before_step(broken, 8, stop)  # of 6 batches an epoch, and between two lines of the log
    with pytest.raises(Stop):
        broken.run()
    resumed = trainer(settings, tmp_path / "broken")
    rest = rows_of(resumed)
    resumed.run()
    assert found + rest == expected and len(rest) == 5
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "broken/metrics.jsonl").read_text()
    assert torch.equal(whole.step.optimizer.weights, resumed.step.optimizer.weights)
    for name, tensor in whole.step.optimizer.state().items():
        assert torch.equal(tensor, resumed.step.optimizer.state()[name]), name


def after_steps(overrides, folder, *, steps: int) -> dict[str, Tensor]:
    """The loss, the gradients of the last step, weights and buffers."""
    made = trainer(overrides, folder)
    for index in range(steps):
        made.model.training_update(index)
        step(made, index)
    found = {"loss": torch.tensor(made.step.read()[0]), "gradients": made.step.optimizer.gradients}
    return found | dict(made.model.named_buffers())


@pytest.mark.parametrize(
    "more", [["model=linear", "model.norm=batch", "train.micro_batch=6"], ["model=routing"]]
)
def test_layers_that_run_again_in_the_backward_pass_train_as_those_that_do_not(tiny, tmp_path, more):
    """What they keep, as running statistics and centroids, moves once a step."""
    settings = tiny(*more, "model.dropout=0.1", "model.num_layers=2")
    plain = after_steps(settings, tmp_path / "plain", steps=3)
    again = after_steps([*settings, "train.activation_checkpointing=true"], tmp_path / "again", steps=3)
    for name, x in plain.items():
        torch.testing.assert_close(again[name], x, msg=name)
    moved = [name for name in plain if "running" in name or "centroids" in name]
    assert moved and any((plain[name] != 0).any() for name in moved)


@pytest.mark.slow
def test_compiled_layers_that_run_again_keep_the_statistics_of_eager_ones(tiny, tmp_path):
    settings = tiny("model=linear", "model.norm=batch", "train.activation_checkpointing=true")
    eager, compiled = (
        after_steps([*settings, f"train.step_mode={mode}"], tmp_path / mode, steps=1)
        for mode in ("eager", "compiled")
    )
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x, rtol=1e-4, atol=1e-5, msg=name)


def test_a_loss_beside_the_output_cannot_be_compiled_in_layers_that_run_again(tiny):
    settings = tiny("train.activation_checkpointing=true", "train.device=cpu")
    with pytest.raises(UserError, match="routing keeps a loss of its own beside its output"):
        run.check(compose([*settings, "model=routing", "train.step_mode=compiled"]))
    run.check(compose([*settings, "model=routing"]))
    run.check(compose([*settings, "model=linear", "train.step_mode=compiled"]))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["train.micro_batch=6", "train.clip_norm=0.5", "train.precision=fp16"]])
def test_two_hundred_compiled_steps_are_two_hundred_eager_ones(tiny, tmp_path, more):
    curves = []
    for mode in ("eager", "compiled"):
        settings = tiny("train.num_steps=200", "train.eval_every=200", f"train.step_mode={mode}", *more)
        trainer([*settings, "train.layout=padded"], tmp_path / mode).run()
        lines = [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").open()]
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) == 40
    # Rounding in another order grows over the steps; half precision rounds at 2^-11.
    np.testing.assert_allclose(*curves, rtol=1e-2 if more else 1e-4)
