"""What one layer of each mechanism costs by length: time and peak memory, forward and backward.

Where `lra measure` times a whole model, this is the mechanism alone, so that the growth of its own memory can
be held against what it claims: at most 2.3 times per doubling, unless it says `quadratic_memory`.
usage: python -m lra.layer_cost [NAME ...] [--check] [-o FILE.jsonl]
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lra import environment, registry
from lra.conformance_subject import Subject
from lra.errors import UserError
from models.common import Block

# b batch, l length, d model width

MIB = 2**20
GROWTH_LENGTHS = (4096, 8192, 16384)
TIME_LENGTHS = (1024, 4096, 16384)
MOST_GROWTH = 2.3  # per doubling, for a mechanism that does not claim `quadratic_memory`
LEAST_QUADRATIC = 3.0  # per doubling, for one that does
VARIANTS = {  # other forms of a mechanism that cost something else
    "softmax": [{"kernel": "math"}],
    "based": [{"mode": "parallel"}],
    "mega": [{"chunk": 128}],
    "yoso": [{"expectation": False}],
}
MIN_CALLS, MIN_SECONDS, WARMUP_CALLS = 5, 0.2, 3


@dataclass(frozen=True)
class Size:
    """A layer and its batch; `precision` bf16 is autocast over float32 weights, as the trainer has it."""

    batch_size: int = 4
    d_model: int = 64
    num_heads: int = 2
    precision: str = "fp32"


@dataclass
class Row:
    """One layer at one length. Times are medians; unknown is None."""

    model: str
    own: dict[str, Any]
    length: int
    size: Size
    status: str = "ok"  # ok | oom | failed
    reason: str | None = None
    step_ms: float | None = None  # eager
    captured_ms: float | None = None  # the same step replayed from a CUDA graph
    infer_ms: float | None = None
    peak_mib: float | None = None  # beyond weights, their gradients and inputs
    quadratic_memory: bool | None = None
    num_params: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)


def layer_cost(
    name: str,
    length: int,
    own: Mapping[str, object] | None = None,
    size: Size = Size(),  # noqa: B008
    *,
    device: str = "cuda",
    timed: bool = True,
) -> Row:
    """Time and peak memory of one layer; out of memory and errors are results with a reason."""
    row = Row(name, dict(own or {}), length, size)
    try:
        subject = Subject(
            name,
            registry.get(name),
            dict(own or {}),
            max_len=length,
            d_model=size.d_model,
            num_heads=size.num_heads,
            device=device,
        )
        layer = subject.probe(dtype=torch.float32, stirred=False).first.train()
        row.quadratic_memory = layer.traits.quadratic_memory
        row.num_params = sum(p.numel() for p in layer.parameters())
        x = subject.inputs(size.batch_size, length, dtype=torch.float32).requires_grad_()
        step = training_step(layer, x, size.precision)
        row.peak_mib = peak_mib(step, [x, *layer.parameters()])
        if timed:
            row.step_ms = 1e3 * seconds(step)
            row.infer_ms = 1e3 * seconds(inference(layer.eval(), x, size.precision))
            row.captured_ms = captured_ms(training_step(layer.train(), x, size.precision))
    except Exception as error:  # whatever a mechanism raises is the finding
        oom = isinstance(error, torch.OutOfMemoryError)
        row.status, row.reason = (
            "oom" if oom else "failed",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def training_step(layer: torch.nn.Module, x: Tensor, precision: str) -> Callable[[], None]:
    """Forward and backward of `layer` on x [b l d]; gradients are overwritten, not added up."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        out = _run(layer, x, precision)
        aux = layer.aux_loss() if hasattr(layer, "aux_loss") else None
        losses = [loss for loss in (out, aux) if loss is not None and loss.requires_grad]
        if losses:
            torch.autograd.grad(losses, leaves, [torch.ones_like(o) for o in losses], allow_unused=True)

    return step


def inference(layer: torch.nn.Module, x: Tensor, precision: str) -> Callable[[], None]:
    def infer() -> None:
        with torch.no_grad():
            _run(layer, x, precision)

    return infer


def _run(layer: torch.nn.Module, x: Tensor, precision: str) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        if isinstance(layer, Block):
            return layer(x, None, layer.init_carry(x.shape[0]))[0]
        return layer(x, None) if hasattr(layer, "place") else layer(x)


def peak_mib(step: Callable[[], None], leaves: list[Tensor]) -> float | None:
    """Peak of PyTorch's CUDA allocator in one step after a first one, without what was there before."""
    if not leaves[0].is_cuda:
        return None
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves[1:])
    return max(0.0, (peak - gradients) / MIB)


def seconds(call: Callable[[], None]) -> float:
    """The median time of a call, synchronised, after a warm-up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(WARMUP_CALLS):
        call()
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < MIN_SECONDS:
        environment.synchronize(device)
        started = time.perf_counter()
        call()
        environment.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def captured_ms(step: Callable[[], None]) -> float | None:
    """The step replayed from a CUDA graph, without the host's launches; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return 1e3 * seconds(graph.replay)


