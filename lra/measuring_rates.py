"""What a device can do at best: how fast it copies memory, and how fast it multiplies matrices.

Measured in the process that measures the cells, on the same card in the same state, so that a share of these
rates is a share of what this card gave and not of a data sheet.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from lra.environment import set_precision, synchronize

SECONDS, MIN_CALLS = 0.2, 5  # each rate is timed at least this long and this often
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # far beyond what caches hold
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # others multiply float32


@dataclass(frozen=True)
class Rates:
    """Bytes read and written a second by a large copy; floating-point operations a second of a large product
    in the precision of the run.
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float


@lru_cache
def rates(device: torch.device, precision: str) -> Rates:
    """The rates of a device, measured once a process."""
    set_precision(precision, deterministic=torch.are_deterministic_algorithms_enabled())
    return Rates(_copy_rate(device), _matrix_rate(device, DTYPES.get(precision, torch.float32)))


def _copy_rate(device: torch.device) -> float:
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=product), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a call, the first one left out: what the device can do undisturbed."""
    call()
    synchronize(device)
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < SECONDS:
        times.append(seconds(call, device))
    return min(times)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call took, synchronised; on a GPU by device events, so that launch gaps of the host do not
    count twice but waiting for launches does.
    """
    if device.type == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        before.record(stream)
        call()
        after.record(stream)
        torch.cuda.synchronize(device)
        return before.elapsed_time(after) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
