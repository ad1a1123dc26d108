"""Everything about Pathfinder images that no random draw decides, computed once for each size and level.

The generator moves on a grid of pixels. A paddle (a short line) can point in few directions, and all that is
needed for one of them is tabulated here: the line's image, the room it takes, where a snake may go on from
there and with what weight.

Coordinates are (y, x). A "fine" picture has ANTIALIAS times the resolution.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lra.tasks.pathfinder_raster import (
    arctan2,
    cosine,
    cosine_series,
    dilated,
    disk,
    line,
    resize_units,
    resized,
    sine,
)

LEVELS = {"easy": 6, "intermediate": 9, "hard": 14}
"""Paddles of a target snake."""
SIZES = (32, 64, 128, 256)
ANTIALIAS = 2


@dataclass(frozen=True)
class Settings:
    """The parameters of one data set, as the Long Range Arena states them or as the original's defaults."""

    size: int
    level: str
    padding: int  # of the window, closed to target snakes
    margins: tuple[int, ...]  # room around a paddle; one is drawn for each image
    seed_distance: int  # between the tails of the two target snakes
    marker_radius: float
    paddle_length: int
    thickness: float
    continuity: float  # the higher, the straighter the snakes
    snake_contrast: float
    paddle_contrast: float  # of target snakes only
    contour_length: int  # paddles of a target snake
    distractor_length: int
    num_distractors: int

    @property
    def code(self) -> int:
        """Tells the random stream of these settings from those of all others."""
        return self.size * 4 + list(LEVELS).index(self.level)


