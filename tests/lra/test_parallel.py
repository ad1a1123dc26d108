"""What several processes do together is what one does alone: two real ones, started once, try it."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_tasks import MODEL, listops
from torch import nn
from two_processes import EXACT, Kept, join, normalise, two

from lra import environment, parallel, records, run
from lra.config import RunConfig, compose
from lra.errors import Agreed, UserError
from lra.parallel import World
from lra.step import Step
from lra.stop import Stop
from lra.train import Trainer

# 15 rows are 8 and 7; 7 steps between two lines leave some in the meter when a run stops.
RUN = [*listops(Path()), *MODEL, "batch_size=15", "train.device=cpu"]
RUN += ["train.num_steps=20", "train.eval_every=10", "train.log_every=7", "train.lr=1e-2"]
DROPPING = [*RUN, "model.dropout=0.2"]


def refusal(model: nn.Module) -> str:
    try:
        parallel.check_equal(model)
    except UserError as error:
        return str(error)
    return ""


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_folder(config: RunConfig) -> Path:
    return run.folder_of(config, run.prepared(config))


def learned(rank: int) -> dict:
    """A run from its config to its record, tried again when done and where another process is in the way.

    Weights of the second process begin as others, which only a broadcast makes those of the first.
    """
    seed, predict, config = environment.seed_everything, Step.predict, compose(RUN)
    environment.seed_everything = lambda number: seed(number + rank)
    scored = []
    Step.predict = lambda step, batches, plan: scored.append(len(plan.rows)) or predict(step, batches, plan)
    record = run.execute(config)
    environment.seed_everything, Step.predict = seed, predict
    if rank:
        run.done = None  # the first alone looks
    found = {"record": record, "scored": sum(scored), "again": run.execute(config)}
    config = compose([*RUN, "seed=1"])
    busy = records.lock(in_folder(config)) if rank == 0 else None
    if busy:
        busy.__enter__()
    try:
        run.execute(config)
    except UserError as error:
        found["busy"] = (isinstance(error, Agreed), "in use" in str(error))
    if busy:
        busy.__exit__(None, None, None)
    return found


def resumed(rank: int, folder: Path) -> dict:
    """A run left alone, and one that goes on after the second process got a signal."""
    config, found = compose(DROPPING), {}
    store = run.prepared(config)

    def trainer(name: str) -> Trainer:
        (folder / name).mkdir(exist_ok=True)
        made = Trainer(config, store, folder / name)
        made._measure_cost = dict
        return made

    whole = trainer("whole")
    found["random"] = torch.get_rng_state()
    whole.run()
    broken = trainer("broken")
    update = broken.model.training_update

    def stop_at_3(step: int) -> None:
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(step)

    broken.model.training_update = stop_at_3
    try:
        broken.run()
    except Stop as stop:
        found["stopped"] = (stop.exit_status, broken.state.step)
    again = trainer("broken")
    again.run()
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    return found | {"same": all(torch.equal(a, b) for a, b in pairs)}


def work(rank: int, port: int, folder: str) -> None:
    here = join(rank, port, "cpu")
    os.environ["LRA_RUNS"] = f"{folder}/runs"
    torch.manual_seed(7)
    tensors = [torch.full((2, 3), rank + 1.0), torch.tensor(rank == 0), torch.full((2,), 1j * (rank + 1))]
    parallel.broadcast_(tensors)
    parallel.seed_apart(7)
    found = {
        "world": here,
        "again": parallel.start("cpu"),
        "is_first": parallel.is_first(),
        "sum": parallel.sum_(torch.tensor([1.0, rank])),
        "gathered": parallel.gather_rows(torch.arange(3 - rank)[:, None] + 10 * rank, [3, 2]),
        "nothing": parallel.gather_rows(torch.arange(1 - rank), [1, 0]),
        "broadcast": tensors,
        "any": [parallel.any_process(rank == 1), parallel.any_process(False)],
        "dropped": torch.rand(4),
        "equal": refusal(Kept(1.0)),
        "unequal": refusal(Kept(float(rank))),
        "real": normalise(here, "real"),
        "all": normalise(here, "all"),
        "largest": parallel.largest(rank + 0.5),
        "of_first": parallel.of_first(lambda: f"said by {rank}"),
        "learned": learned(rank),
        "resumed": resumed(rank, Path(folder)),
    }
    parallel.barrier()
    from torch.distributed.nn.functional import all_reduce  # here: as late as compiling would

    found["kept"] = any(isinstance(value, dist.ProcessGroup) for value in all_reduce.__defaults__)
    status = parallel.end(0)
    torch.save({**found, "ended": (status, parallel.world())}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(folder, data_folder):
    """The record of the run on one process, and its folder; it also makes the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRA_DATA", str(data_folder))
        patch.setenv("LRA_RUNS", str(folder / "alone"))
        return run.execute(compose(RUN)), in_folder(compose(RUN))


