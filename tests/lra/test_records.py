"""Records: strict JSON, whole or not at all, readable across schemas; one process per run folder."""

import errno
import json
import os
import resource
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


FULL = r"cannot write in run folder '{}': No space left on device; .*LRA_RUNS"


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_folder_and_leaves_it_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", disk_full)
    for save in (lambda: records.write(make(), tmp_path), lambda: records.save_predictions(tmp_path, [1])):
        with pytest.raises(UserError, match=FULL.format(tmp_path)):
            save()
        assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_cannot_be_moved_stays(tmp_path, monkeypatch):
    records.write(make(seed=1), tmp_path)
    monkeypatch.setattr(Path, "mkdir", disk_full)
    for save in (
        lambda: records.archive(tmp_path),
        lambda: records.write(make(seed=2), tmp_path),
        lambda: records.save_predictions(tmp_path, [1]),
    ):
        with pytest.raises(UserError, match=FULL.format(tmp_path)):
            save()
    assert records.read(tmp_path).seed == 1


def test_a_lock_that_cannot_be_made_names_the_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="cannot write in run folder '.*file/run': Not a directory; .*LRA_RUNS"
    ):
        with records.lock(tmp_path / "file" / "run"):
            pass
    monkeypatch.setattr(Path, "mkdir", disk_full)
    with pytest.raises(UserError, match=FULL.format(tmp_path / "run")):
        with records.lock(tmp_path / "run"):
            pass


def test_a_lock_that_cannot_name_its_process_is_not_held(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (0, hard)
    )  # files can be made, but no byte fits, as on a full disk
    try:
        with pytest.raises(UserError, match="cannot write in run folder .*: File too large; .*LRA_RUNS"):
            with records.lock(tmp_path):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert records.run_state(tmp_path) == "interrupted"


def test_errors_of_the_work_under_a_lock_are_its_own(tmp_path):
    with pytest.raises(OSError, match="of the work"):
        with records.lock(tmp_path):
            raise OSError("of the work")
    assert records.run_state(tmp_path) == "interrupted"


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
            with pytest.raises(
                records.Busy, match=rf"run folder '.*run' is in use by process {holder.pid} on"
            ):
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


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("status", "banana", "one of ok, oom, diverged, failed, interrupted, unsupported, not 'banana'"),
        ("kind", "banana", "one of train, measure, not 'banana'"),
        ("test_accuracy", 17.0, "a fraction from 0 to 1, not 17.0"),
        ("val_accuracy", -0.5, "a fraction from 0 to 1, not -0.5"),
        ("majority_accuracy", 1.01, "a fraction from 0 to 1"),
        ("seed", 10**19, "a whole number of at most 64 bits, not 10000000000000000000"),
        ("seed", 10**400, "int, not 1000"),
        ("num_params", 2**63, "from 0 to 9223372036854775807"),
        ("step_ms", 10**400, "float, not 1000"),
        ("deviations", "text", "a list, not 'text'"),
    ],
)
def test_values_that_no_run_can_find_are_named(tmp_path, key, value, why):
    (tmp_path / "record.json").write_text(json.dumps(make().to_dict() | {key: value}))
    with pytest.raises(UserError, match=f"broken record '.*record.json': {key} should be {why}"):
        records.load(tmp_path)


AMOUNTS = [n for n, kind in records.FIELDS.items() if kind in (int, float) and n != "seed"]


@pytest.mark.parametrize("name", AMOUNTS)
def test_no_amount_is_negative(name):
    assert getattr(Record.from_dict(make().to_dict() | {name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"{name} should be .*, not -4"):
        Record.from_dict(make().to_dict() | {name: -4})


def test_the_ends_of_every_range_reach_a_table(tmp_path):
    ends = dict(
        test_accuracy=1, val_accuracy=0, seed=-3, num_params=2**63 - 1, step_ms=10**300, tokens_per_s=0
    )
    records.write(make(**ends), tmp_path)
    row = records.load(tmp_path).iloc[0]
    assert all(row[name] == value for name, value in ends.items())


def test_a_file_of_lines_that_is_not_text_is_named(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read '.*some.jsonl'"):
        records.load(tmp_path / "some.jsonl")


def test_a_file_of_other_lines_is_no_file_of_records(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"model": "linear", "status": "ok", "step_ms": 1.0}\n')
    with pytest.raises(UserError, match="no records in '.*other.jsonl': its first line.*name a run folder"):
        records.load(tmp_path / "other.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no records under '.*empty.jsonl'"):
        records.load(tmp_path / "empty.jsonl")


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
