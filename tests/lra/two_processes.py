"""Starts two processes as torchrun would, and a batch that they normalise together."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn

from lra import parallel
from lra.parallel import World
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


def two(function: Callable, folder: str) -> list[dict]:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(folder).mkdir(exist_ok=True)
    mp.spawn(function, args=(port, str(folder)), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]