@pytest.fixture(scope="module")
def found(folder, alone, data_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRA_DATA", str(data_folder))
        return two(work, folder)


def test_each_process_knows_its_place_and_joins_once(found):
    assert [one["world"] for one in found] == [World(0, 2, 0), World(1, 2, 1)]
    assert [one["again"] for one in found] == [World(0, 2, 0), World(1, 2, 1)]
    assert [one["is_first"] for one in found] == [True, False]
    assert [one["ended"] for one in found] == [(0, World(0, 1, 0))] * 2


def test_nothing_keeps_the_group_alive(found):
    """Its threads would outlive the interpreter and abort the process."""
    assert not any(one["kept"] for one in found)


def test_sums_gathered_rows_and_questions_are_answered_alike_on_all(found):
    for one in found:
        assert one["sum"].tolist() == [2.0, 1.0]
        assert one["gathered"].flatten().tolist() == [0, 1, 2, 10, 11]
        assert one["nothing"].tolist() == [0]
        assert one["any"] == [True, False]
        assert one["largest"] == 1.5 and one["of_first"] == "said by 0"


def test_a_run_of_two_processes_is_that_of_one(found, alone, folder):
    expected, before = alone
    record = records.read(folder / "runs" / expected.run_id)
    assert record.num_devices == 2 and record.status == "ok" and record.run_id == expected.run_id
    for field in ("test_accuracy", "val_accuracy", "best_step", "num_params", "num_test"):
        assert getattr(record, field) == getattr(expected, field), field
    there = lines(folder / "runs" / expected.run_id)
    assert [line.keys() for line in there] == [line.keys() for line in lines(before)]
    for line, other in zip(there, lines(before), strict=True):
        assert line == pytest.approx(other, rel=1e-6)  # float32 sums in another order
    predicted = [records.load_predictions(path) for path in (before, folder / "runs" / expected.run_id)]
    assert np.array_equal(*predicted)


def test_each_process_scores_its_half_and_all_know_the_result(found):
    """Two evaluations of 100 rows and one of 150."""
    assert [one["learned"]["scored"] for one in found] == [175, 175]
    first, second = (one["learned"]["record"] for one in found)
    assert first.test_accuracy == second.test_accuracy and first.peak_mem_mib == second.peak_mem_mib
    assert [one["learned"]["again"] for one in found] == [first, first]


def test_a_folder_in_use_is_refused_on_all_and_told_by_the_first(found):
    assert [one["learned"]["busy"] for one in found] == [(False, True), (True, True)]


def test_a_signal_to_one_process_stops_all_and_the_resumed_run_equals_the_unbroken(found, folder):
    for one in found:
        status, step = one["resumed"]["stopped"]
        assert status == 143 and 3 < step < 20 and one["resumed"]["same"]
    assert lines(folder / "whole") == lines(folder / "broken")


def test_a_broadcast_makes_tensors_of_any_dtype_those_of_the_first(found):
    for one in found:
        number, flag, imaginary = one["broadcast"]
        assert (number == 1).all() and flag.item() and imaginary.tolist() == [1j, 1j]


def test_processes_seeded_alike_drop_different_numbers(found):
    first, second = (one["resumed"]["random"] for one in found)
    assert not torch.equal(first, second)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(found[0]["dropped"], expected) and not torch.equal(found[1]["dropped"], expected)


def test_a_buffer_that_differs_between_processes_is_named_on_all_of_them(found):
    for one in found:
        assert one["equal"] == "" and "'average'" in one["unequal"]


@pytest.mark.parametrize("stats", ("real", "all"))
def test_batch_norm_of_two_processes_is_that_of_one_on_the_whole_batch(found, stats):
    whole = normalise(World(0, 1, 0), stats)
    for one in found:
        torch.testing.assert_close(one[stats], whole, **EXACT)
    for name in ("out", "weight", "bias", "running_mean", "running_var"):
        assert torch.equal(found[0][stats][name], found[1][stats][name])


def work_failing(rank: int, port: int, folder: str) -> None:
    join(rank, port, "cpu")
    os.environ["LRA_RUNS"] = f"{folder}/runs"
    train, failing = Step.train, int(Path(folder).name)

    def fail(step: Step, batches, plans, **rates) -> None:
        if rank == failing and step._steps == 3:
            raise torch.OutOfMemoryError("no more")
        train(step, batches, plans, **rates)

    Step.train = fail
    record = run.execute(compose(RUN))
    torch.save(record, f"{folder}/{rank}.pt")
    os._exit(0)  # as parallel.end, but for the status, which would have the other killed


@pytest.mark.slow
@pytest.mark.parametrize("failing", (0, 1))
def test_a_process_that_fails_keeps_its_reason_and_the_others_end_too(failing, tmp_path):
    ended = two(work_failing, tmp_path / str(failing))
    assert (ended[failing].status, ended[failing].reason) == ("oom", "no more")
    other = ended[1 - failing]
    assert (other.status, other.reason) == ("failed", "another process of this run failed")
    (folder,) = (tmp_path / str(failing) / "runs").iterdir()
    written = records.read(folder)
    assert (written.status, written.reason) == (ended[0].status, ended[0].reason)
