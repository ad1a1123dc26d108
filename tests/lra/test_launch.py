"""Sweeps: what runs, what is skipped, and that one bad run does not stop the others."""

import os
import signal
import subprocess
import sys
import time
from collections import deque

import pytest

from lra import records, run
from lra.config import compose
from lra.errors import UserError
from lra.launch import local, sweep
from lra.launch.local import Job, Worker, next_job, run_all


def test_a_sweep_runs_every_combination_in_one_process_and_skips_what_is_done(tiny, capsys):
    overrides = tiny("model=identity,linear", "seed=0,1")
    first = sweep.train(overrides, multirun=True)
    assert [(r.model, r.seed, r.status) for r in first] == [
        (model, seed, "ok") for model in ("identity", "linear") for seed in (0, 1)
    ]
    assert len({r.sweep for r in first}) == 1
    again = sweep.train(overrides, multirun=True)
    assert [r.run_id for r in again] == [r.run_id for r in first]
    assert "4 of 4 runs are done already" in capsys.readouterr().err


def test_a_typing_error_in_one_run_stops_a_sweep_before_it_starts(tiny):
    with pytest.raises(UserError, match="did you mean 'linear'"):
        sweep.train(tiny("model=softmax,linaer"), multirun=True)
    assert not records.runs_root().exists()


def test_asking_twice_for_one_run_is_refused(tiny):
    with pytest.raises(UserError, match="asks twice"):
        sweep.train(tiny("seed=0,0"), multirun=True)


@pytest.mark.parametrize("wrong", ["model=local model.window=4,0", "model=softmax,linear model.num_heads=3"])
def test_a_size_that_does_not_fit_stops_a_sweep_before_it_starts(tiny, wrong):
    with pytest.raises(UserError):
        sweep.train(tiny(*wrong.split()), multirun=True)
    assert not records.runs_root().exists()


def test_a_run_that_another_process_works_on_gets_no_false_record(tiny):
    config = compose(tiny("model=identity"))
    folder = run.folder_of(config, run.prepared(config))
    folder.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(folder=str(folder))], stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout.readline().strip() == "held"
        (found,) = run_all([Job("busy", config.overrides)], on_event=lambda event: None)
        held.kill()
    assert found.status == "interrupted" and str(held.pid) in found.reason
    assert not (folder / "record.json").exists()


HOLD = """
import time
from collections import deque
from lra import records
with records.lock({folder!r}):
    print("held", flush=True)
    time.sleep(60)
"""

FAULTS = """
import os, signal
from models import Mixer
class Killed(Mixer):
    def forward(self, x, mask=None):
        os.kill(os.getpid(), signal.SIGKILL)
class Raises(Mixer):
    def forward(self, x, mask=None):
        raise RuntimeError("a fault in the mechanism")
"""


def test_a_run_whose_process_dies_or_raises_is_recorded_and_the_rest_goes_on(tiny, tmp_path, monkeypatch):
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.chdir(tmp_path)
    jobs = [
        Job("killed", tuple(tiny("model=custom", "model.target=faults:Killed"))),
        Job("raises", tuple(tiny("model=custom", "model.target=faults:Raises"))),
        Job("fine", tuple(tiny("model=identity"))),
    ]
    events = []
    found = run_all(jobs, on_event=events.append)
    assert [record.status for record in found] == ["failed", "failed", "ok"]
    assert "signal 9" in found[0].reason and "a fault in the mechanism" in found[1].reason
    assert [event["kind"] for event in events if event["kind"] != "progress"] == ["start", "end"] * 3
    for record in found:
        assert records.read(records.runs_root() / record.run_id) == record


def test_every_visible_gpu_gets_a_worker(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert local.visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_gpus() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_sweep_with_its_status_and_leaves_checkpoints(tiny, number, status):
    long = tiny("model=identity", "seed=0,1", "train.num_steps=1000000", "train.eval_every=500000")
    process = subprocess.Popen(
        [sys.executable, "-m", "lra", "train", "-m", *long],
        env=os.environ,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 60
    while not list(records.runs_root().glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    folder = next(records.runs_root().glob("*/metrics.jsonl")).parent
    assert (folder / "checkpoint" / "last.pt").is_file() and records.run_state(folder) == "interrupted"


def test_a_worker_goes_on_with_the_seeds_of_its_cell_and_other_workers_begin_other_cells():
    jobs = [Job(f"listops-softmax-32-s{seed}-{cell}", ()) for cell in ("aa", "bb") for seed in range(2)]
    waiting = deque(jobs)
    workers = [Worker(None, None, None), Worker(None, None, None)]
    order = []
    for turn in (0, 1, 1, 0):
        worker = workers[turn]
        worker.job = next_job(worker, waiting, workers)
        worker.cell = worker.job.cell
        order.append(worker.job.run_id.split("-", 3)[3])
    assert order == ["s0-aa", "s0-bb", "s1-bb", "s1-aa"]
    assert next_job(workers[0], waiting, workers) is None
