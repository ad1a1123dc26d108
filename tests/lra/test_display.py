"""What a sweep shows: the table in a terminal, plain lines elsewhere, and its estimate of the time left."""

import io
import re

import pytest
from rich.console import Console

from lra.launch import board
from lra.launch.display import Display
from lra.launch.local import Job
from lra.records import Record


@pytest.fixture
def now(monkeypatch):
    """A clock that tests set: `now["s"] = 60`."""
    at = {"s": 1000.0}
    monkeypatch.setattr(board.time, "monotonic", lambda: at["s"])
    return at


def jobs_of(models, *, tasks=("listops",), seeds=2, settings=("",)):
    return [
        Job(
            f"{task}-{model}-2000-s{seed}-{model}{task}{setting.replace('.', '')}",
            (f"task={task}", f"model={model}", f"seed={seed}", *([setting] if setting else [])),
        )
        for task in tasks
        for model in models
        for setting in settings
        for seed in range(seeds)
    ]


def shown(jobs, *, terminal=True, width=120, height=40):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, height=height)
    return Display(jobs, console=console)


def start(view, job):
    view({"kind": "start", "run_id": job.run_id, "device": None})


def progress(view, job, step, *, num_steps=100, **news):
    view({"kind": "progress", "run_id": job.run_id, "step": step, "num_steps": num_steps, **news})


def end(view, job, *, status="ok", reason=None, accuracy=0.5, wall_s=60.0):
    ok = {"test_accuracy": accuracy, "step_ms": 2.0, "wall_s": wall_s} if status == "ok" else {}
    record = Record(kind="train", run_id=job.run_id, status=status, reason=reason, task="t", model="m", **ok)
    view({"kind": "end", "record": record})


