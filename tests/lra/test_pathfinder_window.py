"""A snake that has left the window ends there, before anything outside the arrays is read."""

import numpy as np
import pytest

from lra.tasks.pathfinder_generator import extend
from lra.tasks.pathfinder_tables import SIZES, tables

FAR = 10**6


class Watched:
    """A closed window that counts what is read of it, and refuses what compiled code would read elsewhere."""

    def __init__(self, window):
        self.window, self.reads = window, 0

    def __getitem__(self, place):
        assert all(0 <= at < side for at, side in zip(place, self.window.shape, strict=True)), place
        self.reads += 1
        return self.window[place]


def pixels_read(m, pivot):
    """How many pixels `extend`, run as plain Python, looks at before it ends a snake with this next pivot."""
    ahead = np.ceil(m.moves[0, 4:6]).astype(int)
    state = np.array([*(pivot - ahead), 0, m.size // 2, m.size // 2])
    closed, stream, sums = Watched(m.empty_closed), np.zeros(1, np.uint64), np.empty(m.weights.shape[1])
    assert not extend.py_func(m, state, m.empty.copy(), closed, stream, sums)
    return closed.reads


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_snake_far_outside_ends_without_a_look_at_the_window(size, axis):
    for m in tables(size, "hard").margins:
        for place in (-FAR, -m.radius - 1, size + m.radius, size + FAR):
            pivot = np.full(2, size // 2)
            pivot[axis] = place
            assert pixels_read(m, pivot) == 0


@pytest.mark.parametrize("size", SIZES)
def test_a_snake_that_could_still_turn_back_looks_at_no_pixel_beyond_the_border(size):
    for m in tables(size, "hard").margins:
        for y in (-m.radius, size + m.radius - 1):
            for x in (-m.radius, size + m.radius - 1):
                assert pixels_read(m, np.array([y, x])) == m.weights.shape[1]
