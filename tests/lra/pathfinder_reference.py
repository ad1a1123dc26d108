"""A slow, plain Pathfinder generator, to compare the package's fast one with image by image.

Everything is drawn, resized and dilated over whole images by Pillow and SciPy, step by step as the original
generator does; nothing of the package is used. An image is a function of a stream of numbers in [0, 1).
Coordinates are (y, x).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import maximum_filter

LEVELS = ("easy", "intermediate", "hard")
SIZES = (32, 64, 128, 256)

FINE = 2  # the fine grid has this many pixels a side for one of the image
PADDLE_TRIES = 3
DISTRACTOR_TRIES = 5

Point = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """What the original is told for one size and level; lengths in pixels."""

    size: int
    padding: int
    margins: tuple[int, ...]
    seed_distance: int
    marker_radius: float
    paddle_length: int
    thickness: float
    continuity: float
    snake_contrast: float
    paddle_contrast: float
    contour_length: int  # paddles of a target snake
    distractor_length: int  # paddles of a distractor snake
    num_distractors: int


def settings(size: int, level: str) -> Settings:
    contour_length = {"easy": 6, "intermediate": 9, "hard": 14}[level]
    distractor_length = contour_length // 3
    row = {
        #   padding margins seed_distance radius L  t    continuity snake paddle distractors' numerator
        32: (1, (1,), 7, 1.5, 2, 0.5, 1.0, 2.0, 0.75, 20),
        64: (1, (1,), 12, 2.5, 5, 1.0, 1.8, 0.8, 1.0, 22),
        128: (1, (2, 3), 20, 3.0, 5, 1.5, 1.8, 0.9, 1.0, 35),
        256: (22, (3,), 27, 5.0, 5, 2.0, 1.8, 1.0, 1.0, 30),
    }[size]
    return Settings(size, *row[:-1], contour_length, distractor_length, row[-1] // distractor_length)


def stream(seed: int, size: int, level: str, index: int) -> Iterator[float]:
    """The numbers that decide image `index`: 53 bits each of splitmix64, started at a place of its own."""
    step, word = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    code = size * 4 + LEVELS.index(level)
    base = mix((mix((mix((seed + step) & word) + code) & word) + index) & word)
    for k in itertools.count():
        yield (mix((base + (k + 1) * step) & word) >> 11) * 2.0**-53


class Failure(Exception):
    """A snake that cannot be drawn or grown."""


def pick(draws: Iterator[float], count: int) -> int:
    return int(next(draws) * count)


def translate(point: Point, theta: float, distance: float) -> Point:
    return (
        int(math.ceil(point[0] + distance * np.sin(theta))),
        int(math.ceil(point[1] + distance * np.cos(theta))),
    )


def reversed_seed(theta: float) -> float:
    return theta + np.pi if theta + np.pi < np.pi else theta - np.pi


def reversed_extension(theta: float) -> float:
    return theta + np.pi if theta < 0 else theta - np.pi


def inside(point: Point, size: int) -> bool:
    return 0 <= point[0] < size and 0 <= point[1] < size


def disk(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def dilate(image: np.ndarray, struct: np.ndarray) -> np.ndarray:
    """out[y, x] is the largest of image[y + i - centre, x + j - centre] over struct[i, j], in the image."""
    assert struct.any()
    return maximum_filter(image, footprint=struct, mode="constant", cval=-np.inf)


def with_border(mask: np.ndarray, width: int) -> np.ndarray:
    """A copy whose outermost `width` rows and columns are 1."""
    banded = np.ones_like(mask)
    banded[width:-width, width:-width] = mask[width:-width, width:-width]
    return banded


def byte_scale(image: np.ndarray) -> np.ndarray:
    low, high = image.min(), image.max()
    scaled = (image - low) * (255.0 / (high - low))
    return np.floor(np.clip(scaled, 0, 255) + 0.5).astype(np.uint8)


def resize(image: np.ndarray, side: int) -> np.ndarray:
    assert image.dtype == np.uint8
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


@cache
def paddle(s: Settings, theta: float, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """The image patch and the mask patch, uint8, of a paddle that starts in the middle and points along
    theta.
    """
    half = s.paddle_length + math.ceil(s.thickness) + margin
    centre = (half * FINE, half * FINE)
    head = translate(centre, theta, s.paddle_length * FINE)
    picture = Image.new("F", (2 * half * FINE + 1, 2 * half * FINE + 1), 0)
    ImageDraw.Draw(picture).line([centre[::-1], head[::-1]], fill=255, width=round(s.thickness * FINE))
    fine = np.array(picture)
    dilated = dilate(fine, disk(margin * FINE))
    side = 2 * half + 1
    return resize(byte_scale(fine), side), resize(dilated.astype(np.uint8), side)


def place(patch: np.ndarray, centre: Point, size: int) -> np.ndarray:
    """Zeros [size size] with the patch in them, its middle at `centre`, cut at the borders."""
    half = patch.shape[0] // 2
    wide = np.zeros((size + 4 * half + 2, size + 4 * half + 2), patch.dtype)
    y, x = centre[0] + 2 * half, centre[1] + 2 * half
    wide[y - half : y + half + 1, x - half : x + half + 1] = patch
    return wide[2 * half : 2 * half + size, 2 * half : 2 * half + size]


def paddle_mask(s: Settings, theta: float, margin: int, start: Point) -> np.ndarray:
    """float32 [size size]"""
    _, patch = paddle(s, theta, margin)
    return place((patch / 255).astype(np.float32), start, s.size)


def paddle_image(s: Settings, theta: float, margin: int, start: Point, contrast: float) -> np.ndarray:
    """float32 [size size]"""
    patch = paddle(s, theta, margin)[0] / 255
    if contrast != 1.0:
        patch = patch * contrast
    return place(patch.astype(np.float32), start, s.size)


def seed_struct(s: Settings, theta: float, margin: int) -> np.ndarray:
    """Where a paddle's mask is full, its start one past the middle of the struct, as the original has it."""
    reach = s.paddle_length + margin
    struct = place(paddle(s, theta, margin)[1], (reach + 1, reach + 1), 2 * reach + 1)
    return struct == 255


