"""`lra measure`: which cells it plans, what a record of one holds, and how a sweep stops and goes on."""

import dataclasses
import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from measure_samples import OUT_OF_MEMORY, SMALL, made_up
from rich.console import Console

from lra import measure, measuring, records
from lra.cli import main
from lra.config import compose
from lra.errors import UserError
from lra.measure import Event, cells, dealt, measurable
from lra.measuring import measure_cell
from lra.measuring_display import Display
from lra.report import efficiency

# What is planned.


def test_tokens_fix_the_batch_by_the_length():
    found = {cell.config.length: cell.config.batch_size for cell in cells(["length=64,1024", "tokens=2048"])}
    assert found == {64: 32, 1024: 2}
    (cell,) = cells(["length=64", "tokens=4096", "train.micro_batch=48"])
    assert (cell.config.batch_size, cell.config.train.micro_batch) == (64, 48), (
        "the default batch has 32 rows"
    )


@pytest.mark.parametrize("more", [[], ["paper=nystromformer2021"], ["train.micro_batch=2"]])
def test_cells_of_several_lengths_are_what_each_alone_composes_to(more):
    for cell in cells(["model=linear", "length=64,128,256", "tokens=1024", *more]):
        sizes = [f"length={cell.config.length}", f"batch_size={1024 // cell.config.length}"]
        alone = compose(["model=linear", *sizes, *more], any_length=True)
        assert dataclasses.replace(cell.config, overrides=()) == dataclasses.replace(alone, overrides=())


def test_a_cell_at_another_length_keeps_its_rule_for_the_batch():
    (cell,) = cells(["model=linear", "length=64", "tokens=1024", *SMALL])
    assert (cell.at(256).config.batch_size, cell.at(4096).config.batch_size) == (4, 1)
    (cell,) = cells(["model=linear", "length=64", "batch_size=8", *SMALL])
    assert (cell.at(256).config.batch_size, cell.at(256).config.model) == (8, cell.config.model)


def test_all_models_are_those_that_need_no_argument_and_are_not_made_of_others(monkeypatch):
    found = measurable()
    assert not {"custom", "search", "hybrid"} & set(found) and {"softmax", "identity"} <= set(found)
    assert len(found) > 40
    monkeypatch.setattr(measure, "measurable", lambda: ["linear", "fnet"])
    assert [cell.config.model.name for cell in cells(["model=all", "length=64"])] == ["linear", "fnet"]


@pytest.mark.parametrize("name", ["lengths", "compiled"])
def test_presets_compose_with_overrides_of_the_user(name, monkeypatch):
    monkeypatch.setattr(measure, "measurable", lambda: ["softmax", "linear"])
    found = cells([f"preset={name}", "length=64", "batch_size=2", "train.device=cpu"])
    assert {(cell.config.length, cell.config.batch_size, cell.tokens) for cell in found} == {(64, 2, None)}
    kernels = {c.config.model.own["kernel"] for c in found if c.config.model.name == "softmax"}
    assert kernels == {"fused", "math"}
    assert {c.config.train.compile for c in found} == {name == "compiled"}
    assert {c.mode for c in found} == {"train", "infer"}


def test_the_efficiency_preset_is_the_papers_table():
    found = cells(["preset=efficiency", "train.device=cpu"])
    assert {cell.config.length for cell in found} == set(efficiency.LENGTHS)
    assert {(c.config.batch_size, c.config.task.name, c.mode) for c in found} == {(32, "text", "train")}
    backbone = found[0].config.model.backbone
    assert (backbone.d_model, backbone.num_heads, backbone.num_layers, backbone.d_ff) == (256, 4, 4, 1024)
    names = {cell.config.model.name for cell in found}
    assert all(efficiency.printed(name, 4000).speed for name in names) and len(names) == 9


