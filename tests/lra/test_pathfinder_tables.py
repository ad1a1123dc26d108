"""The tables are what Pillow draws and plain formulas give, for every direction of every size."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from lra.tasks.pathfinder_generator import FREE, FULL, IMAGE, MASK
from lra.tasks.pathfinder_raster import arctan2, cosine, cosine_series, sine
from lra.tasks.pathfinder_tables import ANTIALIAS, SIZES, settings, tables

DEGREES = [degree * math.pi / 180 for degree in range(-180, 180)]
BYTES = (np.arange(256) / 255).astype(np.float32).astype(np.float64)


def margins_of(size):
    """(settings, margin in pixels, tables of the margin) of a size."""
    chosen = settings(size, "hard")
    return [(chosen, *pair) for pair in zip(chosen.margins, tables(size, "hard").margins, strict=False)]


def circle(size, m):
    """The sampled angles of the circle of candidates, and the candidates as listed by direction."""
    angles = np.arange(0, 360, 360.0 / (2 * m.radius * np.pi)) * np.pi / 180
    pixels = {(math.floor(m.radius * sine(a)), math.floor(m.radius * cosine(a))) for a in angles.tolist()}
    return angles, sorted(pixels)


def paddle_thetas(size, m):
    """The direction in which each tabulated paddle points."""
    orientations = [arctan2(y, x) for y, x in circle(size, m)[1]]
    return DEGREES + [o + math.pi if o < 0 else o - math.pi for o in orientations]


def dilated_as_opencv(window, points):
    """Each pixel's maximum at `points` from it, -inf where all of them are outside."""
    reach = np.abs(points).max()
    padded = np.pad(window.astype(float), reach, constant_values=-np.inf)
    side = len(window)
    moved = [padded[reach + y : reach + y + side, reach + x : reach + x + side] for y, x in points]
    return np.max(moved, axis=0)


def test_sine_and_cosine_are_within_a_bit_of_the_library():
    for angle in [*DEGREES, *(angle / 7 + 0.1 for angle in DEGREES)]:
        assert abs(sine(angle) - math.sin(angle)) <= math.ulp(math.sin(angle)), angle
        assert abs(cosine(angle) - math.cos(angle)) <= math.ulp(math.cos(angle)), angle


def test_rounded_multiples_of_pi_keep_their_small_sines():
    assert sine(math.pi) == 1.2246467991473532e-16
    assert sine(-math.pi) == -1.2246467991473532e-16
    assert cosine(math.pi / 2) == 6.123233995736766e-17
    assert (sine(0.0), cosine(0.0)) == (0.0, 1.0)


def test_arctangent_is_within_a_bit_of_the_library_in_all_quadrants():
    for y in range(-9, 10):
        for x in range(-9, 10):
            if (y, x) != (0, 0):
                assert abs(arctan2(y, x) - math.atan2(y, x)) <= math.ulp(math.atan2(y, x)), (y, x)
    assert (arctan2(0, -3), arctan2(0, 3), arctan2(-2, 0)) == (math.pi, 0.0, -math.pi / 2)


def test_the_cosine_of_weights_is_within_its_bound():
    angles = np.linspace(0, math.pi / 2, 1001)
    assert np.abs(cosine_series(angles) - [cosine(angle) for angle in angles.tolist()]).max() < 3e-16


@pytest.mark.parametrize("size", SIZES)
def test_paddles_and_masks_equal_pillows_for_every_direction(size):
    for chosen, margin, m in margins_of(size):
        half = chosen.paddle_length + math.ceil(chosen.thickness) + margin
        centre, width = half * ANTIALIAS, round(chosen.thickness * ANTIALIAS)
        middle = m.stamps.shape[2] // 2
        patch = np.s_[middle - half : middle + half + 1, middle - half : middle + half + 1]
        thetas = paddle_thetas(size, m)
        assert len(thetas) == len(m.shapes)
        for theta, shape in zip(thetas, m.shapes, strict=True):
            length = chosen.paddle_length * ANTIALIAS
            head_y, head_x = (math.ceil(centre + length * f(theta)) for f in (sine, cosine))
            picture = Image.new("F", (2 * centre + 1, 2 * centre + 1))
            ImageDraw.Draw(picture).line([(centre, centre), (head_x, head_y)], fill=255, width=width)
            fine = np.array(picture).astype(np.uint8)
            room = ndimage.grey_dilation(fine, footprint=_footprint(margin * ANTIALIAS), mode="constant")
            for kind, source in ((IMAGE, fine), (MASK, room)):
                side = (2 * half + 1, 2 * half + 1)
                wanted = np.asarray(Image.fromarray(source).resize(side, Image.Resampling.LANCZOS))
                np.testing.assert_array_equal(m.stamps[shape, kind][patch], wanted)
                assert m.stamps[shape, kind].sum() == wanted.sum()


