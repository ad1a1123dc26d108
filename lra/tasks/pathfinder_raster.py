"""Angles, lines and resizing with the same result on every machine, equal to Pillow's to the pixel.

A generator that rounds coordinates up after a product is at the mercy of a sine's last bit, and that differs
from one mathematical library to the next. So sine, cosine and arctangent are computed with 50 digits here and
rounded once. Coordinates are (y, x).
"""

import functools
import math
from decimal import Decimal, localcontext

import numpy as np

UNIT_BITS = 22
"""Fixed-point bits of a resizing coefficient."""

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
_DIGITS = 50


@functools.cache
def sine(x: float) -> float:
    """sin(x), correctly rounded, for |x| up to some tens."""
    with localcontext(prec=_DIGITS):
        return float(_alternating(Decimal(x), Decimal(x) ** 2, 2))


@functools.cache
def cosine(x: float) -> float:
    """cos(x), correctly rounded, for |x| up to some tens."""
    with localcontext(prec=_DIGITS):
        return float(_alternating(Decimal(1), Decimal(x) ** 2, 1))


def _alternating(term: Decimal, square: Decimal, divisor: int) -> Decimal:
    """The Taylor series of sine (first term x, divisor 2) or cosine (1 and 1)."""
    total = Decimal(0)
    while abs(term) > Decimal(10) ** -(_DIGITS + 10):
        total += term
        term *= -square / (divisor * (divisor + 1))
        divisor += 2
    return total


@functools.cache
def arctan2(y: int, x: int) -> float:
    """The angle of the vector (y, x), not both 0, correctly rounded; in (-pi, pi]."""
    with localcontext(prec=_DIGITS):
        if abs(y) > abs(x):
            angle = (_PI / 2).copy_sign(y) - _arctan(Decimal(x) / y)
        else:
            angle = _arctan(Decimal(y) / x) + (0 if x > 0 else _PI if y >= 0 else -_PI)
        return float(angle)


def _arctan(t: Decimal) -> Decimal:
    """arctan(t) for |t| <= 1: the angle is halved three times, then the series converges fast."""
    for _ in range(3):
        t /= 1 + (1 + t * t).sqrt()
    total, power, odd = Decimal(0), t, 1
    while abs(power) > Decimal(10) ** -(_DIGITS + 10):
        total += power / odd
        power *= -t * t
        odd += 2
    return 8 * total


def cosine_series(x: np.ndarray) -> np.ndarray:
    """cos(x) for 0 <= x <= pi/2 within 3e-16, by additions and products only: equal on every machine."""
    total = np.zeros_like(x)
    for order in range(28, 0, -2):
        total = (total + 1) * (x * x) * (-1 / ((order - 1) * order))
    return total + 1


def line(start: tuple[int, int], end: tuple[int, int], width: int, side: int) -> np.ndarray:
    """A line of value 255 on a square of zeros, uint8 [side, side], pixel for pixel as Pillow draws it.

    A line of width 1 rounds its minor coordinate, halves away from the start. A wider one is a parallelogram
    with integer corners, filled row by row; halves go inwards.
    """
    out = np.zeros((side, side), np.uint8)
    dy, dx = end[0] - start[0], end[1] - start[1]
    if width == 1:
        steps = max(abs(dy), abs(dx))
        for step in range(steps + 1):
            y, x = ((2 * step * abs(delta) + steps) // (2 * steps) for delta in (dy, dx))
            out[start[0] + (y if dy > 0 else -y), start[1] + (x if dx > 0 else -x)] = 255
        return out
    half, hypotenuse = (width - 1) / 2, math.sqrt(dy * dy + dx * dx)
    wide, narrow = _half_out(half) / hypotenuse, _half_in(half) / hypotenuse
    one = _half_out(wide * dx), -_half_in(narrow * dy)
    other = -_half_out(narrow * dx), _half_in(wide * dy)
    corners = [(y + shift[0], x + shift[1]) for shift in (one, other) for y, x in (start, end)]
    corners[2:] = reversed(corners[2:])
    crossings: dict[int, list[float]] = {}
    for (y0, x0), (y1, x1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            crossings.setdefault(y0, []).extend((x0, x1))
        else:
            for y in range(min(y0, y1), max(y0, y1) + 1):
                crossings.setdefault(y, []).append(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    for y, found in crossings.items():
        out[y, _half_out(min(found)) : _half_in(max(found)) + 1] = 255
    return out


def _half_out(value: float) -> int:
    """To the nearest integer, halves away from zero."""
    return math.floor(value + 0.5) if value >= 0 else -math.floor(0.5 - value)


def _half_in(value: float) -> int:
    """To the nearest integer, halves towards zero."""
    return math.ceil(value - 0.5) if value >= 0 else -math.ceil(-value - 0.5)


def disk(radius: int) -> list[tuple[int, int]]:
    """The offsets within `radius` of the origin."""
    span = range(-radius, radius + 1)
    return [(y, x) for y in span for x in span if y * y + x * x <= radius * radius]


def dilated(pictures: np.ndarray, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Each pixel's maximum over `offsets`, for pictures [n, side, side]; outside a picture nothing counts."""
    reach, side = max(abs(y) for y, _ in offsets), pictures.shape[1]
    padded = np.pad(pictures, ((0, 0), (reach, reach), (reach, reach)))
    moved = (padded[:, reach + y : reach + y + side, reach + x : reach + x + side] for y, x in offsets)
    return functools.reduce(np.maximum, moved)


def resized(pictures: np.ndarray, side: int) -> np.ndarray:
    """uint8 pictures [n, fine, fine] resized to [n, side, side] as Pillow's Lanczos filter does it."""
    fine = pictures.shape[1]
    matrix = np.zeros((side, fine), np.int64)
    for row, start, units in zip(matrix, *resize_units(fine, side), strict=True):
        row[start : start + len(units)] = units[: fine - start]
    half = 1 << (UNIT_BITS - 1)
    across = np.clip((pictures.astype(np.int64) @ matrix.T + half) >> UNIT_BITS, 0, 255)
    return np.clip((matrix @ across + half) >> UNIT_BITS, 0, 255).astype(np.uint8)


def resize_units(fine: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's Lanczos coefficients for fine -> side pixels: first pixel read [side], units [side, taps].

    At the borders the filter is cut and normalised anew. Rows with fewer taps end in zeros.
    """
    scale = fine / side
    support = 3 * scale
    starts, taps = np.zeros(side, np.int64), math.ceil(2 * support) + 1
    units = np.zeros((side, taps), np.int64)
    for pixel in range(side):
        centre = (pixel + 0.5) * scale
        start = max(0, int(centre - support + 0.5))
        end = min(fine, int(centre + support + 0.5))
        weights = [_lanczos((read - centre + 0.5) / scale) for read in range(start, end)]
        total = math.fsum(weights)
        scaled = [weight / total * (1 << UNIT_BITS) for weight in weights]
        starts[pixel] = start
        units[pixel, : end - start] = [int(unit - 0.5 if unit < 0 else unit + 0.5) for unit in scaled]
    return starts, units[:, : np.flatnonzero(units.any(axis=0)).max() + 1]


def _lanczos(x: float) -> float:
    def sinc(x: float) -> float:
        return sine(x * math.pi) / (x * math.pi) if x else 1.0

    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0