def growth(rows: list[Row]) -> dict[tuple[str, int], float]:
    """(mechanism, length) -> its peak memory over that at half the length, where both were measured."""
    peaks = {(r.model, r.length): r.peak_mib for r in rows if r.status == "ok" and r.peak_mib}
    return {
        (name, length): peak / peaks[name, length // 2]
        for (name, length), peak in peaks.items()
        if (name, length // 2) in peaks
    }


def broken_claims(rows: list[Row]) -> list[str]:
    """What measured growth says against `quadratic_memory`, and every layer that could not be measured."""
    claims = {r.model: r.quadratic_memory for r in rows if r.quadratic_memory is not None}
    broken = [f"{r.model} at {r.length:,}: {r.status}, {r.reason}" for r in rows if r.status != "ok"]
    found = growth(rows)
    for (name, length), factor in found.items():
        if not claims.get(name) and factor > MOST_GROWTH:
            broken.append(f"{name} at {length:,}: {factor:.2f} times the memory of half the length")
    for name, quadratic in claims.items():
        factors = [f for (n, _), f in found.items() if n == name]
        if quadratic and factors and max(factors) < LEAST_QUADRATIC:
            broken.append(f"{name} claims quadratic_memory, yet grows {max(factors):.2f} times at most")
    return broken


def failures(rows: list[Row]) -> list[str]:
    """Layers that could not be measured; for one that claims `quadratic_memory` to run out is an answer."""
    quadratic = {r.model for r in rows if r.quadratic_memory}
    return [
        f"{r.model} at {r.length:,}: {r.status}, {r.reason}"
        for r in rows
        if r.status == "failed" or (r.status == "oom" and r.model not in quadratic)
    ]


def growth_table(rows: list[Row]) -> str:
    """One line per mechanism: peak memory at each length and its growth per doubling."""
    found, lengths = growth(rows), sorted({r.length for r in rows})
    lines = [f"{'mechanism':<16}" + "".join(f"{f'MiB at {n:,}':>16}" for n in lengths) + f"{'growth':>14}"]
    for name in dict.fromkeys(r.model for r in rows):
        mine = {r.length: r for r in rows if r.model == name}
        cells = [
            f"{mine[n].peak_mib:.1f}" if n in mine and mine[n].peak_mib is not None else mine[n].status
            for n in lengths
        ]
        factors = [f"{found[name, n]:.2f}" for n in lengths if (name, n) in found]
        claim = " (claims quadratic)" if mine[lengths[0]].quadratic_memory else ""
        lines.append(f"{name:<16}" + "".join(f"{c:>16}" for c in cells) + f"{' '.join(factors):>14}{claim}")
    return "\n".join(lines)


def time_table(rows: list[Row]) -> str:
    """One line per mechanism: ms of a training step (eager, captured), of inference, and peak memory."""
    lengths = sorted({r.length for r in rows})
    lines = [f"{'mechanism':<16}" + "".join(f"{f'{n:,}: eager captured infer MiB':>36}" for n in lengths)]
    for name in dict.fromkeys(r.model for r in rows):
        mine = {r.length: r for r in rows if r.model == name}
        cells = [_times(mine[n]) if n in mine else "" for n in lengths]
        lines.append(f"{name:<16}" + "".join(f"{c:>36}" for c in cells))
    return "\n".join(lines)


def _times(row: Row) -> str:
    if row.status != "ok":
        return row.status
    numbers = [
        "-" if value is None else f"{value:.2f}" for value in (row.step_ms, row.captured_ms, row.infer_ms)
    ]
    return " ".join([*numbers, "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"])


def write(rows: list[Row], path: Path) -> None:
    """One JSON object a line, each with its environment."""
    about = {
        "device": environment.device_name(environment.pick_device("auto")),
        "torch": torch.__version__,
        "git_revision": environment.git_revision(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**dataclasses.asdict(row), "environment": about}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; with --check, exit status 1 if a measured growth is not the one claimed."""
    parser = argparse.ArgumentParser(prog="python -m lra.layer_cost", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mechanisms (default: all)")
    parser.add_argument("--check", action="store_true", help="memory alone, at 4,096 to 16,384 in float32")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 4 with --check, else 32")
    parser.add_argument("--width", type=int, default=64, help="d_model, two heads for each 64 (default: 64)")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds to begin layers in")
    parser.add_argument("-o", "--output", type=Path, help="a .jsonl file for the rows")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("layer_cost reads the CUDA allocator and needs a GPU")
    for name in arguments.names:
        registry.get(name)  # UserError for an unknown one
    names = arguments.names or registry.names()
    width = arguments.width
    heads = max(2, width // 64)
    lengths = GROWTH_LENGTHS if arguments.check else TIME_LENGTHS
    size = Size(
        arguments.batch_size or (4 if arguments.check else 32),
        width,
        heads,
        "fp32" if arguments.check else "bf16",
    )
    rows, started, left_out = [], time.perf_counter(), []
    for name in names:
        for own in [{}, *VARIANTS.get(name, [])]:
            if time.perf_counter() - started > arguments.time_limit:
                left_out.append(name)
                continue
            found = [layer_cost(name, n, own, size, timed=not arguments.check) for n in lengths]
            for row in found:
                row.model = name + "".join(f" {value}" for value in own.values())
            rows += found
            if arguments.output:
                write(rows, arguments.output)
    print(growth_table(rows) if arguments.check else time_table(rows))
    if left_out:
        print(f"not begun within {arguments.time_limit:.0f} s: {', '.join(left_out)}")
    broken = broken_claims(rows) if arguments.check else failures(rows)
    for line in broken:
        print(line)
    return 1 if broken or left_out else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"layer_cost: {error}")