def _footprint(radius):
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y * y + x * x <= radius * radius


@pytest.mark.parametrize("size", SIZES)
def test_boxes_hold_all_of_their_stamps_and_no_more(size):
    for _, _, m in margins_of(size):
        middle = m.stamps.shape[2] // 2
        for stamp, box in zip(m.stamps.reshape(-1, *m.stamps.shape[2:]), m.boxes.reshape(-1, 4), strict=True):
            y, x = np.nonzero(stamp)
            assert [y.min(), y.max(), x.min(), x.max()] == (box + middle).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_candidates_are_the_pixels_around_any_pivot(size):
    """Cutting the samples before adding the pivot equals adding first, on either axis and outside too."""
    for _, _, m in margins_of(size):
        angles, pixels = circle(size, m)
        pivots = np.arange(-2 * m.radius - 2, size + 2 * m.radius + 2)[:, None]
        for function in (np.sin, np.cos):
            steps = m.radius * function(angles)
            added = pivots + steps
            inside = (added >= 0) & (added < size)
            cut = pivots + np.floor(steps).astype(int)
            np.testing.assert_array_equal(inside, (cut >= 0) & (cut < size))
            np.testing.assert_array_equal(added[inside].astype(int), cut[inside])
        assert m.radius == -np.array(pixels).min()


@pytest.mark.parametrize("size", SIZES)
def test_turns_and_weights_are_the_formulas_for_every_direction(size):
    for chosen, margin, m in margins_of(size):
        pixels = circle(size, m)[1]
        orientations = np.array([math.atan2(y, x) for y, x in pixels])
        thetas = [*DEGREES, *orientations]
        assert len(thetas) == len(m.turns)
        for direction, theta in enumerate(thetas):
            angle = np.abs(orientations - theta)
            angle = np.minimum(np.minimum(angle, 2 * np.pi - angle) * chosen.continuity, np.pi / 2)
            wanted = np.cos(angle) ** 2
            found = np.zeros(len(pixels))
            used = m.weights[direction] > 0
            for (y, x, onward), weight in zip(
                m.turns[direction][used], m.weights[direction][used], strict=True
            ):
                assert pixels[onward - 360] == (y, x)
                found[onward - 360] = weight
            assert (np.diff(m.turns[direction][used][:, 2]) > 0).all()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15)
            step = (chosen.paddle_length + 2 * margin) * np.array([math.sin(theta), math.cos(theta)])
            np.testing.assert_allclose(m.moves[direction, 4:], step, rtol=0, atol=2e-15)


@pytest.mark.parametrize("size", SIZES)
def test_first_moves_go_to_the_head_and_back_to_the_pivot(size):
    for chosen, margin, m in margins_of(size):
        for direction, theta in enumerate(DEGREES):
            unit = np.array([math.sin(theta), math.cos(theta)])
            head, back = m.moves[direction, :2], m.moves[direction, 2:4]
            np.testing.assert_allclose(head, chosen.paddle_length * unit, rtol=0, atol=2e-15)
            np.testing.assert_allclose(back, -(chosen.paddle_length + margin) * unit, rtol=0, atol=2e-14)


def test_byte_bounds_are_the_bounds_of_the_float_masks():
    first, second = np.meshgrid(np.arange(256), np.arange(256))
    np.testing.assert_array_equal(BYTES[first] + BYTES[second] < 1.8, first + second < FULL)
    np.testing.assert_array_equal(np.ceil(BYTES - 0.3) == 0, np.arange(256) <= FREE)


@pytest.mark.parametrize("size", SIZES)
def test_starts_are_the_free_pixels_of_the_dilated_border_band(size):
    for chosen, margin, m in margins_of(size):
        window = np.zeros((size, size))
        band = 2 * chosen.seed_distance
        for side in (window, window.T):
            side[:band] = side[size - band :] = 1
        reach, middle = chosen.paddle_length + margin, m.stamps.shape[2] // 2
        for stamp, (top, left, rows, columns) in zip(m.stamps[:, MASK], m.starts, strict=True):
            # The mask's centre lies one past the middle of the structuring element, which cuts it.
            points = np.argwhere(stamp == 255) - middle + 1
            points = points[np.abs(points).max(axis=1) <= reach]
            found = dilated_as_opencv(window, points)
            # A window with a pixel where the whole element is outside counts as full.
            wanted = np.argwhere(found <= 0.3) if np.isfinite(found).all() else []
            assert len(wanted) == rows * columns
            for index in (0, len(wanted) // 2, len(wanted) - 1) if len(wanted) else ():
                assert wanted[index].tolist() == [top + index // columns, left + index % columns]


def test_most_directions_of_thin_paddles_start_no_snake():
    free = {size: sum(m.starts[m.shapes[:360], 2] > 0) for size in SIZES for _, _, m in margins_of(size)[:1]}
    assert free == {32: 30, 64: 95, 128: 354, 256: 360}
