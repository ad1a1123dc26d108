"""Pathfinder images by the hundred thousand: two long snakes of paddles, shorter ones, two discs to connect.

An image is a fixed function of (seed, size, level, its index). Its random numbers come from a counter of its
own, and all that sines and divisions decide is in `pathfinder_tables`. The label says whether the discs are
on the same snake. Importing this module imports numba; the compiled code holds no interpreter lock, so the
caller's threads share the work.

Masks count in 255ths and say how much of a pixel is taken. A new paddle must not collide with `mask`, and a
snake grows towards pixels that are open in `closed`, which is `mask` with a margin around everything. The
paddle drawn last is not in them yet, or a snake could not go on from its own end.

A snake's state is (pivot y, x, direction, y, x): where and how its newest paddle was drawn. Its path has the
last three of each paddle. Inner loops count in unsigned numbers: that spares the test for negative indices,
and they become vector instructions.
"""

import numpy as np

from lra.tasks.listops_generator import compiled
from lra.tasks.pathfinder_picture import develop
from lra.tasks.pathfinder_tables import settings, tables

# Numba's cache on the disk watches the file of a function and nothing that it imports. So every constant and
# function that compiled code uses is in this file, or comes as an argument.
PADDLE_TRIES, SNAKE_TRIES = 3, 5
FREE, FULL = 76, 459  # a pixel is free up to 0.3 times 255; masks collide from a sum of 1.8 times 255 on
IMAGE, MASK, REACH = 0, 1, 2  # the stamps of a shape, in the order of `Margin.stamps`

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)


def draw_images(seed: int, size: int, level: str, first: int, count: int) -> tuple[np.ndarray, ...]:
    """Images first .. first + count - 1: pixels uint8 [count, size, size]; labels, margins uint8 [count]."""
    return draw_details(seed, size, level, first, count)[:3]


def draw_details(seed: int, size: int, level: str, first: int, count: int) -> tuple[np.ndarray, ...]:
    """`draw_images`, the discs' centres int64 [count, 2, 2] and the pairs of snakes that failed [count]."""
    chosen, t = settings(size, level), tables(size, level)
    code = np.uint64(chosen.code)
    snakes, labels, which, discs, failures = _draw_block(t, np.uint64(seed), code, np.uint64(first), count)
    pixels = develop(t, snakes, discs)
    return pixels, labels, np.array(chosen.margins, np.uint8)[which], discs, failures


def uniforms(seed: int, size: int, level: str, index: int, count: int) -> np.ndarray:
    """The first `count` random numbers of image `index`, float64 in [0, 1)."""
    return _uniforms(np.uint64(seed), np.uint64(settings(size, level).code), np.uint64(index), count)


@compiled
def _uniforms(seed, code, index, count):
    stream = np.empty(1, np.uint64)
    start_stream(stream, seed, code, index)
    out = np.empty(count)
    for k in range(count):
        out[k] = draw(stream)
    return out


@compiled
def mix(word):
    """The output function of splitmix64, as in `listops_generator`."""
    word = (word ^ (word >> _30)) * _MIX_1
    word = (word ^ (word >> _27)) * _MIX_2
    return word ^ (word >> _31)


@compiled
def start_stream(stream, seed, code, index):
    """Put the stream of one image before its first number."""
    stream[0] = mix(mix(mix(seed + _STEP) + code) + index)


@compiled
def draw(stream):
    """The stream's next uniform number in [0, 1), of 53 bits."""
    stream[0] += _STEP
    return np.float64(mix(stream[0]) >> _11) * 2.0**-53


@compiled
def pick(stream, count):
    """A uniform integer below `count`."""
    return np.int64(draw(stream) * count)


@compiled
def inside(size, y, x):
    return 0 <= y < size and 0 <= x < size


@compiled
def copy(to, of):
    """Copy an array of bytes. (`to[:] = of` compiles to something ten times slower.)"""
    to, of = to.ravel(), of.ravel()
    for n in range(len(to)):
        to[n] = of[n]


@compiled
def merge(m, window, border, shape, kind, y, x):
    """Raise `window`, whose pixel (0, 0) is at [border, border], to a stamp centred on (y, x), cut to fit."""
    half, box = m.stamps.shape[2] // 2, m.boxes[shape, kind]
    left, right = max(x + box[2], 0), min(x + box[3], m.size - 1)
    to_left, of_left = np.uint64(left + border), np.uint64(left - x + half)
    for row in range(max(y + box[0], 0), min(y + box[1], m.size - 1) + 1):
        to_row, of_row = np.uint64(row + border), np.uint64(row - y + half)
        for n in range(np.uint64(max(right + 1 - left, 0))):
            value = m.stamps[shape, kind, of_row, of_left + n]
            window[to_row, to_left + n] = max(window[to_row, to_left + n], value)