def free_pixels(blocked: np.ndarray) -> list[Point]:
    """None at all if a pixel is below 0: the original takes that for a fault. A dilation leaves such pixels
    where its struct, which need not hold its own middle, lies outside the window altogether.
    """
    if blocked.min() < 0:
        return []
    return [(int(y), int(x)) for y, x in np.argwhere(np.ceil(blocked - 0.3) == 0)]


@dataclass
class Snake:
    """What growing needs to know, and the paddles so far: (start, direction)."""

    origin: Point
    tip: Point
    pivot: Point
    theta: float
    last_mask: np.ndarray
    paddles: list[tuple[Point, float]]


def first_paddle(s: Settings, margin: int, tail: Point, theta: float) -> Snake | None:
    """None if the head or the pivot leaves the window."""
    head = translate(tail, theta, s.paddle_length)
    pivot = translate(head, reversed_seed(theta), s.paddle_length + margin)
    if not inside(head, s.size) or not inside(pivot, s.size):
        return None
    return Snake(tail, tail, pivot, theta, paddle_mask(s, theta, margin, tail), [(tail, theta)])


def seed_one(draws: Iterator[float], s: Settings, margin: int, mask: np.ndarray) -> Snake:
    for _ in range(PADDLE_TRIES):
        theta = (pick(draws, 360) - 180) * np.pi / 180
        banded = with_border(mask, 2 * s.seed_distance)
        free = free_pixels(dilate(banded, seed_struct(s, theta, margin)))
        if not free:
            raise Failure
        snake = first_paddle(s, margin, free[pick(draws, len(free))], theta)
        if snake is not None:
            return snake
    raise Failure


def seed_two(draws: Iterator[float], s: Settings, margin: int, tail1: Point) -> Snake:
    for _ in range(PADDLE_TRIES):
        theta = (pick(draws, 360) - 180) * np.pi / 180
        phi = pick(draws, 360) * np.pi / 180
        tail = (
            int(np.rint(tail1[0] + s.seed_distance * np.sin(phi))),
            int(np.rint(tail1[1] + s.seed_distance * np.cos(phi))),
        )
        snake = first_paddle(s, margin, tail, theta)
        if snake is not None:
            return snake
    raise Failure


def seed_distractor(draws: Iterator[float], s: Settings, margin: int, mask: np.ndarray) -> Snake:
    for _ in range(PADDLE_TRIES):
        theta = (pick(draws, 360) - 180) * np.pi / 180
        free = free_pixels(dilate(with_border(mask, 1), seed_struct(s, theta, margin)))
        if np.mean(mask <= 0.3) < 0.01 or not free:
            raise Failure
        snake = first_paddle(s, margin, free[pick(draws, len(free))], theta)
        if snake is not None:
            return snake
    raise Failure


