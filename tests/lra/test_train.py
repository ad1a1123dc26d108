"""One run: what it learns, writes, resumes, and how it fails."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from lra import records, run
from lra.assembly import choose_layout
from lra.config import compose
from lra.data.prepare import prepare
from lra.errors import UserError
from lra.scores import accuracy_by_length
from lra.stop import Stop
from lra.train import Trainer


def trainer(overrides, folder) -> Trainer:
    config = compose(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepare(config.task, config.length), folder)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_that_the_design_promises(tiny):
    record = run.execute(compose(tiny()))
    folder = records.runs_root() / record.run_id
    assert record.status == "ok"
    for name in (
        "config.yaml",
        "record.json",
        "metrics.jsonl",
        "log.txt",
        "predictions.npy",
        "checkpoint/best.pt",
    ):
        assert (folder / name).is_file(), name
    assert records.read(folder).test_accuracy == record.test_accuracy
    for field in (
        "num_params",
        "flops_per_step",
        "peak_mem_mib",
        "step_ms",
        "tokens_per_s",
        "data_hash",
        "device",
    ):
        assert getattr(record, field), field
    assert record.num_test == 150 == len(records.load_predictions(folder))


def test_the_run_id_names_task_model_length_seed_and_config(tiny):
    config = compose(tiny("seed=3"))
    store = prepare(config.task, config.length)
    name = config.run_id(store.data_hash)
    assert name.startswith("listops-softmax-32-s3-") and len(name.rsplit("-", 1)[1]) == 12
    other_seed = dataclasses.replace(config, seed=4)
    assert other_seed.config_hash(store.data_hash) == config.config_hash(store.data_hash)
    wider = compose(tiny("seed=3", "model.d_ff=48"))
    assert wider.config_hash(store.data_hash) != config.config_hash(store.data_hash)
    logged = compose(tiny("seed=3", "train.log_every=7", "train.device=cpu"))
    assert logged.run_id(store.data_hash) == name


def test_the_same_seed_gives_the_same_bits(tiny):
    first = run.execute(compose(tiny("model.dropout=0.2")))
    folder = records.runs_root() / first.run_id
    before = lines(folder), torch.load(folder / "checkpoint/best.pt")["model"]
    run.execute(compose(tiny("model.dropout=0.2")), force=True)
    after = lines(folder), torch.load(folder / "checkpoint/best.pt")["model"]
    assert before[0] == after[0]
    for name, value in before[1].items():
        assert torch.equal(value, after[1][name]), name


def test_a_run_stopped_and_resumed_equals_the_unbroken_run(tiny, tmp_path, monkeypatch):
    settings = tiny(
        "model.dropout=0.2", "train.schedule=plateau", "train.plateau_patience=0", "model=performer"
    )
    settings += ["model.num_features=16", "model.redraw_every=3"]
    whole = trainer(settings, tmp_path / "whole")
    expected = whole.run()

    broken = trainer(settings, tmp_path / "broken")
    update = broken.model.training_update

    def stop_at_13(step: int) -> None:
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        update(step)

    monkeypatch.setattr(broken.model, "training_update", stop_at_13)
    with pytest.raises(Stop) as stopped:
        broken.run()
    assert stopped.value.exit_status == 143 and broken.state.step == 13
    resumed = trainer(settings, tmp_path / "broken")
    found = resumed.run()

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert found["test_accuracy"] == expected["test_accuracy"] and found["num_steps"] == 20
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_a_signal_during_the_last_evaluation_ends_the_run_and_the_next_try_only_scores_it(
    tiny, tmp_path, monkeypatch
):
    broken = trainer(tiny(), tmp_path / "run")
    evaluate = broken.evaluate

    def stop_at_the_end(split: str):
        if broken.state.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(split)

    monkeypatch.setattr(broken, "evaluate", stop_at_the_end)
    with pytest.raises(Stop):
        broken.run()
    resumed = trainer(tiny(), tmp_path / "run")
    assert resumed.run()["num_steps"] == 20
    assert lines(tmp_path / "run")[-1]["step"] == 20


def test_a_checkpoint_of_another_config_is_refused(tiny, tmp_path):
    first = trainer(tiny(), tmp_path / "run")
    first._save()
    with pytest.raises(UserError, match="belongs to another config"):
        trainer(tiny("train.lr=0.5"), tmp_path / "run").run()
    saved = torch.load(tmp_path / "run/checkpoint/last.pt")
    del saved["format"], saved["step"]  # as an older one has neither
    torch.save(saved, tmp_path / "run/checkpoint/last.pt")
    with pytest.raises(UserError, match="another version of lra; delete it, or add --force"):
        trainer(tiny(), tmp_path / "run").run()
    (tmp_path / "run" / "checkpoint" / "last.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be read"):
        trainer(tiny(), tmp_path / "run").run()


def test_a_loss_that_is_not_a_number_ends_the_run_as_diverged(tiny):
    settings = tiny("train.lr=1e30", "train.schedule=constant", "train.log_every=1")
    record = run.execute(compose(settings))
    assert record.status == "diverged" and "step" in record.reason
    assert says_how(record)
    assert lines(records.runs_root() / record.run_id), "what was logged before stays"
    assert run.execute(compose(settings)) == record, "it would only diverge again, so it is not run again"


def test_running_out_of_memory_is_a_result(tiny, monkeypatch):
    monkeypatch.setattr(
        Trainer, "_loop", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("no more"))
    )
    record = run.execute(compose(tiny()))
    assert record.status == "oom" and record.reason == "no more" and says_how(record)


def says_how(record) -> bool:
    """Whether a record tells how its steps ran."""
    told = record.step_mode, record.compile_s, record.extra["compiled"], record.extra["step_reason"]
    return told == ("eager", 0.0, False, "CUDA graphs need a GPU")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_error_that_a_signal_brought_about_is_a_stop(tiny, tmp_path, number):
    """Ctrl-C ends the child processes that compile too, and what waits for them fails."""
    made = trainer(tiny(), tmp_path / "run")

    def fail(step: int) -> None:
        os.kill(os.getpid(), number)
        raise RuntimeError("the compiler is gone")

    made.model.training_update = fail
    with pytest.raises(Stop) as stopped:
        made._loop()
    assert stopped.value.exit_status == 128 + number and "is gone" in str(stopped.value.__cause__)


def test_an_error_in_a_run_is_recorded_with_its_traceback_in_the_log(tiny, monkeypatch):
    def fail(self) -> None:
        raise ArithmeticError("\n".join(["it began", *["and so on"] * 100, "the cause"]))

    monkeypatch.setattr(Trainer, "_loop", fail)
    record = run.execute(compose(tiny()))
    assert record.status == "failed" and says_how(record)
    assert record.reason.startswith("ArithmeticError: it began and so on") and len(record.reason) < 500
    assert record.reason.endswith("and so on the cause") and "\n" not in record.reason
    assert "Traceback" in (records.runs_root() / record.run_id / "log.txt").read_text()
    monkeypatch.undo()


def test_a_failed_run_is_tried_again_and_its_record_kept(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loop", lambda self: 1 / 0)
        failed = run.execute(compose(tiny()))
    record = run.execute(compose(tiny()))
    assert failed.status == "failed" and record.status == "ok"
    assert list((records.runs_root() / record.run_id / "attempts").rglob("record.json"))


def test_an_unwritable_run_folder_is_the_users_to_mend(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(UserError, match="LRA_RUNS"):
        run.execute(compose(tiny()))


def test_a_batch_larger_than_the_training_set_is_refused(tiny):
    with pytest.raises(UserError, match="larger than the 600 training rows"):
        run.execute(compose(tiny("batch_size=601")))


@pytest.mark.parametrize("batch_size", [1, 7, 50, 150, 400])
def test_evaluation_scores_each_test_example_once_at_any_batch_size(tiny, tmp_path, batch_size):
    made = trainer(tiny(f"train.eval_batch_size={batch_size}"), tmp_path / "run")
    accuracy, loss, predictions = made.evaluate("test")
    whole = trainer(tiny("train.eval_batch_size=64"), tmp_path / "run").evaluate("test")
    assert len(predictions) == 150
    assert (accuracy, list(predictions)) == (whole[0], list(whole[2]))
    assert loss == pytest.approx(whole[1], rel=1e-5)  # float32 sums in another order


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tiny, tmp_path):
    whole = trainer(tiny(), tmp_path / "a")
    parts = trainer(tiny("train.micro_batch=5"), tmp_path / "b")
    for made, micro_batch in ((whole, None), (parts, 5)):
        plans = made.batches["train"].plans(0, micro_batch=micro_batch)
        made.step.train(made.batches["train"], plans, lr=1e-3)
    assert whole.step.read()[0] == pytest.approx(parts.step.read()[0], rel=1e-6)
    gradients = (whole.step.optimizer.gradients, parts.step.optimizer.gradients)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_packed_and_padded_training_follow_the_same_curve(tiny, tmp_path):
    curves = []
    for layout in ("packed", "padded"):
        made = trainer(tiny(f"train.layout={layout}", "model=linear"), tmp_path / layout)
        made.run()
        curves.append([line["loss"] for line in lines(tmp_path / layout) if "loss" in line])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_training_learns_more_than_the_majority(tiny, tmp_path):
    made = trainer(tiny("train.num_steps=150", "train.lr=1e-2", "train.log_every=50"), tmp_path / "run")
    found = made.run()
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert found["test_accuracy"] > found["majority_accuracy"] + 0.05


@pytest.mark.parametrize(("option", "value"), [("norm_stats", "all"), ("pool", "mean_all")])
def test_quirks_that_count_padding_take_the_padded_layout(tiny, option, value):
    settings = tiny(f"model.{option}={value}", "model.norm=batch")
    assert choose_layout(compose(settings)) == "padded"
    with pytest.raises(UserError, match="needs padding"):
        choose_layout(compose([*settings, "train.layout=packed"]))


def test_accuracy_by_length_counts_every_row_in_one_bucket():
    lengths = np.array([3, 5, 5, 8, 9, 12, 20, 31])
    right = np.array([1, 1, 0, 0, 1, 0, 0, 0], dtype=bool)
    found = accuracy_by_length(right, lengths, 1)
    assert sum(bucket["num"] for bucket in found.values()) == 8
    assert sum(bucket["num"] * bucket["accuracy"] for bucket in found.values()) == pytest.approx(3)
    assert accuracy_by_length(right, np.full(8, 16), 1) is None


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_precision_trains(tiny, precision):
    record = run.execute(
        compose(tiny(f"train.precision={precision}", "train.clip_norm=1.0", "train.clip_value=0.5"))
    )
    assert record.status == "ok" and record.precision == precision


def test_selection_last_scores_the_final_weights(tiny, tmp_path):
    made = trainer(tiny("train.selection=last"), tmp_path / "run")
    found = made.run()
    assert found["best_step"] == 20 and not (tmp_path / "run" / "checkpoint" / "best.pt").exists()
