"""Records: strict JSON, whole or not at all, readable across schemas; one process per run folder."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from lra import records
from lra.errors import UserError
from lra.records import Record

# The order of the schema, as users' scripts know it.
SCHEMA = """
schema kind run_id status reason task model paper recipe_version deviations length seed batch_size d_model
num_layers num_params state_size test_accuracy val_accuracy num_test majority_accuracy accuracy_by_length
best_step num_steps selection examples_per_s step_ms tokens_per_s padded_tokens_per_s peak_mem_mib
reserved_mib flops_per_step wall_s train_s eval_s data_s compile_s device num_devices host precision
step_mode layout torch versions git_revision command config_hash data_hash data_origin data_variant sweep
extra
""".split()


def make(**values) -> Record:
    known = dict(kind="train", run_id="listops-linear-32-s0-abc", status="ok", task="listops", model="linear")
    return Record(**(known | values))


def test_fields_are_the_schema_in_order(tmp_path):
    assert [field.name for field in fields(Record)] == SCHEMA
    records.write(make(), tmp_path)
    assert list(json.loads((tmp_path / "record.json").read_text())) == SCHEMA


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = make(length=32, test_accuracy=0.25, deviations=["a"], accuracy_by_length={"0-16": 0.5}, seed=0)
    records.write(record, tmp_path)
    assert records.read(tmp_path) == record == records.read(tmp_path / "record.json")


def test_a_record_can_be_replaced():
    assert replace(make(seed=1), status="oom", reason="too large").reason == "too large"


def test_json_is_strict(tmp_path):
    record = make(
        step_ms=float("nan"),
        peak_mem_mib=np.float32(1.5),
        num_params=np.int64(7),
        extra={"a": float("inf"), "b": np.array([1.0, np.nan]), 3: tmp_path, "c": {2, 1}},
    )
    records.write(record, tmp_path)
    text = (tmp_path / "record.json").read_text()
    values = json.loads(text, parse_constant=pytest.fail)
    assert values["step_ms"] is None and values["peak_mem_mib"] == 1.5 and values["num_params"] == 7
    assert values["extra"] == {"a": None, "b": [1.0, None], "3": str(tmp_path), "c": [1, 2]}


def test_keys_of_a_newer_schema_survive_and_missing_keys_are_null(tmp_path):
    values = {
        "schema": 2,
        "kind": "train",
        "run_id": "x",
        "status": "ok",
        "task": "t",
        "model": "m",
        "new": [1],
    }
    (tmp_path / "record.json").write_text(json.dumps(values))
    record = records.read(tmp_path)
    assert record.length is None and record.to_dict()["new"] == [1] and record.schema == 2
    records.write(record, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "record.json").read_text())["new"] == [1]
    assert records.load(tmp_path)["new"].tolist() == [[1]]


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        records.write(make(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_retries_move_old_attempts(tmp_path):
    for attempt, status in enumerate(["failed", "diverged", "ok"]):
        if status == "ok":
            records.save_predictions(tmp_path, [1, 2], [1, 1])
        records.write(make(status=status, seed=attempt), tmp_path)
    assert records.read(tmp_path).seed == 2
    assert [records.read(tmp_path / "attempts" / n).status for n in ("1", "2")] == ["failed", "diverged"]
    assert records.load_predictions(tmp_path).tolist() == [1, 2]
    assert len(records.load(tmp_path)) == 1


def test_predictions_of_an_old_attempt_move_with_its_record(tmp_path):
    records.save_predictions(tmp_path, [1, 1], [1, 1])
    records.write(make(seed=1), tmp_path)
    records.save_predictions(tmp_path, [2, 2])
    records.write(make(seed=2), tmp_path)
    assert records.load_predictions(tmp_path / "attempts" / "1").tolist() == [1, 1]
    assert records.load_predictions(tmp_path).tolist() == [2, 2]
    assert records.load_correct(tmp_path) is None, "labels of the old attempt must not stay"
    records.write(make(status="failed"), tmp_path)
    assert not (tmp_path / "predictions.npy").exists()


def test_predictions_are_one_byte_each(tmp_path):
    records.save_predictions(tmp_path, np.arange(200, dtype=np.int64), np.zeros(200, dtype=np.int32))
    assert records.load_predictions(tmp_path).dtype == np.uint8
    assert (tmp_path / "predictions.npy").stat().st_size < 200 + 150
    assert records.load_correct(tmp_path).sum() == 1


@pytest.mark.parametrize("bad", [[256], [-1], [0.5], [[1]]])
def test_predictions_that_do_not_fit_a_byte_are_a_bug(tmp_path, bad):
    with pytest.raises(AssertionError):
        records.save_predictions(tmp_path, bad)


def test_missing_and_broken_predictions_are_named(tmp_path):
    with pytest.raises(UserError, match="no 'predictions.npy'"):
        records.load_predictions(tmp_path)
    (tmp_path / "predictions.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="broken file.*predictions.npy"):
        records.load_predictions(tmp_path)


# Run states and locks.


HOLD = """
import sys, time
from lra import records
with records.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_locked_folder_is_running_and_names_its_process(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=Path(records.__file__).parent.parent
    ) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            assert records.run_state(tmp_path / "run") == "running"
            with pytest.raises(UserError, match=rf"run folder '.*run' is in use by process {holder.pid} on"):
                with records.lock(tmp_path / "run"):
                    pass
        finally:
            holder.kill()
    assert records.run_state(tmp_path / "run") == "interrupted"
    with records.lock(tmp_path / "run"):
        pass


