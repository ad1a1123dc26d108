"""Tracking with wandb: what an offline run's files hold, and that no tracker ever stops a run."""

import json
import logging
import os
import sys
import types
from dataclasses import replace

import pytest
import wandb_files
import yaml

from lra import measuring, records, run, tracking
from lra.config import compose
from lra.errors import UserError
from lra.launch import sweep
from lra.measure import measure
from lra.report import figures
from lra.schema import TrackerConfig

OFFLINE = ("tracker=wandb", "tracker.mode=offline")


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The package, without the settings and accounts of whoever runs the tests."""
    package = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tracking, "_unreachable_since", None)
    tracking._no_account.cache_clear()
    package.teardown()  # its settings are read once a process
    yield package
    package.teardown()


def folder_of(record):
    return records.runs_root() / record.run_id


def begun(folder, *overrides, **labels):
    """A run's tracker and the record it begins with, without the run."""
    config = compose(["length=32", "tracker=wandb", *overrides])
    record = replace(run.describe(config, NoStore), **labels)
    folder.mkdir(exist_ok=True)
    return tracking.start(config, record, folder), record


class NoStore:
    data_hash, data_origin, data_variant = "0" * 12, "regenerated", "none"


def lines_of(record):
    """metrics.jsonl by step, under the names that the tracker gives."""
    rows = {}
    for line in map(json.loads, (folder_of(record) / "metrics.jsonl").read_text().splitlines()):
        names = {tracking.NAMES[key]: value for key, value in line.items() if key != "step"}
        rows.setdefault(line["step"], {}).update(names)
    return rows


def rows_of(found):
    """History by step, without wandb's own columns."""
    return {
        row["_step"]: {key: value for key, value in row.items() if not key.startswith("_")}
        for row in found["history"]
    }


def test_an_offline_run_holds_the_config_the_metrics_and_the_record(wandb, tiny, tmp_path):
    config = compose(
        tiny(*OFFLINE, "tracker.project=mine", "tracker.tags=[a,b]", "tracker.entity=us", "tracker.notes=why")
    )
    record = run.execute(config, sweep="sweep-1", command="lra train ...")
    found = wandb_files.read(folder_of(record))
    made = found["run"]
    assert (made.display_name, made.run_group, made.job_type) == (record.run_id, "sweep-1", "train")
    assert (made.project, list(made.tags)) == ("mine", ["a", "b"])
    assert (made.entity, made.notes) == ("us", "why")
    saved = yaml.safe_load((folder_of(record) / "config.yaml").read_text())
    assert {key: found["config"][key] for key in saved} == saved
    assert found["config"]["config_hash"] == record.config_hash
    assert rows_of(found) == lines_of(record) and sorted(rows_of(found)) == [5, 10, 15, 20]
    assert set(rows_of(found)[10]) == {"train/loss", "train/lr", "val/accuracy", "val/loss"}
    for key in ("status", "test_accuracy", "step_ms", "tokens_per_s", "peak_mem_mib", "num_params"):
        assert found["summary"][key] == getattr(record, key), key
    assert found["exit"] == 0
    where = record.extra["tracker"]
    assert (where["mode"], where["id"]) == ("offline", made.run_id) and "problem" not in where
    assert os.path.samefile(where["files"], found["path"].parent)
    assert f"wandb sync {where['files']}" in tracking.told([record])
    assert not list((tmp_path / "here").iterdir())


def test_a_resumed_run_goes_on_under_its_id_and_a_forced_one_is_another(wandb, tiny):
    config = compose(tiny(*OFFLINE))

    def stop(event):
        if event["step"] == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(config, progress=stop)
    (folder,) = records.runs_root().glob("listops-*")
    before = wandb_files.read(folder)
    assert (before["summary"]["status"], before["exit"]) == ("interrupted", 255)
    (folder / "wandb").rename(folder / "before")
    record = run.execute(config)
    after = wandb_files.read(folder)
    assert after["run"].run_id == before["run"].run_id and after["exit"] == 0
    assert rows_of(after) == lines_of(record) and sorted(rows_of(after)) == [5, 10, 15, 20]
    (folder / "wandb").rename(folder / "after")
    run.execute(config, force=True)
    assert wandb_files.read(folder)["run"].run_id != before["run"].run_id


