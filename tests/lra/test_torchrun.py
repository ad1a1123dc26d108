"""Who is started by torchrun, what several processes may not do, and how they share rows and agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_tasks import MODEL, listops
from torch import nn

import models
from lra import parallel, records, torchrun
from lra.cli import main
from lra.errors import UserError
from lra.parallel import World
from models.common import Place

RUN = [*listops(Path()), *MODEL, "batch_size=15", "train.device=cpu"]


@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_shares_are_in_order_and_of_almost_one_size(size):
    rows = np.arange(10)[::-1]
    parts = [parallel.share(rows, World(rank, size, rank)) for rank in range(size)]
    assert np.concatenate(parts).tolist() == rows.tolist()
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def test_a_process_without_rows_is_refused():
    two, three = World(0, 2, 0), World(0, 3, 0)
    parallel.check_batch(3, None, three)
    parallel.check_batch(7, 4, three)
    parallel.check_batch(3, 8, three)
    parallel.check_batch(1, 1, World(0, 1, 0))
    with pytest.raises(UserError, match="batch_size=2 is too small for 3"):
        parallel.check_batch(2, None, three)
    with pytest.raises(UserError, match="micro_batch=4, the last of 1 rows"):
        parallel.check_batch(9, 4, two)


def launched(monkeypatch, **more):
    told = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x"}
    for name, value in {**told, "MASTER_PORT": 1, **more}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", (0, 1))
@pytest.mark.parametrize("argv", (["table"], ["search", *RUN], ["train", *RUN, "-m"]))
def test_what_is_not_one_run_is_refused_under_torchrun_in_one_voice(argv, rank, monkeypatch, capsys):
    launched(monkeypatch, RANK=rank)
    assert main(argv) == 2
    assert ("without it" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize("own", (["train.micro_batch=7"], ["batch_size=1"], ["model=routing"]))
def test_a_run_that_cannot_be_shared_is_refused_before_it_has_a_folder(own, monkeypatch, capsys):
    launched(monkeypatch, RANK=0)
    monkeypatch.setattr(parallel, "start", lambda device: None)
    monkeypatch.setattr(parallel, "world", lambda: World(0, 2, 0))
    monkeypatch.setattr(parallel, "end", lambda status: status)
    assert main(["train", *RUN, *own]) == 2
    assert "2 processes" in capsys.readouterr().err and not records.runs_root().exists()


@pytest.mark.parametrize("told", ({"WORLD_SIZE": 2}, {"RANK": 1}, {"WORLD_SIZE": "many", "RANK": "x"}))
def test_variables_that_others_set_too_are_not_those_of_torchrun(told, monkeypatch, capsys):
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    assert main(["list", "tasks"]) == 0 and "listops" in capsys.readouterr().out
    assert torchrun.is_first() and not torchrun.launched()
    launched(monkeypatch, **told)
    assert torchrun.launched() == (told.get("WORLD_SIZE") != "many")


def test_processes_agree_on_stopping_the_more_often_the_slower_their_steps(monkeypatch):
    asked, clock = [], [0.0]
    monkeypatch.setattr(parallel, "world", lambda: World(0, 2, 0))
    monkeypatch.setattr(parallel, "any_process", lambda flag: asked.append(flag))
    monkeypatch.setattr(parallel, "largest", lambda value: max(value, 0.3))  # of the other process
    monkeypatch.setattr(parallel.time, "monotonic", lambda: clock[0])
    agreed, steps = parallel.Agreement(100), []
    for step in range(100, 130):
        before = len(asked)
        agreed(False, step)
        steps += [step] * (len(asked) - before)
        clock[0] += 0.01 if step < 112 else 5.0
    agreed(False, 130, now=True)
    assert steps == [100, 106, 112, *range(118, 130)] and len(asked) == len(steps) + 1


def test_without_torchrun_or_with_one_process_nothing_is_started(monkeypatch):
    assert parallel.start("cpu") == World(0, 1, 0)
    launched(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    assert parallel.start("cpu") == World(0, 1, 0) and not dist.is_initialized()


def test_more_processes_than_gpus_are_refused_on_all_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in (0, 1):
        launched(monkeypatch, LOCAL_RANK=rank)
        with pytest.raises(UserError, match="2 processes on this machine, which has 1 GPUs"):
            parallel.start("auto")


def test_a_gpu_by_number_is_refused(monkeypatch):
    launched(monkeypatch)
    with pytest.raises(UserError, match="train.device=cuda:1"):
        parallel.start("cuda:1")


def test_alone_everything_is_as_it_was():
    x = torch.arange(4)
    parallel.broadcast_([x])
    parallel.barrier()
    assert parallel.end(2) == 2
    parallel.check_equal(nn.Linear(2, 2))
    before = torch.get_rng_state()
    parallel.seed_apart(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert parallel.sum_(x) is x and parallel.gather_rows(x, [4]) is x
    assert parallel.any_process(True) and not parallel.any_process(False)


def build(name, **own):
    return models.build(name, Place(d_model=16, num_heads=2, max_len=64), **own)


def refused(model) -> str:
    parallel.check_mechanism(model, World(0, 1, 0))
    try:
        parallel.check_mechanism(nn.ModuleList([model]), World(0, 2, 0))
    except UserError as error:
        return str(error)
    return ""


def test_by_default_only_routing_and_search_need_one_process():
    assert [name for name in models.names() if refused(build(name))] == ["routing", "search"]


@pytest.mark.parametrize(
    ("name", "own", "why"),
    (
        ("routing", {}, "a loss of its own"),
        ("search", {}, "validation batches"),
        ("hybrid", {"layers": ["routing"]}, "a loss of its own"),
        ("performer", {"coupled_stabiliser": True}, "one maximum over the batch"),
        ("nystrom", {"num_landmarks": 8, "coupled_start": True}, "largest norm in the batch"),
        ("skyformer", {"coupled_start": True}, "largest norm in the batch"),
    ),
)
def test_a_mechanism_that_couples_rows_is_refused_with_its_reason(name, own, why):
    assert why in refused(build(name, **own))