@compiled
def collides(m, mask, shape, y, x):
    """Whether a paddle's mask centred on (y, x) and `mask` reach 1.8 somewhere.

    A sum of exactly 459 / 255 does: both float32 values, each above a half, were rounded up.
    """
    half, box = m.stamps.shape[2] // 2, m.boxes[shape, MASK]
    left, right = max(x + box[2], 0), min(x + box[3], m.size - 1)
    to_left, of_left = np.uint64(left), np.uint64(left - x + half)
    for row in range(max(y + box[0], 0), min(y + box[1], m.size - 1) + 1):
        to_row, of_row = np.uint64(row), np.uint64(row - y + half)
        highest = np.uint16(0)
        for n in range(np.uint64(max(right + 1 - left, 0))):
            value = np.uint16(m.stamps[shape, MASK, of_row, of_left + n])
            highest = max(highest, np.uint16(mask[to_row, to_left + n] + value))
        if highest >= FULL:
            return True
    return False


@compiled
def merge_newest(m, state, mask, closed):
    """Enter a snake's newest paddle into `mask` and `closed`."""
    shape, y, x = m.shapes[state[2]], state[3], state[4]
    merge(m, mask, 0, shape, MASK, y, x)
    merge(m, closed, m.border, shape, REACH, y, x)


@compiled
def place(m, state, direction, y, x):
    """Put a first paddle's tail on (y, x); False if its head or its pivot leaves the window."""
    head_y = np.int64(np.ceil(y + m.moves[direction, 0]))
    head_x = np.int64(np.ceil(x + m.moves[direction, 1]))
    state[0] = np.int64(np.ceil(head_y + m.moves[direction, 2]))
    state[1] = np.int64(np.ceil(head_x + m.moves[direction, 3]))
    state[2], state[3], state[4] = direction, y, x
    return inside(m.size, head_y, head_x) and inside(m.size, state[0], state[1])


@compiled
def extend(m, state, mask, closed, stream, sums):
    """Grow a snake by one paddle; False if there is no room, or none was found in three draws."""
    last = state[2]
    pivot_y = np.int64(np.ceil(state[0] + m.moves[last, 4]))
    pivot_x = np.int64(np.ceil(state[1] + m.moves[last, 5]))
    if max(-pivot_y, -pivot_x) > m.radius or max(pivot_y, pivot_x) >= m.size + m.radius:
        return False
    # Pixels outside the window are closed, so their weight is 0, as if they were not there.
    total, count = 0.0, m.weights.shape[1]
    for n in range(count):
        y, x = pivot_y + m.turns[last, n, 0] + m.border, pivot_x + m.turns[last, n, 1] + m.border
        total += m.weights[last, n] * m.openness[closed[y, x]]
        sums[n] = total
    if total < 1e-4:
        return False
    for _ in range(PADDLE_TRIES):
        bound = draw(stream) * total
        n = 0
        while n < count and sums[n] <= bound:
            n += 1
        if n == count:
            n = 0  # Rounding took the bound up to the total: the original falls back on the first, too.
        y, x, direction = pivot_y + m.turns[last, n, 0], pivot_x + m.turns[last, n, 1], m.turns[last, n, 2]
        if not collides(m, mask, m.shapes[direction], y, x):
            merge_newest(m, state, mask, closed)
            state[0], state[1], state[2], state[3], state[4] = pivot_y, pivot_x, direction, y, x
            return True
    return False


@compiled
def seed_pair(m, states, stream):
    """Place the first paddles of both target snakes in an empty window; False if that fails."""
    tries = 0
    while True:
        direction = pick(stream, 360)
        top, left, rows, columns = m.starts[m.shapes[direction]]
        if rows * columns == 0:
            return False
        which = pick(stream, rows * columns)
        tail_y, tail_x = top + which // columns, left + which % columns
        if place(m, states[0], direction, tail_y, tail_x):
            break
        tries += 1
        if tries == PADDLE_TRIES:
            return False
    for _ in range(PADDLE_TRIES):
        direction = pick(stream, 360)
        bearing = pick(stream, 360)
        y = np.int64(np.rint(tail_y + m.compass[bearing, 0]))
        x = np.int64(np.rint(tail_x + m.compass[bearing, 1]))
        if place(m, states[1], direction, y, x):
            return True
    return False


@compiled
def grow_pair(m, states, paths, mask, closed, stream, sums):
    """Grow both target snakes, round about, to the length of `paths`; False if that fails."""
    for snake in range(2):
        paths[snake, 0] = states[snake, 2:]
    for paddle in range(1, paths.shape[1]):
        for snake in range(2):
            if not extend(m, states[snake], mask, closed, stream, sums):
                return False
            paths[snake, paddle] = states[snake, 2:]
    # The last paddle of the first snake stays out of the masks: so the original has it.
    merge_newest(m, states[1], mask, closed)
    return True


@compiled
def draw_pair(m, states, paths, mask, closed, stream, sums):
    """Draw both target snakes into `paths` and the masks; the number of pairs that failed before."""
    failures = 0
    while True:
        if seed_pair(m, states, stream):
            copy(mask, m.empty)
            copy(closed, m.empty_closed)
            if grow_pair(m, states, paths, mask, closed, stream, sums):
                return failures
        failures += 1