def settings(size: int, level: str) -> Settings:
    """The settings of one published size and level.

    How many shorter snakes LRA's easy and intermediate images have is not documented. LRA's formula for level
    hard, a number of paddles divided by the length of a shorter snake, is applied to each level here.
    """
    # In the order of Settings' fields, and last about how many paddles the shorter snakes have in all.
    rows = {
        32: (1, (1,), 7, 1.5, 2, 0.5, 1.0, 2.0, 0.75, 20),
        64: (1, (1,), 12, 2.5, 5, 1.0, 1.8, 0.8, 1.0, 22),
        128: (1, (2, 3), 20, 3.0, 5, 1.5, 1.8, 0.9, 1.0, 35),
        256: (22, (3,), 27, 5.0, 5, 2.0, 1.8, 1.0, 1.0, 30),
    }
    if size not in rows or level not in LEVELS:
        raise ValueError(f"size {size}, level {level!r}: the sizes are {SIZES}, the levels {tuple(LEVELS)}")
    *columns, distractor_paddles = rows[size]
    contour = LEVELS[level]
    distractor = contour // 3
    return Settings(size, level, *columns, contour, distractor, distractor_paddles // distractor)


class Margin(NamedTuple):
    """What the compiled code reads for one margin. Letters: d direction, s shape, n turn; padded with zeros.

    Directions 0-359 are those of a snake's first paddle, -180 to 179 degrees. Direction 360 + c is that of
    candidate c seen from a pivot: a snake that grew there goes on in this direction, while its newest paddle
    points back. A shape is what a direction's paddle looks like.
    """

    size: int
    border: int  # rows and columns around the window in `closed`
    radius: int  # of the circle of candidates
    moves: np.ndarray  # float64 [d, 6], (y, x) from tail to head, from head to pivot, from pivot to pivot
    compass: np.ndarray  # float64 [360, 2], from tail to tail of the target snakes
    shapes: np.ndarray  # int64 [d]
    stamps: np.ndarray  # uint8 [s, 3, side, side], the paddle, the room it takes, that with a margin around
    boxes: np.ndarray  # int64 [s, 3, 4], (top, bottom, left, right) of their nonzero parts, from the centre
    turns: np.ndarray  # int64 [d, n, 3], (y, x) from the pivot and direction of each possible next paddle
    weights: np.ndarray  # float64 [d, n]
    openness: np.ndarray  # float64 [256], 1 - mask
    starts: np.ndarray  # int64 [s, 4], (top, left, rows, columns) of the tails that target snake 1 may have
    cores: np.ndarray  # int64 [s, points, 2], where the mask is 255, as offsets of a first paddle
    num_cores: np.ndarray  # int64 [s]
    empty: np.ndarray  # uint8 [size, size], mask of an empty window: its padding is closed
    empty_closed: np.ndarray  # uint8 [size + 2 border, size + 2 border], its reach; 255 outside the window


class Tables(NamedTuple):
    """What the compiled code reads, of one type for all sizes and levels."""

    contour_length: int
    distractor_length: int
    num_distractors: int
    num_margins: int
    margins: tuple[Margin, Margin]  # the second one repeats the first where there is only one
    target_light: np.ndarray  # float64 [256], what a stamp's value is in a target snake
    distractor_light: np.ndarray  # float64 [256]
    antialias: int
    disc_radius: float  # in fine pixels
    disc_starts: np.ndarray  # int64 [size], first fine pixel that a pixel of a resized disc reads
    disc_units: np.ndarray  # int64 [size, taps]


@functools.cache
def tables(size: int, level: str) -> Tables:
    """The tables of `settings(size, level)`."""
    chosen = settings(size, level)
    margins = [_margin(chosen, margin) for margin in chosen.margins]
    starts, units = resize_units(size * ANTIALIAS, size)
    return Tables(
        contour_length=chosen.contour_length,
        distractor_length=chosen.distractor_length,
        num_distractors=chosen.num_distractors,
        num_margins=len(margins),
        margins=(margins[0], margins[-1]),
        target_light=_light(chosen.paddle_contrast * chosen.snake_contrast),
        distractor_light=_light(chosen.snake_contrast),
        antialias=ANTIALIAS,
        disc_radius=chosen.marker_radius * ANTIALIAS,
        disc_starts=starts,
        disc_units=units,
    )


def _light(contrast: float) -> np.ndarray:
    """The value of each byte at a contrast. The original keeps it in single precision."""
    return (np.arange(256) / 255 * contrast).astype(np.float32).astype(np.float64)


def _margin(chosen: Settings, margin: int) -> Margin:
    size, length = chosen.size, chosen.paddle_length
    radius, border = length + margin, 2 * (length + margin)
    thetas = [degree * math.pi / 180 for degree in range(-180, 180)]
    back = [t + math.pi if t + math.pi < math.pi else t - math.pi for t in thetas]
    offsets = circle_offsets(radius)
    orientations = [arctan2(y, x) for y, x in offsets]
    flipped = [o + math.pi if o < 0 else o - math.pi for o in orientations]

    half = length + math.ceil(chosen.thickness) + margin
    centre, width = half * ANTIALIAS, round(chosen.thickness * ANTIALIAS)
    ends = _steps(thetas + flipped, length * ANTIALIAS)
    tips = [(math.ceil(centre + y), math.ceil(centre + x)) for y, x in ends]
    distinct = sorted(set(tips))
    fine = np.stack([line((centre, centre), tip, width, 2 * centre + 1) for tip in distinct])
    images = _framed(resized(fine, 2 * half + 1), margin)
    masks = _framed(resized(dilated(fine, disk(margin * ANTIALIAS)), 2 * half + 1), margin)
    stamps = np.stack([images, masks, dilated(masks, disk(margin))], axis=1)

    turns, weights = _turns(
        np.array(thetas + orientations), np.array(orientations), offsets, chosen.continuity
    )
    first = np.concatenate([_steps(thetas, length), _steps(back, length + margin)], axis=1)
    onward = _steps(thetas + orientations, length + 2 * margin)
    cores = [core_offsets(mask, length + margin) for mask in masks]

    empty = np.zeros((size, size), np.uint8)
    for closed in (empty, empty.T):
        closed[: chosen.padding] = closed[-chosen.padding :] = 255
    empty_closed = np.full((size + 2 * border, size + 2 * border), 255, np.uint8)
    empty_closed[border:-border, border:-border] = dilated(empty[None], disk(margin))[0]
    return Margin(
        size=size,
        border=border,
        radius=radius,
        moves=np.concatenate([np.pad(first, ((0, len(offsets)), (0, 0))), onward], axis=1),
        compass=_steps([degree * math.pi / 180 for degree in range(360)], chosen.seed_distance),
        shapes=np.array([distinct.index(tip) for tip in tips]),
        stamps=stamps,
        boxes=_boxes(stamps),
        turns=turns,
        weights=weights,
        openness=1 - _light(1.0),
        starts=np.array([start_room(chosen, points) for points in cores]),
        cores=_stacked(cores),
        num_cores=np.array([len(points) for points in cores]),
        empty=empty,
        empty_closed=empty_closed,
    )


def _turns(thetas, orientations, offsets, continuity) -> tuple[np.ndarray, np.ndarray]:
    """Per direction the candidates that a snake can turn to, [d, n, (y, x, direction)], and weights [d, n].

    The weight is cos^2 of the angle turned times the continuity, 0 from a right angle on.
    """
    angles = np.abs(orientations[None, :] - thetas[:, None])
    angles = np.minimum(angles, 2 * math.pi - angles)
    weights = np.maximum(cosine_series(np.minimum(angles * continuity, math.pi / 2)), 0) ** 2
    # The square of the cosine of a rounded right angle is below 1e-30: no draw can tell it from 0.
    found = [np.flatnonzero(row > 1e-30) for row in weights]
    places = np.array([(y, x, 360 + index) for index, (y, x) in enumerate(offsets)])
    return _stacked([places[at] for at in found]), _stacked(
        [row[at] for row, at in zip(weights, found, strict=True)]
    )


def circle_offsets(radius: int) -> list[tuple[int, int]]:
    """The pixels of a circle around a pivot, as sorted offsets: its samples, cut to the pixel they lie in.

    Adding the pivot first and cutting then gives the same pixels: no sample lies so near an integer that the
    sum's rounding could reach it, but the first, which is exact.
    """
    samples = np.arange(0, 360, 360.0 / (2 * radius * math.pi)) * math.pi / 180
    return sorted({(math.floor(radius * sine(a)), math.floor(radius * cosine(a))) for a in samples.tolist()})


def core_offsets(mask: np.ndarray, reach: int) -> np.ndarray:
    """Where a first paddle's mask is 255, as offsets [points, 2] from its tail; none if it may start nowhere.

    The structuring element that looks for room has its centre at `reach`, but the original puts the mask one
    past it, so all is moved by one pixel, and what leaves the element is lost.

    The original takes a pixel for unusable if the whole element lies outside the window there, and a window
    with such a pixel for full. An element without a point in one of the four closed quadrants is so, in the
    opposite corner. Its directions start no snake: 330 of 360 for the thinnest paddle.
    """
    offsets = np.argwhere(mask == 255) - len(mask) // 2 + 1
    offsets = offsets[np.abs(offsets).max(axis=1) <= reach]
    assert len(offsets)
    quadrants = [(offsets * signs >= 0).all(axis=1).any() for signs in ((-1, -1), (-1, 1), (1, -1), (1, 1))]
    return offsets if all(quadrants) else offsets[:0]


def start_room(chosen: Settings, core: np.ndarray) -> tuple[int, int, int, int]:
    """The rectangle (top, left, rows, columns) of tails that keep `core` out of a band along the borders."""
    if not len(core):
        return 0, 0, 0, 0
    inner = chosen.size - 4 * chosen.seed_distance
    low, high = core.min(axis=0), core.max(axis=0)
    rows, columns = np.maximum(inner - (high - low), 0)
    top, left = 2 * chosen.seed_distance - low
    return int(top), int(left), int(rows), int(columns)


def _steps(thetas: list[float], radius: int) -> np.ndarray:
    """radius * (sin, cos) of each angle, float64 [n, 2]."""
    return np.array([(radius * sine(theta), radius * cosine(theta)) for theta in thetas])


def _boxes(stamps: np.ndarray) -> np.ndarray:
    """(top, bottom, left, right) of the nonzero part of stamps [..., side, side], from the centre."""
    ends = []
    for lines in (stamps.any(axis=-1), stamps.any(axis=-2)):
        ends += [lines.argmax(axis=-1), lines.shape[-1] - 1 - lines[..., ::-1].argmax(axis=-1)]
    return np.stack(ends, axis=-1) - stamps.shape[-1] // 2


def _framed(stamps: np.ndarray, width: int) -> np.ndarray:
    """Stamps [s, side, side] with a frame of zeros around each."""
    return np.pad(stamps, ((0, 0), (width, width), (width, width)))


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays of one dtype and rank as one, the smaller ones padded with zeros at their ends."""
    shape = np.max([part.shape for part in parts], axis=0).astype(int)
    out = np.zeros((len(parts), *shape), parts[0].dtype)
    for index, part in enumerate(parts):
        out[(index, *(slice(0, length) for length in part.shape))] = part
    return out
