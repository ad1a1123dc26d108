"""What a tracker is told by runs that go on, break, or are stopped; without wandb's own process."""

import json
from dataclasses import replace

import pytest

from lra import records, run, tracking
from lra.config import compose
from lra.errors import UserError
from lra.launch import sweep
from lra.schema import TrackerConfig


class Heard:
    """A run of wandb that keeps what it is told; `broken` names what raises."""

    def __init__(self, step=0, broken=()):
        self.step, self.broken, self.rows, self.sum, self.exits = step, broken, [], {}, []
        self.summary, self.url = self, "https://site/us/lra/runs/1"

    def _try(self, what):
        if what in self.broken:
            raise OSError(f"no {what}")

    def log(self, row, step=None):
        self.rows.append((step, row))
        self._try("log")

    def update(self, summary):
        self._try("update")
        self.sum |= summary

    def finish(self, exit_code):
        self.exits.append(exit_code)
        self._try("finish")


@pytest.fixture
def heard(monkeypatch):
    """Makes the run that the next tracker opens."""

    def make(**about):
        made = Heard(**about)

        def open_(asked, **given):
            made.given = given
            return made, "online", None

        monkeypatch.setattr(tracking, "_open", open_)
        return made

    return make


def metrics_line(step, loss=1.0):
    return json.dumps({"step": step, "loss": loss}) + "\n"


def begun(folder, *, resumed=False):
    """A run's tracker and the record it begins with, without the run."""
    config = compose(["length=32", "tracker=wandb"])
    record = run.describe(config, NoStore)
    return tracking.start(config, record, folder, resumed=resumed), record


class NoStore:
    data_hash, data_origin, data_variant = "0" * 12, "regenerated", "none"


def test_a_resumed_run_sends_what_it_keeps_and_each_redone_step_once(heard, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    kept = metrics_line(5) + '{"step": 7, "lo\n' + "[]\n" + metrics_line(10)
    metrics.write_text(kept + metrics_line(15, 8.0) + metrics_line(20, 8.0) + '{"step": 2')
    made = heard()
    tracker, _ = begun(tmp_path, resumed=True)
    assert made.rows == []
    metrics.write_text(kept + metrics_line(15, 2.0))  # as the trainer cuts it, and its first new line
    tracker.line({"step": 15, "loss": 2.0})
    tracker.line({"step": 20, "loss": 3.0})
    assert [(step, row["train/loss"]) for step, row in made.rows] == [
        (5, 1.0),
        (10, 1.0),
        (15, 2.0),
        (20, 3.0),
    ]


@pytest.mark.parametrize(("status", "steps"), [("ok", [5]), ("failed", [])])
def test_a_resumed_run_without_a_new_line_sends_the_old_ones_if_it_began(heard, tmp_path, status, steps):
    (tmp_path / "metrics.jsonl").write_text(metrics_line(5))
    made = heard()
    tracker, record = begun(tmp_path, resumed=True)
    tracker.end(replace(record, status=status))
    assert [step for step, _ in made.rows] == steps


def test_what_the_site_has_is_not_sent_again(heard, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(metrics_line(5) + metrics_line(10) + metrics_line(12))
    made = heard(step=12)
    tracker, _ = begun(tmp_path, resumed=True)
    tracker.line({"step": 15, "loss": 1.0})
    assert [step for step, _ in made.rows] == [12, 15]


def test_a_run_that_begins_anew_sends_nothing_of_the_one_before(heard, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(metrics_line(5))
    made = heard()
    tracker, _ = begun(tmp_path)
    tracker.line({"step": 7, "loss": 1.0})
    assert [step for step, _ in made.rows] == [7]


def test_a_run_whose_logging_broke_still_ends_with_its_status(heard, tmp_path):
    made = heard(broken=("log",))
    tracker, record = begun(tmp_path)
    for step in (1, 2):
        tracker.line({"step": step, "loss": 1.0})
    ended = tracker.end(replace(record, status="diverged"))
    assert (len(made.rows), made.exits, made.sum["status"]) == (1, [1], "diverged")
    assert ended.extra["tracker"]["url"] == made.url and "no log" in ended.extra["tracker"]["problem"]


def test_each_way_of_ending_is_tried_and_every_problem_told(heard, tmp_path):
    made = heard(broken=("update", "finish"))
    tracker, record = begun(tmp_path)
    problem = tracker.end(replace(record, status="ok")).extra["tracker"]["problem"]
    assert made.exits == [0] and "no update" in problem and "no finish" in problem


def test_an_error_that_leaves_a_run_makes_it_failed(heard, tmp_path):
    made = heard()
    tracker, _ = begun(tmp_path)
    with pytest.raises(ValueError, match="bad"), tracker:
        raise ValueError("bad")
    assert (made.exits, made.sum) == ([1], {"status": "failed", "reason": "bad"})


@pytest.mark.parametrize(
    ("broken", "interrupted", "code"), [((), False, 0), (("log",), False, 1), (("update",), True, 255)]
)
def test_a_sweeps_run_ends_with_counts_and_a_code(heard, tmp_path, broken, interrupted, code):
    pytest.importorskip("wandb")
    made = heard(broken=broken)
    _, record = begun(tmp_path)
    tracking.end_sweep(TrackerConfig(name="wandb"), "sweep-1", [record], interrupted=interrupted)
    assert made.exits == [code] and len(made.rows) == 1
    assert made.sum.get("failed") == (None if "update" in broken else 1)


def test_a_sweep_keeps_to_the_group_and_draws_no_figures_where_none_are_wanted(heard, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    made = heard()
    _, record = begun(tmp_path)
    (records.runs_root() / record.run_id).mkdir(parents=True)
    records.write(record, records.runs_root() / record.run_id)
    monkeypatch.setattr(tracking, "_figures", lambda frame, folder: pytest.fail("drawn"))
    tracking.end_sweep(TrackerConfig(name="wandb", group="theirs", figures=False), "sweep-1", [record])
    assert made.given["group"] == "theirs" and made.exits == [0] and list(made.rows[0][1]) == ["runs"]


def test_a_stopped_sweep_is_shown_with_what_has_ended(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(
        tracking, "end_sweep", lambda config, name, ended, **how: told.append((len(ended), how))
    )

    def stopped(jobs, *, on_event):
        record = run.failure(jobs[0].overrides, "a reason")
        on_event({"kind": "end", "record": record})
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep.train([*tiny(), "seed=0,1"], multirun=True)
    assert told == [(1, {"interrupted": True})]


def test_settings_of_the_tracker_cannot_be_swept(tiny):
    with pytest.raises(UserError, match="varies a setting of the tracker.*one value"):
        sweep.train(tiny("tracker=wandb", "tracker.mode=offline,disabled"), multirun=True)
