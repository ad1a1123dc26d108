"""The ladder of a training step: every rung trains, and what the table says is what the rows say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import lra
from lra import run
from lra.config import compose

ROOT = Path(lra.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench_step():
    spec = importlib.util.spec_from_file_location("bench_step", ROOT / "scripts" / "bench_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_step"]


SMALL = ["length=32", "task.padded_length=32", "task.num_train=600", "task.num_val=100", "task.num_test=150"]
SIZES = ["batch_size=8", "model.d_model=16", "model.d_ff=32", "model.num_layers=1", "train.precision=fp32"]


def test_every_rung_that_a_cpu_has_is_measured_and_written(bench_step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "WINDOW_S", 0.001)
    output = tmp_path / "step.jsonl"
    given = ["--tasks", "listops", "--models", "softmax", "--rungs", "plain,kernel,packed", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *given, *SMALL, *SIZES])
    assert bench_step.main() == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["rung"], row["status"]) for row in rows] == [
        (r, "ok") for r in ("plain", "kernel", "packed")
    ]
    assert all(0 < row["quartiles"][0] <= row["step_ms"] <= row["quartiles"][1] for row in rows)
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--table", str(output)])
    assert bench_step.main() == 0 and capsys.readouterr().out == printed
    assert f"{rows[0]['step_ms'] / rows[2]['step_ms']:.1f} |" in printed


@pytest.mark.parametrize("model", ["linear", "s4d"])
def test_the_plain_loop_and_ours_train_the_same_model_on_the_same_rows(
    bench_step, tmp_path, monkeypatch, model
):
    """Fed the same batches without dropout, both end at the same weights; s4d's are tagged with rates."""
    settings = [*SMALL, *SIZES, "task=listops", f"model={model}", "paper=nystromformer2021"]
    settings += ["model.dropout=0", "train.layout=padded"]
    config = compose(settings)
    store = run.prepared(config)
    torch.manual_seed(0)
    theirs = {}
    build = bench_step.build_model
    monkeypatch.setattr(bench_step, "build_model", lambda *a, **k: theirs.setdefault("model", build(*a, **k)))
    steps, trainer = bench_step.our_steps(config, store, tmp_path)
    batches = trainer.batches["train"]

    def same_batches(dataset, *, batch_size, collate_fn, **_):
        for step in range(5):
            yield collate_fn([dataset[int(row)] for row in batches.train_rows(step)])

    monkeypatch.setattr(bench_step, "DataLoader", same_batches)
    plain = bench_step.plain_steps(config, store, torch.device("cpu"))
    next(plain)  # the first step; its model is there now
    theirs["model"].load_state_dict(trainer.model.state_dict())
    plain = bench_step.plain_steps(config, store, torch.device("cpu"))
    for _ in range(4):
        next(steps)
        next(plain)
    pairs = zip(trainer.model.parameters(), theirs["model"].parameters(), strict=True)
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rungs", "plain,fast"], "unknown rungs fast; there are plain"),
        (["--tasks", "listop", "--rungs", "plain"], "unknown task 'listop'; did you mean 'listops'"),
        (["--models", "linear", "--rungs", "plain", "model.depth=3"], "unknown setting 'model.depth'"),
        (["--table", "/no/such.jsonl"], "cannot read the rows of a table"),
        (["--table", __file__], "cannot read the rows of a table"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(bench_step, monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *given])
    with pytest.raises(SystemExit) as stop:
        bench_step.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_rung_that_fails_is_a_row_with_a_reason(bench_step, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "measure", lambda *_: 1 / 0)
    row = bench_step.bench("listops", "linear", "packed", "nystromformer2021", [*SMALL, *SIZES], tmp_path)
    assert (row.status, row.step_ms) == ("failed", None) and "ZeroDivisionError" in row.reason
    assert "| failed |" in bench_step.table([row])


def test_a_row_says_how_it_ran_and_what_a_cpu_has_not(bench_step, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "measure", lambda *_: (1.0, [1.0, 1.0]))
    rows = [
        bench_step.bench("listops", "linear", rung, "nystromformer2021", [*SMALL, *SIZES], tmp_path)
        for rung in ("kernel", "compiled", "captured", "packed")
    ]
    assert [(row.status, row.step_mode, row.compiled) for row in rows] == [
        ("ok", "eager", False),
        ("ok", "compiled", True),
        ("unsupported", None, None),
        ("ok", "eager", False),
    ]
    assert "CUDA graphs need a GPU" in rows[2].reason


@pytest.mark.parametrize("setting", ["train.clip_value=0.1", "train.micro_batch=4"])
def test_the_plain_loop_refuses_what_it_does_not_apply(bench_step, tmp_path, setting):
    given = [*SMALL, *SIZES, setting]
    row = bench_step.bench("listops", "linear", "plain", "nystromformer2021", given, tmp_path)
    assert row.status == "unsupported" and setting in row.reason