def test_run_states(tmp_path):
    run = tmp_path / "run"
    assert records.run_state(run) == "absent"
    run.mkdir()
    assert records.run_state(run) == "interrupted"
    with records.lock(run):
        assert records.run_state(run) == "running"
        records.write(make(status="interrupted"), run)
        assert records.run_state(run) == "running"
        records.write(make(status="failed"), run)
        assert records.run_state(run) == "done"
    assert records.run_state(run) == "done"
    records.write(make(status="interrupted"), run)
    assert records.run_state(run) == "interrupted"


# Many records.


def test_load_takes_folders_parents_files_and_lines(tmp_path, monkeypatch):
    for seed in range(3):
        records.write(make(seed=seed, run_id=f"r{seed}"), tmp_path / "sweep" / f"r{seed}")
    (tmp_path / "sweep" / "r0" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "sweep" / "events.jsonl").write_text('{"event": "start"}\n')
    lines = [json.dumps(make(seed=seed, run_id=f"c{seed}").to_dict()) for seed in (7, 8)]
    (tmp_path / "curated.jsonl").write_text("\n".join(lines) + "\n\n")
    interrupted = tmp_path / "sweep" / "r9"
    interrupted.mkdir()
    (interrupted / "config.yaml").write_text("")
    (interrupted / "metrics.jsonl").write_text(lines[0] + "\n")

    def seeds(paths):
        return records.load(paths)["seed"].tolist()

    assert seeds(tmp_path / "sweep" / "r1") == [1]
    assert seeds(str(tmp_path / "sweep")) == [0, 1, 2]
    assert seeds([tmp_path / "sweep" / "r2" / "record.json", tmp_path / "curated.jsonl"]) == [2, 7, 8]
    assert sorted(seeds([tmp_path, tmp_path / "sweep"])) == [0, 1, 2, 7, 8]
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "sweep"))
    assert seeds(None) == [0, 1, 2]


def test_load_gives_numbers_objects_and_paths(tmp_path):
    records.write(make(seed=0, test_accuracy=0.5, accuracy_by_length={"8": 0.1}), tmp_path / "a")
    records.write(make(seed=1, status="failed", run_id="b"), tmp_path / "b")
    frame = records.load(tmp_path)
    assert list(frame.columns) == [*SCHEMA, "path"]
    assert frame["test_accuracy"].mean() == 0.5 and frame["seed"].sum() == 1
    assert frame["accuracy_by_length"][0] == {"8": 0.1} and frame["length"].isna().all()
    assert frame["path"].tolist() == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "a record is a JSON object, not a list"),
        ('{"kind": "train"}', "no text under run_id, status, task, model"),
        (json.dumps(make().to_dict() | {"length": "long"}), "length should be int, not 'long'"),
        (json.dumps(make().to_dict() | {"device": 3}), "device should be str, not 3"),
    ],
)
def test_broken_records_are_named(tmp_path, text, why):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(text)
    with pytest.raises(UserError, match=f"broken record '.*run/record.json': .*{why}"):
        records.load(tmp_path)
    (tmp_path / "some.jsonl").write_text(json.dumps(make().to_dict()) + "\n" + text)
    with pytest.raises(UserError, match=f"broken record in '.*some.jsonl', line 2: .*{why}"):
        records.load(tmp_path / "some.jsonl")


def test_numbers_of_lax_writers_are_not_known(tmp_path):
    text = json.dumps(make().to_dict()).replace('"step_ms": null', '"step_ms": NaN')
    (tmp_path / "record.json").write_text(text.replace('"length": null', '"length": 32.0'))
    record = records.read(tmp_path)
    assert record.step_ms is None and record.length == 32 and isinstance(record.length, int)


def test_nothing_found_says_where_and_what_to_run(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no records under '.*empty'; name a run folder.*lra train"):
        records.load(tmp_path / "empty")
    with pytest.raises(UserError, match="no runs at '.*nowhere': no such file or folder"):
        records.load(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LRA_RUNS", raising=False)
    with pytest.raises(UserError, match="no runs at 'runs'"):
        records.load()
    with pytest.raises(UserError, match="no record at"):
        records.read(tmp_path / "empty")