@compiled
def dilate(taken, points, out):
    """Each pixel's maximum of `taken` at `points` (y, x offsets) from it; outside nothing counts."""
    size = len(taken)
    out[:] = 0
    for n in range(len(points)):
        dy, dx = points[n, 0], points[n, 1]
        to_left, of_left = np.uint64(max(0, -dx)), np.uint64(max(0, dx))
        for row in range(max(0, -dy), min(size, size - dy)):
            to_row, of_row = np.uint64(row), np.uint64(row + dy)
            for column in range(np.uint64(size - abs(dx))):
                value = taken[of_row, of_left + column]
                out[to_row, to_left + column] = max(out[to_row, to_left + column], value)


@compiled
def count_free(window, row_counts):
    """The number of free pixels, in all and in each row."""
    total = 0
    for row in range(len(window)):
        count = 0
        for column in range(len(window)):
            count += window[row, column] <= FREE
        row_counts[row] = count
        total += count
    return total


@compiled
def seed_distractor(m, state, mask, room, stream):
    """Place a shorter snake's first paddle where `mask` leaves room; False if that fails."""
    size, taken, free, row_counts = m.size, room[0], room[1], np.empty(m.size, np.int64)
    crowded = count_free(mask, row_counts) / (size * size) < 0.01
    copy(taken, mask)
    for n in range(size):
        taken[0, n] = taken[size - 1, n] = taken[n, 0] = taken[n, size - 1] = 255
    for _ in range(PADDLE_TRIES):
        direction = pick(stream, 360)
        shape = m.shapes[direction]
        if crowded or m.num_cores[shape] == 0:
            return False
        dilate(taken, m.cores[shape, : m.num_cores[shape]], free)
        total = count_free(free, row_counts)
        if total == 0:
            return False
        left, y, x = pick(stream, total), 0, 0
        while left >= row_counts[y]:
            left -= row_counts[y]
            y += 1
        while free[y, x] > FREE or left > 0:
            left -= free[y, x] <= FREE
            x += 1
        if place(m, state, direction, y, x):
            return True
    return False


@compiled
def grow_distractor(m, state, path, mask, closed, stream, sums):
    """Grow a shorter snake to the length of `path`; False if that fails."""
    path[0] = state[2:]
    for paddle in range(1, len(path)):
        if not extend(m, state, mask, closed, stream, sums):
            return False
        path[paddle] = state[2:]
    merge_newest(m, state, mask, closed)
    return True


@compiled
def draw_distractors(t, m, state, picture, mask, closed, stream, sums):
    """Draw the shorter snakes into `picture`. One that fails five times is left out."""
    room = np.empty((2, m.size, m.size), np.uint8)
    mask_before, closed_before = mask.copy(), closed.copy()
    path = np.empty((t.distractor_length, 3), np.int64)
    for _ in range(t.num_distractors):
        for _ in range(SNAKE_TRIES):
            if not seed_distractor(m, state, mask, room, stream):
                continue
            if grow_distractor(m, state, path, mask, closed, stream, sums):
                render(m, path, picture)
                copy(mask_before, mask)
                copy(closed_before, closed)
                break
            copy(mask, mask_before)
            copy(closed, closed_before)


@compiled
def render(m, path, picture):
    """Draw a snake's paddles into a picture, uint8 [size, size]."""
    for direction, y, x in path:
        merge(m, picture, 0, m.shapes[direction], IMAGE, y, x)


@compiled
def _draw_block(t, seed, code, first, count):
    """A block's stamped target snakes and shorter ones uint8 [count, 2, size, size], labels, numbers of the
    margins, centres of the discs [count, 2, (y, x)] and failed pairs.
    """
    size = t.margins[0].size
    snakes = np.zeros((count, 2, size, size), np.uint8)
    labels, which = np.empty(count, np.uint8), np.empty(count, np.uint8)
    discs, failures = np.empty((count, 2, 2), np.int64), np.empty(count, np.int64)
    stream, states = np.empty(1, np.uint64), np.empty((2, 5), np.int64)
    paths = np.empty((2, t.contour_length, 3), np.int64)
    mask = np.empty((size, size), np.uint8)
    for index in range(count):
        start_stream(stream, seed, code, first + np.uint64(index))
        labels[index] = pick(stream, 2)
        which[index] = pick(stream, t.num_margins)
        m = t.margins[which[index]]
        sums, closed = np.empty(m.weights.shape[1]), np.empty_like(m.empty_closed)
        failures[index] = draw_pair(m, states, paths, mask, closed, stream, sums)
        for snake in range(2):
            render(m, paths[snake], snakes[index, 0])
        draw_distractors(t, m, states[0], snakes[index, 1], mask, closed, stream, sums)
        origin = pick(stream, 2)
        discs[index, 0] = paths[origin, 0, 1:]
        discs[index, 1] = paths[origin if labels[index] == 1 else 1 - origin, t.contour_length - 1, 1:]
    return snakes, labels, which, discs, failures
