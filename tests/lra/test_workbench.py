"""The step that the next seed goes on with: it must be what a fresh process would have."""

import gc
import json
import logging
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lra import records, registry, run, workbench
from lra.backbone import Backbone
from lra.config import compose
from lra.data.prepare import prepare
from lra.schema import BackboneConfig, ModelConfig
from lra.train import Diverged, Trainer
from lra.workbench import adopt
from models.common import Mixer, Place

LENGTH = 64


@pytest.fixture(autouse=True)
def nothing_kept():
    workbench.clear()
    yield
    workbench.clear()


@pytest.fixture
def eager_kept(monkeypatch):
    """Benches of steps that are neither compiled nor captured are kept too; costs, which take a profiler a
    second, are not measured.
    """
    monkeypatch.setattr(Trainer, "_measure_cost", lambda self: {})
    monkeypatch.setattr(
        workbench, "choose_step", lambda *_, **__: ("compiled", False, "as the test wants it")
    )


def model(name: str, seed: int) -> Backbone:
    torch.manual_seed(seed)
    backbone = BackboneConfig(d_model=16, num_layers=2, num_heads=2, d_ff=16)
    made = Backbone(ModelConfig(name, backbone=backbone), num_classes=3, padded_length=LENGTH, vocab_size=12)
    return made


def tensors(made: nn.Module) -> dict[str, Tensor]:
    return {**dict(made.named_parameters()), **dict(made.named_buffers())}


@pytest.mark.parametrize("name", registry.names())
def test_an_adopted_model_has_every_tensor_of_the_fresh_one(name):
    kept, fresh = model(name, 0), model(name, 1)
    places = {n: x.data_ptr() for n, x in tensors(kept).items()}
    assert any(not torch.equal(x, tensors(fresh)[n]) for n, x in tensors(kept).items())
    assert adopt(kept, fresh)
    for n, x in tensors(kept).items():
        assert torch.equal(x, tensors(fresh)[n]) and x.data_ptr() == places[n], n


class Drawn(Mixer):
    """Keeps what a seed decides as `kind` of object outside of its parameters and buffers."""

    def __init__(self, place: Place, *, kind: str = "number") -> None:
        super().__init__(place, projections=False)
        drawn = torch.rand(3)
        self.kept = {
            "number": lambda: float(drawn[0]),
            "list": lambda: {"places": drawn.tolist()},
            "array": lambda: np.asarray(drawn),
            "tensor": lambda: drawn,
            "generator": lambda: np.random.default_rng(0),
            "none": lambda: None,
        }[kind]()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


@pytest.mark.parametrize("kind", ["number", "list", "array", "tensor", "generator"])
def test_a_model_that_keeps_what_the_seed_decides_elsewhere_is_not_adopted(kind):
    place = Place(d_model=16, num_heads=2, max_len=LENGTH)
    torch.manual_seed(0)
    kept, fresh = (nn.Sequential(nn.Linear(2, 2), Drawn(place, kind=kind)) for _ in range(2))
    before = kept[0].weight.clone()
    assert not adopt(kept, fresh)
    assert torch.equal(kept[0].weight, before), "nothing is written"
    kept[1], fresh[1] = Drawn(place, kind="none"), Drawn(place, kind="none")
    assert adopt(kept, fresh)


def trainer(overrides, folder) -> Trainer:
    config = compose(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepare(config.task, config.length), folder)