def extend(draws: Iterator[float], s: Settings, margin: int, mask: np.ndarray, snake: Snake) -> np.ndarray:
    """Add a paddle to the snake; the new mask, into which the snake's paddle before it is merged."""
    new_pivot = translate(snake.pivot, snake.theta, s.paddle_length + 2 * margin)
    radius = s.paddle_length + margin
    angles = np.arange(0, 360, 360.0 / (2 * radius * np.pi)) * np.pi / 180
    ys, xs = new_pivot[0] + radius * np.sin(angles), new_pivot[1] + radius * np.cos(angles)
    kept = (ys >= 0) & (ys < s.size) & (xs >= 0) & (xs < s.size)
    pixels = sorted({(int(y), int(x)) for y, x in zip(ys[kept], xs[kept], strict=True)})
    if not pixels:
        raise Failure
    orientations = np.array([np.arctan2(y - new_pivot[0], x - new_pivot[1]) for y, x in pixels])
    delta = np.abs(orientations - snake.theta)
    delta = np.minimum(delta, 2 * np.pi - delta)
    cosines = np.cos(np.minimum(delta * s.continuity, np.pi / 2))
    weights = np.maximum(cosines, 0) ** 2 * (1 - dilated_at(mask, pixels, margin))
    if weights.sum() < 1e-4:
        raise Failure
    cumulated = np.cumsum(weights / weights.sum())
    for _ in range(PADDLE_TRIES):
        chosen = int(np.argmax(cumulated > next(draws)))
        head, orientation = pixels[chosen], orientations[chosen]
        direction = reversed_extension(orientation)
        new_mask = paddle_mask(s, direction, margin, head)
        if np.max(mask + new_mask) < 1.8:
            mask = np.maximum(mask, snake.last_mask)
            snake.last_mask, snake.pivot, snake.theta, snake.tip = new_mask, new_pivot, orientation, head
            snake.paddles.append((head, direction))
            return mask
    raise Failure


def dilated_at(mask: np.ndarray, pixels: list[Point], radius: int) -> np.ndarray:
    """The mask dilated by disk(radius), at the given pixels."""
    wide = np.pad(mask, radius, constant_values=-np.inf)
    near = disk(radius)
    return np.array([wide[y : y + len(near), x : x + len(near)][near].max() for y, x in pixels])


def draw_pair(draws: Iterator[float], s: Settings, margin: int) -> tuple[np.ndarray, list[Snake]]:
    """One attempt at the two target snakes: the mask and the snakes."""
    mask = with_border(np.zeros((s.size, s.size)), s.padding)
    one = seed_one(draws, s, margin, mask)
    two = seed_two(draws, s, margin, one.origin)
    for _ in range(s.contour_length - 1):
        mask = extend(draws, s, margin, mask, one)
        mask = extend(draws, s, margin, mask, two)
    return np.maximum(mask, two.last_mask), [one, two]


def draw_distractor(
    draws: Iterator[float], s: Settings, margin: int, mask: np.ndarray
) -> tuple[np.ndarray, Snake]:
    snake = seed_distractor(draws, s, margin, mask)
    for _ in range(s.distractor_length - 1):
        mask = extend(draws, s, margin, mask, snake)
    return np.maximum(mask, snake.last_mask), snake


def marker(s: Settings, centre: Point) -> np.ndarray:
    """A disc, float64 [size size] from 0 to 1."""
    y, x = np.mgrid[: s.size * FINE, : s.size * FINE]
    distance = (y - FINE * centre[0]) ** 2 + (x - FINE * centre[1]) ** 2
    return resize(byte_scale((distance <= (s.marker_radius * FINE) ** 2).astype(float)), s.size) / 255


def draw_image(draws: Iterator[float], size: int, level: str) -> tuple[np.ndarray, int, int, dict[str, Any]]:
    """pixels uint8 [size size], label, margin, and how they came about."""
    s = settings(size, level)
    label = pick(draws, 2)
    margin = s.margins[pick(draws, len(s.margins))]
    failures = 0
    while True:
        try:
            mask, targets = draw_pair(draws, s, margin)
            break
        except Failure:
            failures += 1
    distractors = []
    for _ in range(s.num_distractors):
        for _ in range(DISTRACTOR_TRIES):
            try:
                mask, snake = draw_distractor(draws, s, margin, mask)
            except Failure:
                continue
            distractors.append(snake)
            break
    image = np.zeros((size, size))
    for snakes, contrast in (
        (targets, s.paddle_contrast * s.snake_contrast),
        (distractors, s.snake_contrast),
    ):
        for start, theta in (part for snake in snakes for part in snake.paddles):
            image = np.maximum(image, paddle_image(s, theta, margin, start, contrast))
    origin = pick(draws, 2)
    markers = [targets[origin].origin, targets[origin if label == 1 else 1 - origin].tip]
    for centre in markers:
        image = np.maximum(image, marker(s, centre))
    details = {"failures": failures, "markers": markers, "targets": targets, "distractors": distractors}
    return byte_scale(image), label, margin, details
