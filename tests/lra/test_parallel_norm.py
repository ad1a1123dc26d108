"""Batch norm over several processes where it is compiled or captured."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import EXACT, WIDTH, Kept, batch, join, normalise, two

from lra import parallel
from lra.parallel import World
from models.layers import BatchNorm


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


@pytest.mark.parametrize("masked", (False, True))
def test_what_norms_add_up_over_processes_is_a_sum_that_nothing_else_reads(masked):
    """Compiled code adds up in place: what two norms shared, or a part of it, would be added up twice."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch.testing._internal.distributed.fake_pg import FakeStore

    summed = []

    def forward(graph, inputs):
        for node in graph.graph.nodes:
            if "all_reduce" in str(node.target):
                operand = node.args[0]
                while "clone" in str(operand.target):
                    operand = operand.args[0]
                summed.append(("sum" in str(operand.target), len(operand.users)))
        return make_boxed_func(graph.forward)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        x, real, _ = batch()
        compiled = torch.compile(two_norms, backend=aot_autograd(fw_compiler=forward), fullgraph=True)
        compiled(*(BatchNorm(WIDTH).double() for _ in range(2)), x, real if masked else None)
    finally:
        parallel.stop()
    assert summed == [(True, 1)] * 4


def two_norms(first: nn.Module, second: nn.Module, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return second(x + first(x, real).sin(), real)


def work_compiled(rank: int, port: int, folder: str) -> None:
    join(rank, port, "cpu")
    found = []
    for apply in (two_norms, torch.compile(two_norms, fullgraph=True)):
        norms = nn.ModuleList([BatchNorm(WIDTH).double() for _ in range(2)])
        x, real, target = (part[rank * 3 : rank * 3 + 3] for part in batch())  # rows 0-2 and 3-4
        out = apply(*norms, x, real)
        gradients = torch.autograd.grad((out * target).sum(), list(norms.parameters()))
        found.append([out.detach(), *gradients, *norms.buffers()])
    torch.save(found, f"{folder}/{rank}.pt")
    parallel.barrier()
    parallel.end(0)


@pytest.mark.slow
def test_two_compiled_norms_of_two_processes_are_those_of_the_plain_code(tmp_path):
    for plain, compiled in two(work_compiled, tmp_path):
        torch.testing.assert_close(plain, compiled, **EXACT)
