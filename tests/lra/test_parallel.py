"""Two real processes, started once, do every collective; what they found is compared with one process."""

import os
import socket
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import models
from lra import parallel
from lra.errors import UserError
from lra.parallel import World
from models.common import Place
from models.layers import BatchNorm

ROWS, LENGTH, WIDTH = 5, 3, 4  # an odd batch: three rows here, two there
EXACT = {"rtol": 0, "atol": 1e-12}


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64) * 3 + 2
    real = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
    return x, real, torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def normalise(
    where: World, stats: str, backend: Callable | None = None, *, device: str = "cpu", captured: bool = False
) -> dict[str, torch.Tensor]:
    """Two training steps' worth of batch norm on this process's rows, and the gradients of the mean loss."""
    rows = torch.from_numpy(parallel.share(np.arange(ROWS), where))
    x, real, target = (part[rows].to(device) for part in batch())
    norm = BatchNorm(WIDTH, stats=stats).double().to(device)
    apply = norm if backend is None else torch.compile(norm, backend=backend, fullgraph=True)
    x.requires_grad_()
    inputs = {"x": x, **dict(norm.named_parameters())}

    def step() -> dict[str, torch.Tensor]:
        out = apply(x, real)
        loss = (out.sin() * target).sum((1, 2)).mean() * (len(rows) / ROWS)
        gradients = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
        summed = {name: parallel.sum_(gradients[name].clone()) for name in ("weight", "bias")}
        return {"out": out.detach(), "loss": parallel.sum_(loss.detach().clone()), **gradients, **summed}

    if captured:
        step = replayed(step, list(norm.buffers()))
    for _ in range(2):
        found = step()
    counts = [len(part) for part in parallel.shares(np.arange(ROWS), where)]
    found |= {name: parallel.gather_rows(found[name], counts) for name in ("out", "x")}
    return {name: value.cpu() for name, value in (found | dict(norm.named_buffers())).items()}


def replayed(step: Callable, buffers: list[torch.Tensor]) -> Callable:
    """The step from a CUDA graph; what it does before leaves buffers as they were."""
    before, graph, aside = [b.clone() for b in buffers], torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        result = step()
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)

    def replay() -> dict[str, torch.Tensor]:
        graph.replay()
        return dict(result)

    return replay


class Kept(nn.Module):
    """A buffer that the batch writes."""

    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.tensor(value))


def refusal(model: nn.Module) -> str:
    try:
        parallel.check_equal(model)
    except UserError as error:
        return str(error)
    return ""


def join(rank: int, port: int, device: str) -> World:
    """What torchrun would tell this process, and what becomes of it."""
    told = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    return parallel.start(device)


def work(rank: int, port: int, folder: str) -> None:
    here = join(rank, port, "cpu")
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
    }
    parallel.barrier()
    from torch.distributed.nn.functional import all_reduce  # here: as late as compiling would

    found["kept"] = any(isinstance(value, dist.ProcessGroup) for value in all_reduce.__defaults__)
    status = parallel.end(0)
    torch.save({**found, "ended": (status, parallel.world())}, f"{folder}/{rank}.pt")


def work_on_gpu(rank: int, port: int, folder: str) -> None:
    here = join(rank, port, "auto")
    model = Kept(float(rank)).cuda()
    parallel.broadcast_([model.average])
    parallel.check_equal(model)
    found = {
        "device": torch.cuda.current_device(),
        "any": [parallel.any_process(rank == 1), parallel.any_process(False)],
        "eager": normalise(here, "real", device="cuda"),
        "captured": normalise(here, "real", device="cuda", captured=True),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    parallel.barrier()
    parallel.end(0)


def two(function: Callable, folder: str) -> list[dict]:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(function, args=(port, str(folder)), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return two(work, tmp_path_factory.mktemp("parallel"))


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


def test_a_broadcast_makes_tensors_of_any_dtype_those_of_the_first(found):
    for one in found:
        number, flag, imaginary = one["broadcast"]
        assert (number == 1).all() and flag.item() and imaginary.tolist() == [1j, 1j]


def test_processes_drop_different_numbers(found):
    assert not torch.equal(found[0]["dropped"], found[1]["dropped"])


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


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_normalise_as_one_process_does_and_from_a_cuda_graph_too(tmp_path):
    whole = normalise(World(0, 1, 0), "real")
    for rank, one in enumerate(two(work_on_gpu, tmp_path)):
        assert one["device"] == rank and one["any"] == [True, False]
        torch.testing.assert_close(one["eager"], whole, **EXACT)
        torch.testing.assert_close(one["captured"], whole, **EXACT)


@pytest.mark.parametrize("size", (1, 2))
def test_batch_norm_is_traced_as_one_graph_whatever_the_number_of_processes(size):
    """The others are made up: sums are those of this process."""
    from torch._dynamo.backends.debugging import aot_eager
    from torch.testing._internal.distributed.fake_pg import FakeStore

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        here = parallel.world()
        torch.testing.assert_close(normalise(here, "real", backend), normalise(here, "real"), **EXACT)
    finally:
        parallel.stop()
    assert ["all_reduce" in graph for graph in graphs] == [size > 1]


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
    parallel.check_equal(Kept(1.0))
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