def test_a_run_that_did_not_succeed_ends_so(wandb, tmp_path):
    tracker, record = begun(tmp_path, "tracker.mode=offline")
    with tracker:
        tracker.end(replace(record, status="oom", reason="CUDA out of memory"))
    found = wandb_files.read(tmp_path)
    assert (found["summary"]["status"], found["summary"]["reason"]) == ("oom", "CUDA out of memory")
    assert found["exit"] == 1


def test_a_disabled_tracker_leaves_no_files(wandb, tmp_path):
    tracker, record = begun(tmp_path, "tracker.mode=disabled")
    tracker.line({"step": 1, "loss": 0.5})
    ended = tracker.end(record)
    assert ended.extra["tracker"]["mode"] == "disabled" and not (tmp_path / "wandb").exists()
    assert tracking.told([ended]) == "wandb: disabled"


def test_wandbs_own_variables_decide_what_is_left_open(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    tracking.check(TrackerConfig(name="wandb"))
    tracker, record = begun(tmp_path, "tracker.group=kept", sweep="sweep-1")
    tracker.end(record)
    made = wandb_files.read(tmp_path)["run"]
    assert (made.project, made.run_group) == ("theirs", "kept")


def test_a_server_that_does_not_answer_leaves_runs_offline_and_only_the_first_waits(
    wandb, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(tracking, "INIT_S", 1.0)
    with caplog.at_level(logging.WARNING, logger="lra"):
        tracker, record = begun(tmp_path / "first", "tracker.mode=online")
    tracker.line({"step": 1, "loss": 0.5})
    where = tracker.end(record).extra["tracker"]
    assert where["mode"] == "offline" and "kept offline" in where["problem"]
    assert where["problem"] in caplog.text
    assert rows_of(wandb_files.read(tmp_path / "first")) == {1: {"train/loss": 0.5}}
    monkeypatch.setattr(tracking, "INIT_S", 0.0)  # a second try would fail otherwise than the first
    tracker, record = begun(tmp_path / "next", "tracker.mode=online")
    assert "did not answer a run before" in tracker.end(record).extra["tracker"]["problem"]


def test_a_tracker_that_breaks_does_not_stop_a_run_and_says_so_once(wandb, tiny, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(wandb.Run, "log", broken)
    with caplog.at_level(logging.WARNING, logger="lra"):
        record = run.execute(compose(tiny(*OFFLINE)))
    assert record.status == "ok" and "no space left" in record.extra["tracker"]["problem"]
    assert caplog.text.count("no space left") == 1
    assert "1 with problems" in tracking.told([record])


def test_a_tracker_that_does_not_start_does_not_stop_a_run(wandb, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    tracker, record = begun(tmp_path, "tracker.mode=offline")
    tracker.line({"step": 1, "loss": 0.5})
    assert "no service" in tracker.end(record).extra["tracker"]["problem"]
    tracking.end_sweep(TrackerConfig(name="wandb", mode="offline"), "sweep-1", [record])


def test_a_sweep_ends_with_a_run_of_its_own_that_holds_table_and_figures(wandb, tiny, monkeypatch):
    monkeypatch.setattr(figures, "KINDS", {"speed": figures.KINDS["speed"]})  # one kind of five, for time
    config = compose(tiny(*OFFLINE))
    record = run.execute(config, sweep="sweep-1")
    tracking.end_sweep(config.tracker, "sweep-1", [record])
    found = wandb_files.read(records.runs_root())
    made = found["run"]
    assert (made.display_name, made.run_group, made.job_type) == ("sweep-1", "sweep-1", "sweep")
    assert (found["summary"]["num_runs"], found["summary"]["ok"], found["exit"]) == (1, 1, 0)
    (row,) = found["history"]
    files = found["path"].parent / "files"
    assert (files / row["figures/speed.path"]).read_bytes().startswith(b"\x89PNG")
    (shown,) = json.loads((files / row["runs.path"]).read_text())["data"]
    assert dict(zip(tracking.COLUMNS, shown, strict=True))["test_accuracy"] == record.test_accuracy


def test_a_measured_cell_is_a_run_whose_summary_is_its_record(wandb, monkeypatch):
    monkeypatch.setattr(measuring, "MIN_SECONDS", 0.0)
    (record,) = measure(["model=identity", "length=16", "batch_size=2", "mode=infer", *OFFLINE])
    found = wandb_files.read(records.runs_root() / "measure" / record.run_id)
    assert (found["run"].job_type, found["config"]["mode"]) == ("measure", "infer")
    assert (found["summary"]["step_ms"], found["history"]) == (record.step_ms, [])


def test_online_without_an_account_is_refused_before_a_run_begins(wandb, tiny):
    with pytest.raises(UserError, match="wandb login.*tracker.mode=offline"):
        sweep.train(tiny("tracker=wandb", "tracker.mode=online"))
    assert not records.runs_root().exists()


def test_online_with_an_account_is_let_through_and_wrong_credentials_are_told(wandb, monkeypatch):
    online = TrackerConfig(name="wandb", mode="online")
    monkeypatch.setattr(
        wandb, "login", lambda *, prompt, verify: not prompt
    )  # it must never wait for a person
    tracking.check(online)

    def wrong(*, prompt, verify):
        raise wandb.errors.AuthenticationError("API key must be 40 characters")

    monkeypatch.setattr(wandb, "login", wrong)
    tracking.check(online)  # asked once a process
    tracking._no_account.cache_clear()
    with pytest.raises(UserError, match="40 characters; run `wandb login`"):
        tracking.check(online)


def test_a_package_that_cannot_be_imported_is_told_with_its_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise TypeError('Descriptors cannot be created')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"cannot be imported \(TypeError: Descriptors.*force-reinstall"):
        sweep.train(tiny("tracker=wandb"))


@pytest.mark.parametrize("there", [None, types.ModuleType("wandb")], ids=["nothing", "a folder of that name"])
def test_without_the_package_the_message_says_what_to_install(tiny, monkeypatch, there):
    monkeypatch.setitem(sys.modules, "wandb", there)
    with pytest.raises(UserError, match=r"pip install 'lra\[wandb\]'"):
        sweep.train(tiny("tracker=wandb"))
    assert not records.runs_root().exists()


def test_the_tracker_is_no_part_of_what_a_run_is():
    plain, tracked = compose([]), compose(["tracker=wandb", "tracker.mode=offline", "tracker.tags=[x]"])
    assert plain.run_id("data") == tracked.run_id("data")
    assert tracked.tracker.tags == ["x"] and plain.tracker == TrackerConfig()
    assert not compose(["paper=nystromformer2021", "tracker=wandb"]).deviations[
        len(compose(["paper=nystromformer2021"]).deviations) :
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracker=wandbb"], "did you mean 'wandb'"),
        (["tracker.project=x"], "tracker=none tracks nothing"),
        (["tracker=wandb", "tracker.mode=of"], "available: auto, disabled, offline, online"),
        (["tracker=wandb", "tracker.projet=x"], "did you mean 'tracker.project'"),
        (["tracker=wandb", "tracker.tags=x"], "tracker.tags"),
    ],
)
def test_a_wrong_setting_of_the_tracker_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        compose(overrides)


def test_of_several_processes_only_the_first_tracks(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.parallel, "is_first", lambda: False)
    config = compose(tiny(*OFFLINE))
    record = run.describe(config, run.prepared(config))
    tracker = tracking.start(config, record, tmp_path)
    tracker.line({"step": 1, "loss": 1.0})
    assert tracker.end(record) is record and not list(tmp_path.glob("*"))
