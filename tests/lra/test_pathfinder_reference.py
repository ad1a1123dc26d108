"""The fast Pathfinder generator draws the images of the slow, plain one, pixel by pixel."""

from itertools import islice

import numpy as np
import pytest
from pathfinder_reference import LEVELS, SIZES, draw_image, stream

from lra.tasks.pathfinder_generator import draw_images, uniforms

# Images that the reference draws in a second or two. At 64 hard it throws away 3,000 pairs of snakes for one.
FEW = {
    (32, "easy"): 8,
    (32, "intermediate"): 8,
    (32, "hard"): 24,
    (64, "easy"): 6,
    (64, "intermediate"): 4,
    (64, "hard"): 1,
    (128, "easy"): 4,
    (128, "intermediate"): 4,
    (128, "hard"): 2,
    (256, "easy"): 2,
    (256, "intermediate"): 2,
    (256, "hard"): 3,
}
MANY = {32: 1500, 64: 25, 128: 40, 256: 60}
SETTINGS = [(size, level) for size in SIZES for level in LEVELS]


def assert_equal_images(seed, size, level, first, count):
    pixels, labels, margins = draw_images(seed, size, level, first, count)
    for i in range(count):
        expected, label, margin, _ = draw_image(stream(seed, size, level, first + i), size, level)
        assert (labels[i], margins[i]) == (label, margin), f"image {first + i}"
        np.testing.assert_array_equal(pixels[i], expected, err_msg=f"image {first + i}")


@pytest.mark.parametrize(("size", "level"), SETTINGS)
def test_a_few_images_equal_the_references(size, level):
    assert_equal_images(0, size, level, 0, FEW[size, level])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "level"), SETTINGS)
def test_many_images_equal_the_references(size, level):
    assert_equal_images(1, size, level, 100_000, MANY[size])


@pytest.mark.parametrize(("size", "level"), SETTINGS)
def test_the_random_numbers_of_an_image_equal_the_references(size, level):
    seed, index = (1 << 63) - 1, 199_999
    expected = list(islice(stream(seed, size, level, index), 100))
    assert uniforms(seed, size, level, index, 100).tolist() == expected


def test_the_reference_gives_each_image_numbers_of_its_own():
    starts = {
        tuple(islice(stream(seed, size, level, index), 3))
        for seed in range(3)
        for size, level in SETTINGS
        for index in range(3)
    }
    assert len(starts) == 3 * len(SETTINGS) * 3
