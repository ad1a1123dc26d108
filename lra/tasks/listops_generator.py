"""ListOps trees by the million: drawing, evaluating and counting them in compiled code.

Every number comes from a counter: word j of attempt i under seed s is a fixed hash of (s, i, j) in integer
arithmetic, so an attempt gives the same tree on any machine and for any number of workers. Importing this
module imports numba.

A tree is drawn from the root down, children from left to right. One word decides a node:
  bits 0-1    an operator if both are 0 (probability 1/4), where the depth allows one
  bits 2-3    which operator
  bits 32-63  the digit, or the number of arguments, without bias (a rare rejected value takes the next word)
"""

from collections.abc import Callable

import numba
import numpy as np

CLOSE = 15
MIN, MAX, MED, SM = 11, 12, 13, 14
"""Ids on disk: 1 to 10 are the digits, 11 to 14 the operators, 15 is `]`. They equal `listops.SYMBOLS`."""

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOW_2, _LOW_32 = np.uint64(3), np.uint64(0xFFFFFFFF)
_2, _27, _30, _31, _32 = np.uint64(2), np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_TWO_TO_32 = np.uint64(1 << 32)


def compiled(function: Callable) -> Callable:
    """Compile without the interpreter lock; keep the machine code on disk where numba finds a place for it.

    numba tries NUMBA_CACHE_DIR, the folder of this file and the user's cache folder. Where none can be
    written it raises (a read-only install without a home), and the code is then compiled anew in each
    process.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@compiled
def mix(word):
    """The output function of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words."""
    word = (word ^ (word >> _30)) * _MIX_1
    word = (word ^ (word >> _27)) * _MIX_2
    return word ^ (word >> _31)


@compiled
def draw_tree(seed, attempt, longest, max_depth, max_args, tokens, left):
    """Draw the tree of one attempt into `tokens`; its length, or 0 as soon as it must exceed `longest`.

    `left[d]` counts the arguments that the open operator at depth d still waits for.
    """
    word = mix(mix(mix(seed + _STEP) + attempt) + _STEP)
    size, depth = 0, 1
    needed = 1  # the shortest this tree can still become
    while True:
        word += _STEP
        bits = mix(word)
        is_operator = depth < max_depth and (bits & _LOW_2) == 0
        choices = np.uint64(max_args - 1) if is_operator else np.uint64(10)
        product = (bits >> _32) * choices
        if (product & _LOW_32) < choices:
            # Lemire 2019: the few values that would make the draw uneven are rejected.
            rejected = _TWO_TO_32 % choices
            while (product & _LOW_32) < rejected:
                word += _STEP
                product = (mix(word) >> _32) * choices
        value = np.int64(product >> _32)
        if is_operator:
            left[depth] = 2 + value
            needed += 3 + value
            if needed > longest:
                return 0
            tokens[size] = MIN + np.int64((bits >> _2) & _LOW_2)
            size += 1
            depth += 1
            continue
        tokens[size] = 1 + value
        size += 1
        while depth > 1:
            left[depth - 1] -= 1
            if left[depth - 1] > 0:
                break
            tokens[size] = CLOSE
            size += 1
            depth -= 1
        if depth == 1:
            return size


@compiled
def value_of(tokens, counts, operators):
    """The value of one expression, a digit, or -1 if `tokens` is not a well-formed expression.

    `counts[d, v]` says how often digit v has been seen among the arguments of the open operator at depth d:
    every operator, the median too, can be read from that histogram.
    """
    depth = 0
    for position in range(len(tokens)):
        token = np.int64(tokens[position])
        if token < 1 or token > CLOSE or (depth == 0 and position > 0):
            return -1
        if MIN <= token < CLOSE:
            depth += 1
            if depth >= len(operators):
                return -1
            operators[depth] = token
            for digit in range(10):
                counts[depth, digit] = 0
            continue
        value = token - 1
        if token == CLOSE:
            if depth == 0:
                return -1
            total = 0
            for digit in range(10):
                total += counts[depth, digit]
            if total == 0:
                return -1
            # Ranks of the two middle arguments for MED; MIN and MAX are the first and the last rank.
            low, high = (total - 1) // 2, total // 2
            if operators[depth] == MIN:
                low = high = 0
            elif operators[depth] == MAX:
                low = high = total - 1
            seen, weighted, low_digit, high_digit = 0, 0, -1, -1
            for digit in range(10):
                seen += counts[depth, digit]
                weighted += digit * counts[depth, digit]
                if low_digit < 0 and seen > low:
                    low_digit = digit
                if high_digit < 0 and seen > high:
                    high_digit = digit
            value = weighted % 10 if operators[depth] == SM else (low_digit + high_digit) // 2
            depth -= 1
        if depth == 0:
            if position + 1 == len(tokens):
                return value
            return -1
        counts[depth, value] += 1
    return -1


@compiled
def draw_block(seed, first, count, shortest, longest, max_depth, max_args):
    """The accepted trees of attempts first .. first + count - 1: (flat tokens, offsets, labels)."""
    left = np.zeros(max_depth + 1, np.int64)
    counts, operators = np.zeros((max_depth + 1, 10), np.int64), np.zeros(max_depth + 1, np.int64)
    flat = np.empty(max(2 * longest, 16 * count), np.uint8)
    offsets, labels = np.zeros(count + 1, np.int64), np.zeros(count, np.uint8)
    rows = 0
    for index in range(count):
        start = offsets[rows]
        if start + longest > len(flat):
            larger = np.empty(2 * len(flat), np.uint8)
            for position in range(start):
                larger[position] = flat[position]
            flat = larger
        size = draw_tree(seed, first + np.uint64(index), longest, max_depth, max_args, flat[start:], left)
        if size >= shortest:
            labels[rows] = value_of(flat[start : start + size], counts, operators)
            rows += 1
            offsets[rows] = start + size
    return flat[: offsets[rows]], offsets[: rows + 1], labels[:rows]


@compiled
def values(flat, offsets):
    """The value of each row, -1 where a row is not a well-formed expression."""
    deepest = 1
    for row in range(len(offsets) - 1):
        depth = 0
        for position in range(offsets[row], offsets[row + 1]):
            if MIN <= flat[position] < CLOSE:
                depth += 1
                deepest = max(deepest, depth)
            elif flat[position] == CLOSE:
                depth -= 1
    counts, operators = np.zeros((deepest + 1, 10), np.int64), np.zeros(deepest + 1, np.int64)
    out = np.empty(len(offsets) - 1, np.int64)
    for row in range(len(out)):
        out[row] = value_of(flat[offsets[row] : offsets[row + 1]], counts, operators)
    return out


@compiled
def tally(flat, offsets, widest):
    """Counts over well-formed rows: symbols [16], arguments of all operators and of roots [widest + 1 each],
    and per row the number of operators and of nested levels [rows each]. An operator with more arguments
    counts as `widest`.
    """
    symbols = np.zeros(16, np.int64)
    arguments, root_arguments = np.zeros(widest + 1, np.int64), np.zeros(widest + 1, np.int64)
    rows = len(offsets) - 1
    operators, levels = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    longest = 0
    for row in range(rows):
        longest = max(longest, offsets[row + 1] - offsets[row])
    open_arguments = np.zeros(longest + 1, np.int64)
    for row in range(rows):
        depth = 0
        for position in range(offsets[row], offsets[row + 1]):
            token = np.int64(flat[position])
            symbols[token] += 1
            if token < MIN:
                open_arguments[depth] += 1
            elif token < CLOSE:
                open_arguments[depth] += 1
                depth += 1
                open_arguments[depth] = 0
                operators[row] += 1
                levels[row] = max(levels[row], depth)
            else:
                found = min(open_arguments[depth], widest)
                arguments[found] += 1
                depth -= 1
                if depth == 0:
                    root_arguments[found] += 1
    return symbols, arguments, root_arguments, operators, levels
