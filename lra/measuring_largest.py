"""The largest length that fits in memory, where a measured one does not."""

import math
import time
from collections.abc import Callable

SHORTEST = 16  # what is not tried below
STEPS = 8  # lengths between a power of two and the next that are tried


def largest_that_fits(
    fits: Callable[[int], bool], low: int, high: int, *, seconds: float
) -> tuple[int | None, int]:
    """(largest length known to fit, shortest known not to), by halving and then bisecting.

    low: a length known to fit, or 0; high: one known not to. Lengths between powers of two lie an eighth of
    the lower one apart; the search ends when its two sides are neighbours, or after `seconds`.
    """
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        trial = on_grid(math.sqrt(low * high) if low else high / 2)
        if trial <= low:
            trial = next_length(low)
        if trial >= high or trial < SHORTEST:
            break
        if fits(trial):
            low = trial
        else:
            high = trial
    return low or None, high


def on_grid(length: float) -> int:
    """The largest length of the grid that is no longer."""
    step = _step(length)
    return int(length // step) * step


def next_length(length: int) -> int:
    """The length of the grid after this one: the shortest that was tried if the search came to its end."""
    return on_grid(length) + _step(length)


def _step(length: float) -> int:
    return max(1, 2 ** int(math.log2(max(length, 1))) // STEPS)