def table(view):
    """What the terminal would show now, as lines without colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=view.console.width, height=view.console.height
    )
    console.print(view, end="")
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in console.file.getvalue().splitlines()]


def row(lines, *words):
    """The one line that holds all these words."""
    (found,) = [line for line in lines if all(word in line for word in words)]
    return found


def said(view):
    return view.console.file.getvalue().splitlines()


def test_the_table_tells_what_runs_what_is_done_and_what_failed(now):
    jobs = jobs_of(["softmax", "linear"])
    view = shown(jobs)
    start(view, jobs[0])
    assert "time left -; 1 running, 0 done, 0 failed, 3 waiting; so far 0:00" in table(view)[-1]
    now["s"] += 60
    end(view, jobs[0], accuracy=0.35)
    start(view, jobs[1])
    end(view, jobs[1], status="oom", reason="CUDA out of memory: tried 2 GiB")
    start(view, jobs[2])
    progress(view, jobs[2], 10, loss=2.0)
    now["s"] += 20
    progress(view, jobs[2], 50, loss=1.5)
    progress(view, jobs[2], 50, val_accuracy=0.41)
    lines = table(view)
    assert row(lines, "50/100").split()[-6:] == ["50/100", "1.500", "41.0", "%", "2", "0:25"]
    assert "35.0 %" in row(lines, "softmax", "2/2") and "1 oom" in row(lines, "softmax", "2/2")
    assert "running s0" in row(lines, "linear", "0/2")
    assert "s1  oom: CUDA out of memory: tried 2 GiB" in row(lines, "oom:")
    assert "time left 0:55; 1 running, 1 done, 1 failed, 1 waiting; so far 1:20" in lines[-1]


def test_the_time_left_is_what_runs_of_the_same_cell_took(now):
    jobs = jobs_of(["softmax", "linear"], seeds=3)
    view = shown(jobs)
    start(view, jobs[0])
    assert view.board.left_s() is None
    end(view, jobs[0], wall_s=100.0)
    assert view.board.left_s() == 500.0  # nothing is known of linear: as long as softmax
    start(view, jobs[3])
    end(view, jobs[3], wall_s=10.0)
    assert view.board.left_s() == 2 * 100 + 2 * 10
    start(view, jobs[1])
    progress(view, jobs[1], 20, loss=1.0)
    now["s"] += 10
    progress(view, jobs[1], 40, loss=1.0)
    assert view.board.left_s() == 30 + 100 + 2 * 10  # 60 steps at 2 a second
    start(view, jobs[4])
    assert view.board.left_s() == (30 + 10 + 100 + 10) / 2  # two at once


def test_a_sweep_lasts_at_least_as_long_as_its_slowest_run(now):
    jobs = jobs_of(["softmax"], seeds=3)
    view = shown(jobs)
    start(view, jobs[0])
    end(view, jobs[0])
    for job in jobs[1:]:
        start(view, job)
        progress(view, job, 10, loss=1.0)
    now["s"] += 10
    progress(view, jobs[1], 20, loss=1.0)
    progress(view, jobs[2], 90, loss=1.0)
    assert view.board.left_s() == 80.0  # not the mean of 80 s and 1.25 s


@pytest.mark.parametrize("height", range(8, 16))
def test_the_rows_of_cells_stand_only_where_all_have_room(now, height):
    jobs = jobs_of(["softmax", "linear", "local", "hyena"], seeds=1)
    view = shown(jobs, height=height)
    for job in jobs[:2]:
        start(view, job)
    lines = table(view)
    rows = [line for line in lines if line.split()[0:1] in (["local"], ["hyena"])]
    # its own line, a line for the cursor, running: two and a head, cells: four, a head, and a line between
    assert len(lines) < height and (len(rows) == 2 and " 2000 " in rows[0]) == (height >= 2 + 3 + 6)


def test_a_run_that_fails_at_once_counts_with_the_seconds_it_took(now):
    jobs = jobs_of(["softmax"], seeds=4)
    view = shown(jobs)
    start(view, jobs[0])
    now["s"] += 3
    end(view, jobs[0], status="oom", reason="out of memory")
    assert view.board.left_s() == 9.0


def test_settings_that_a_sweep_varies_name_its_cells(now):
    view = shown(jobs_of(["softmax", "linear"], settings=("train.lr=0.1", "train.lr=0.2")))
    names = {cell.mechanism for cell in view.board.cells.values()}
    assert names == {"softmax lr=0.1", "softmax lr=0.2", "linear lr=0.1", "linear lr=0.2"}
    view = shown(jobs_of(["hybrid"], settings=("model.layers=[softmax]", "model.layers=[local]")))
    assert row(table(view), "hybrid layers=[local]", "0/2")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (80, 10), (60, 15), (40, 7)])
def test_a_sweep_of_hundreds_of_runs_fits_the_terminal(now, width, height):
    models = [f"mechanism{i}" for i in range(20)]
    tasks = ("listops", "text", "retrieval", "image", "pathfinder32")
    jobs = jobs_of(models, tasks=tasks)
    assert len(jobs) == 200
    view = shown(jobs, width=width, height=height)
    for job in jobs[:40]:
        start(view, job)
        end(view, job, status="failed", reason="a reason " * 40)
    for job in jobs[-16:]:
        start(view, job)
        progress(view, job, 5, loss=1.0)
    lines = table(view)
    assert len(lines) < height and max(map(len, lines)) <= width
    assert "time left 0:00; 16 running" in lines[-1]
    if width >= 80:
        assert "40 failed, 144 waiting" in lines[-1]
    for at, line in enumerate(lines):
        if line.split()[:2] == ["ended", "of"]:
            assert lines[at + 1].split()[0] == "mechanism12"  # one that runs, as not all have room


def test_a_large_sweep_is_told_by_mechanism_and_task(now):
    jobs = jobs_of(["softmax", "linear", "local"], tasks=("listops", "text", "image", "retrieval"), seeds=3)
    view = shown(jobs, width=100, height=14)
    for job in jobs[:4]:
        start(view, job)
        end(view, job, status="ok" if job is not jobs[1] else "diverged", reason="loss is not finite")
    lines = table(view)
    assert lines[0].split() == "ended of all runs listops 2000 text 2000 image 2000 retrieval 2000".split()
    assert row(lines, "softmax", "3/3 1 failed").split()[-3:] == ["0/3"] * 3
    assert row(lines, "linear", "1/3") and row(lines, "local", "0/3")


def test_a_single_run_shows_its_row_alone(now):
    (job,) = jobs_of(["softmax"], seeds=1)
    view = shown([job])
    start(view, job)
    assert "starting" in table(view)[-1]
    progress(view, job, 30, loss=0.25)
    (_, line) = table(view)
    assert "30/100" in line and "0.250" in line


def test_without_a_terminal_there_is_a_line_per_event_and_the_time_left(now):
    jobs = jobs_of(["softmax"])
    view = shown(jobs, terminal=False)
    with view:
        start(view, jobs[0])
        for step in range(10, 41, 10):
            now["s"] += 6
            progress(view, jobs[0], step, loss=1.0)
        end(view, jobs[0], wall_s=61.0)
        start(view, jobs[1])
        end(view, jobs[1], status="diverged", reason="loss is not finite at step 3")
    first, second = (job.run_id for job in jobs)
    assert said(view) == [
        f"[1/2] {first} started",
        f"    {first} step 20/100 loss 1.000, 0:48 left",
        f"    {first} step 40/100 loss 1.000, 0:36 left",
        f"[1/2] {first} test 50.0%, 2.0 ms a step, 61 s; 1:01 left",
        f"[2/2] {second} started",
        f"[2/2] {second} diverged: loss is not finite at step 3",
    ]


def test_in_a_terminal_ended_runs_stay_above_the_table(now):
    jobs = jobs_of(["softmax"])
    view = shown(jobs)
    with view:
        start(view, jobs[0])
        end(view, jobs[0])
    assert f"[1/2] {jobs[0].run_id} test 50.0%" in "".join(said(view))


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0, "0:00"), (59.6, "1:00"), (3727, "1:02:07")])
def test_a_time_reads_as_a_clock(seconds, text):
    assert board.clock(seconds) == text