def test_shards_hold_every_cell_once_and_keep_mechanisms_whole():
    planned = cells(
        ["model=linear,softmax,fnet", "model.norm=layer,scale", "length=64,128", "mode=train,infer"]
    )
    shards = [dealt(planned, f"{i}/2") for i in (1, 2)]
    assert sorted(map(str, sum(shards, []))) == sorted(map(str, planned))
    of = [{cell.config.model.name for cell in shard} for shard in shards]
    assert of == [{"linear", "fnet"}, {"softmax"}]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["length=abc"], "length=abc"),
        (["length=abc", "tokens=64"], "length=abc is not a positive whole number"),
        (["length=64", "tokens=63"], "tokens=63 is less than one row of length=64; raise it"),
        (["mode=trane"], "unknown mode 'trane'; did you mean 'train'"),
        (["preset=eficiency"], "unknown preset 'eficiency'; did you mean 'efficiency'"),
        (["preset=efficiency,lengths"], "unknown preset 'efficiency,lengths'"),
        (["preset=lengths", "model=linear"], "preset=lengths says which mechanisms are measured"),
        (["model=all,softmax"], "unknown model 'all'"),
        (["--shard", "3/2"], "--shard 3/2 is not a share; write i/n with i from 1 to n, as in 1/4"),
        (["--shard", "0/2"], "--shard 0/2 is not a share"),
        (["--shard", "2/3"], "--shard 2/3 has nothing to do: there is 1 mechanism; use fewer"),
        (["--time-limit", "0"], "--time-limit 0 leaves no time; give seconds above 0"),
        (["--time-limit", "nan"], "--time-limit nan leaves no time"),
        (["--time-limit", "soon"], "--time-limit"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_with_what_is_allowed(argv, message, capsys):
    assert main(["measure", *argv]) == 2
    assert message in capsys.readouterr().err and not records.runs_root().exists()


# How a sweep stops and goes on.


def test_what_fits_is_known_of_the_same_batch_only():
    two, four = (cells(["model=linear", "length=64", f"batch_size={rows}", *SMALL])[0] for rows in (2, 4))
    assert measure._apart(two) != measure._apart(four)
    short, long = cells(["model=linear", "length=64,128", "tokens=256", *SMALL])
    assert measure._apart(short) == measure._apart(long) != measure._apart(four)


def test_the_time_limit_begins_no_further_cell_and_the_same_command_goes_on(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    seen = made_up(monkeypatch)
    argv = ["measure", "model=linear,softmax,fnet", "length=64", "batch_size=2", *SMALL]
    assert main([*argv, "--time-limit", "35"]) == 1
    err = capsys.readouterr().err
    first = len(seen)
    assert 0 < first < 3 and f"the time limit left {3 - first} of 3 cells; the same command goes on" in err
    assert main(argv) == 0
    assert len(seen) == 3 == len(set(seen)), "every cell once"


def test_planning_takes_none_of_the_time_limit(monkeypatch):
    now, plan = [0.0], measure.cells

    def slow(overrides):
        now[0] += 60.0
        return plan(overrides)

    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measure, "cells", slow)
    seen = made_up(monkeypatch)
    measure.measure(["model=linear", "length=64", "batch_size=2", *SMALL], time_limit=1.0)
    assert len(seen) == 1


def test_a_killed_sweep_goes_on_with_the_cell_it_died_in(monkeypatch):
    arguments = ["model=linear,softmax", "length=32", "batch_size=2", *SMALL]
    script = (
        "import os, signal, torch\n"
        "from lra import measure, measuring\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # they are part of the device's name
        "warm, cells = measuring._warm, []\n"
        "def deadly(bench, device):\n"
        "    cells.append(1)\n"
        "    if len(cells) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    warm(bench, device)\n"
        "measuring._warm = deadly\n"
        "measuring.MIN_SECONDS = 0.0\n"
        f"measure.measure({arguments!r})\n"
    )
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    folder = records.runs_root() / "measure"
    (made,) = folder.glob("*/record.json")
    before = made.stat().st_mtime_ns
    seen = made_up(monkeypatch)
    found = measure.measure(arguments)
    assert [record.model for record in found] == ["linear", "softmax"]
    assert seen == [("softmax", 32, "train")] and made.stat().st_mtime_ns == before


def test_a_failed_cell_is_tried_again_and_one_out_of_memory_is_not(monkeypatch):
    def outcome(cell):
        raise RuntimeError("wrong" if cell.config.model.name == "linear" else OUT_OF_MEMORY)

    seen = made_up(monkeypatch, outcome)
    arguments = ["model=linear,softmax", "length=64", "batch_size=2", *SMALL]
    assert [record.status for record in measure.measure(arguments)] == ["failed", "oom"]
    seen.clear()
    measure.measure(arguments)
    assert seen == [("linear", 64, "train")]


def test_a_cell_that_another_process_measures_is_left_to_it(monkeypatch, capsys):
    seen = made_up(monkeypatch)
    (cell,) = cells(["model=linear", "length=64", "batch_size=2", *SMALL])
    argv = ["measure", "model=linear,softmax", "length=64", "batch_size=2", *SMALL]
    with records.lock(measuring._folder(measuring._describe(cell))):
        assert main(argv) == 1
    assert seen == [("softmax", 64, "train")]
    assert "1 cells are measured by another process" in capsys.readouterr().err


def test_a_cell_that_another_process_has_just_ended_is_read(monkeypatch):
    (cell,) = cells(["model=linear", "length=64", "batch_size=2", *SMALL])
    seen = made_up(monkeypatch)
    first = measure_cell(cell)
    assert measure_cell(cell) == first and len(seen) == 1
    measure_cell(cell, force=True)
    assert len(seen) == 2


# What a person sees.


def watched(console: Console) -> Display:
    planned = cells(["model=linear,softmax", "length=64,128", "batch_size=2", *SMALL])
    display = Display(console=console)
    display.plan(planned)
    record = measuring._describe(planned[0])
    record = dataclasses.replace(record, status="ok", step_ms=12.34, peak_mem_mib=456.0, wall_s=2.0)
    display(Event("begin", planned[0]))
    display(Event("end", planned[0], record))
    display(Event("begin", planned[1]))
    return display


def test_a_terminal_shows_a_table_that_fills_with_the_running_cell_marked():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    with watched(console) as display:
        with console.capture() as capture:
            console.print(display.table())
        text = capture.get()
    assert "linear" in text and "softmax" in text and "64 train" in text and "128 train" in text
    assert "12.3 / 456" in text and "..." in text and "1 of 4 cells, about 0 s left" in text


def test_without_a_terminal_every_cell_is_a_line():
    out = io.StringIO()
    with watched(Console(file=out, width=200)):
        pass
    assert out.getvalue() == "[1/4] linear 64 train: 12.3 ms, 456 MiB, 2 s\n"


def test_a_table_taller_than_the_terminal_shows_the_rows_around_the_running_one():
    (cell,) = cells(["model=linear", "length=64", *SMALL])
    planned = [
        dataclasses.replace(
            cell,
            config=dataclasses.replace(
                cell.config, model=dataclasses.replace(cell.config.model, own={"eps": e})
            ),
        )
        for e in range(2, 52)
    ]
    size = {"force_terminal": True, "width": 100, "height": 12}
    with Display(console=Console(file=io.StringIO(), **size)) as display:
        display.plan(planned)
        display(Event("begin", planned[25]))
        paper = Console(file=io.StringIO(), **size)
        paper.print(display.table())
    lines = paper.file.getvalue().splitlines()
    assert any("eps=27" in line and "..." in line for line in lines) and len(lines) <= 12


def test_unsupported_lengths_are_results(monkeypatch):
    def outcome(cell):
        raise UserError("no such length")

    made_up(monkeypatch, outcome)
    (record,) = measure.measure(["model=linear", "length=64", *SMALL])
    assert (record.status, record.reason) == ("unsupported", "no such length")