MECHANISMS = {
    "softmax": ["model.norm=batch", "model.dropout=0.1", "model.attn_dropout=0.1"],
    "performer": ["model.num_features=8", "model.redraw_every=2"],
    "routing": ["model.window=8", "model.num_clusters=2"],
    "luna": [],
    "s4d": ["model.dropout=0.1"],
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_next_seed_trains_as_in_a_fresh_process(tiny, tmp_path, eager_kept, name):
    settings = tiny(f"model={name}", *MECHANISMS[name], "train.num_steps=3", "train.device=cpu")
    first = trainer([*settings, "seed=0"], tmp_path / "first")
    first.run()
    second = trainer([*settings, "seed=1"], tmp_path / "second")
    assert second.step is first.step
    found = second.run()
    workbench.clear()
    fresh = trainer([*settings, "seed=1"], tmp_path / "fresh")
    assert fresh.step is not first.step
    assert fresh.run()["test_accuracy"] == found["test_accuracy"]
    assert (tmp_path / "second/metrics.jsonl").read_text() == (tmp_path / "fresh/metrics.jsonl").read_text()
    for n, x in tensors(fresh.model).items():
        assert torch.equal(x, tensors(second.model)[n]), n
    for n, x in fresh.step.optimizer.state().items():
        assert torch.equal(x, second.step.optimizer.state()[n]), n


RESULTS = ("status", "test_accuracy", "val_accuracy", "best_step", "accuracy_by_length")


def test_runs_that_differ_in_the_seed_have_the_records_of_runs_apart(tiny, eager_kept):
    settings = tiny("train.num_steps=6", "train.eval_every=3", "train.log_every=1", "train.device=cpu")

    def results(seed: int) -> tuple:
        record = run.execute(compose([*settings, f"seed={seed}"]), force=True)
        folder = records.runs_root() / record.run_id
        lines = (folder / "metrics.jsonl").read_text()
        return [getattr(record, name) for name in RESULTS], lines

    together = [results(0), results(1)]
    assert workbench._last.reused and together[0] != together[1]
    workbench.clear()
    assert results(1) == together[1]


def test_the_next_seed_counts_its_own_steps_and_seconds_and_says_what_it_took_over(
    tiny, tmp_path, eager_kept, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "lra")

    def broken(name: str, seed: int, at: int) -> Trainer:
        made = trainer(tiny("train.device=cpu", f"seed={seed}"), tmp_path / name)
        head = made.model.head.layers[-1].weight.data

        def spoil(model: Backbone, step: int) -> None:
            if step == at:
                head.fill_(float("nan"))

        with monkeypatch.context() as patch, pytest.raises(Diverged, match=f"not finite at step {at}$"):
            patch.setattr(Backbone, "training_update", spoil)
            made._loop()
        return made

    first = broken("first", 0, at=3)
    first.step.compile_s += 7.0
    first.step.notes.append("could not be captured: no GPU")
    second = broken("second", 1, at=6)
    assert second.step is first.step
    assert second.how()["compile_s"] == 0
    second.step.compile_s += 2.0
    assert second.how()["compile_s"] == 2
    assert "with the step of the run before, which could not be captured: no GPU" in caplog.text


def test_clearing_lets_compiled_code_go(monkeypatch):
    called = []
    monkeypatch.setitem(sys.modules, "torch._dynamo", SimpleNamespace(reset=lambda: called.append(True)))
    workbench.clear()
    assert called == [True]


@pytest.mark.parametrize("other", ["model.d_ff=48", "train.data=stream", "train.eval_batch_size=50"])
def test_another_cell_gets_a_bench_of_its_own(tiny, tmp_path, eager_kept, other):
    first = trainer(tiny("train.device=cpu"), tmp_path / "a")
    assert trainer(tiny("train.device=cpu", "train.log_every=9"), tmp_path / "b").bench is first.bench
    assert trainer(tiny("train.device=cpu", "seed=1", other), tmp_path / "c").bench is not first.bench


def test_a_run_that_failed_leaves_no_bench(tiny, eager_kept, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loop", lambda self: 1 / 0)
        assert run.execute(compose(tiny("train.device=cpu"))).status == "failed"
    assert workbench._last is None


def test_clearing_lets_the_model_go(tiny, tmp_path, eager_kept):
    made = trainer(tiny("train.device=cpu", "train.num_steps=3"), tmp_path / "run")
    made.run()
    gone = [weakref.ref(made.model), weakref.ref(made.step)]
    del made
    gc.collect()
    assert all(ref() is not None for ref in gone), "kept for the next seed"
    workbench.clear()
    gc.collect()
    assert all(ref() is None for ref in gone)


@pytest.mark.slow
def test_the_second_seed_compiles_nothing_and_ends_as_in_a_fresh_process(tiny, tmp_path):
    settings = tiny("train.step_mode=compiled", "train.device=cpu", "model.dropout=0.1")

    def result(seed: int, folder: str) -> tuple[dict, list[dict]]:
        found = trainer([*settings, f"seed={seed}"], tmp_path / folder).run()
        return found, [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").open()]

    first, _ = result(0, "first")
    second, lines = result(1, "second")
    assert second["compile_s"] < 0.05 * first["compile_s"]
    workbench.clear()
    fresh, expected = result(1, "fresh")
    assert lines == expected and second["test_accuracy"] == fresh["test_accuracy"]
    assert fresh["compile_s"] > 10 * second["compile_s"], "it did compile again, if from a cache on disk"
