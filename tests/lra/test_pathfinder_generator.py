"""Images depend on seed, size, level and index alone, and have the original generator's statistics."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lra.tasks import pathfinder_generator as generator
from lra.tasks.pathfinder_generator import draw_details, draw_images, uniforms
from lra.tasks.pathfinder_picture import add_disc
from lra.tasks.pathfinder_raster import dilated, disk
from lra.tasks.pathfinder_tables import ANTIALIAS, LEVELS, SIZES, settings, tables

BYTES = (np.arange(256) / 255).astype(np.float32).astype(np.float64)


def dilated_as_opencv(window, points):
    """Each pixel's maximum at `points` from it, -inf where all of them are outside."""
    reach = np.abs(points).max()
    padded = np.pad(window.astype(float), reach, constant_values=-np.inf)
    side = len(window)
    moved = [padded[reach + y : reach + y + side, reach + x : reach + x + side] for y, x in points]
    return np.max(moved, axis=0)


@pytest.mark.parametrize("size", SIZES)
def test_discs_equal_pillows_anywhere_in_the_window(size):
    t, radius = tables(size, "hard"), settings(size, "hard").marker_radius * ANTIALIAS
    near = [*range(9), size // 2, size // 2 + 1, *range(size - 9, size)]
    places = [(near[i], near[(7 * i + 3) % len(near)]) for i in range(len(near))] + [(0, 0), (0, size - 1)]
    for y, x in places:
        rows, columns = np.ogrid[: 2 * size, : 2 * size]
        fine = (rows - 2 * y) ** 2 + (columns - 2 * x) ** 2 <= radius**2
        picture = Image.fromarray((fine * 255).astype(np.uint8))
        wanted = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
        found = np.zeros((size, size), np.uint8)
        add_disc(t, found, y, x)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size", [32, 128])
def test_the_closed_window_is_the_dilated_mask_up_to_the_border(size):
    rng = np.random.default_rng(size)
    for margin, m in zip(settings(size, "hard").margins, tables(size, "hard").margins, strict=False):
        for _ in range(10):
            mask, closed = m.empty.copy(), m.empty_closed.copy()
            for y, x in rng.integers(0, size, (6, 2)):
                state = np.array([0, 0, rng.integers(len(m.shapes)), y, x])
                generator.merge_newest(m, state, mask, closed)
            inner = closed[m.border : m.border + size, m.border : m.border + size]
            np.testing.assert_array_equal(inner, dilated(mask[None], disk(margin))[0])
            assert closed[: m.border].min() == closed[:, -m.border :].min() == 255


@pytest.mark.parametrize("size", [32, 128])
def test_paddles_collide_where_the_sum_over_the_window_says_so(size):
    rng = np.random.default_rng(size)
    seen = set()
    for m in tables(size, "hard").margins:
        middle = m.stamps.shape[2] // 2
        mask, closed = m.empty.copy(), m.empty_closed.copy()
        for y, x in rng.integers(0, size, (size // 8, 2)):
            generator.merge_newest(m, np.array([0, 0, rng.integers(len(m.shapes)), y, x]), mask, closed)
        for y, x in rng.integers(0, size, (300, 2)):
            shape = m.shapes[rng.integers(len(m.shapes))]
            whole = np.zeros((size + 2 * middle, size + 2 * middle))
            whole[y : y + 2 * middle + 1, x : x + 2 * middle + 1] = BYTES[m.stamps[shape, generator.MASK]]
            wanted = (BYTES[mask] + whole[middle:-middle, middle:-middle]).max() >= 1.8
            assert generator.collides(m, mask, shape, y, x) == wanted
            seen.add(bool(wanted))
    assert seen == {False, True}


def test_dilation_by_points_ignores_what_lies_outside():
    rng = np.random.default_rng(0)
    window = (rng.random((32, 32)) ** 20 * 255).astype(np.uint8)
    for points in ([[0, 1], [-2, 3]], [[3, -3], [0, 0], [1, 2]], [[-1, -1]]):
        out = np.full_like(window, 7)
        generator.dilate(window, np.array(points), out)
        np.testing.assert_array_equal(out, np.maximum(dilated_as_opencv(window, np.array(points)), 0))


def test_distractors_start_on_uniformly_drawn_free_pixels():
    """Replays the draws of a first try: a direction, then the number of a free pixel in reading order."""
    m = tables(64, "hard").margins[0]
    rng, state, placed = np.random.default_rng(0), np.empty(5, np.int64), 0
    for index in range(300):
        mask = np.where(rng.random((64, 64)) < 0.03, 255, rng.integers(0, 77)).astype(np.uint8)
        first, second = uniforms(1, 64, "hard", index, 2)
        stream = np.empty(1, np.uint64)
        generator.start_stream(stream, np.uint64(1), np.uint64(settings(64, "hard").code), np.uint64(index))
        direction = int(first * 360)
        shape = m.shapes[direction]
        points = m.cores[shape, : m.num_cores[shape]]
        taken = mask.copy()
        taken[[0, -1]] = taken[:, [0, -1]] = 255
        room = np.empty((2, 64, 64), np.uint8)
        found = generator.seed_distractor(m, state, mask, room, stream)
        if len(points) == 0:
            assert not found
        elif found and state[2] == direction:
            free = np.argwhere(dilated_as_opencv(taken, points) <= generator.FREE)
            assert state[3:].tolist() == free[int(second * len(free))].tolist()
            placed += 1
    assert placed > 30


def test_a_distractor_needs_one_free_pixel_in_a_hundred():
    m, state = tables(256, "hard").margins[0], np.empty(5, np.int64)
    room = np.empty((2, 256, 256), np.uint8)
    for side, wanted in ((25, False), (26, True)):  # 0.954 % and 1.031 % of the window; paddles fit into both
        mask = np.full((256, 256), 255, np.uint8)
        mask[100 : 100 + side, 120 : 120 + side] = 0
        for start in range(20):
            stream = np.array([start], np.uint64)
            assert generator.seed_distractor(m, state, mask, room, stream) == wanted


def test_the_stream_is_splitmix_of_seed_settings_and_index():
    step, full = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(word):
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & full
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & full
        return word ^ (word >> 31)

    base = mix((mix((mix((5 + step) & full) + 128 * 4 + 1) & full) + 77) & full)
    wanted = [(mix((base + (k + 1) * step) & full) >> 11) * 2.0**-53 for k in range(50)]
    assert uniforms(5, 128, "intermediate", 77, 50).tolist() == wanted


def test_label_and_margin_are_the_first_two_draws():
    _, labels, margins = draw_images(3, 128, "easy", 10, 60)
    draws = np.array([uniforms(3, 128, "easy", index, 2) for index in range(10, 70)])
    np.testing.assert_array_equal(labels, (draws[:, 0] * 2).astype(int))
    np.testing.assert_array_equal(margins, np.array([2, 3])[(draws[:, 1] * 2).astype(int)])


@pytest.mark.parametrize("size, count", [(32, 64), (128, 12)])
def test_blocks_and_threads_do_not_change_an_image(size, count):
    whole = draw_images(1, size, "hard", 0, count)
    parts = [(0, 1), (1, count // 2), (count // 2 + 1, count - count // 2 - 1)]
    for threads in (1, 4):
        with ThreadPoolExecutor(threads) as pool:
            drawn = list(pool.map(lambda part: draw_images(1, size, "hard", *part), parts))
        for wanted, *found in zip(whole, *drawn, strict=True):
            np.testing.assert_array_equal(np.concatenate(found), wanted)


def test_seeds_levels_and_indices_have_different_images():
    images = [
        draw_images(seed, 32, level, first, 1)[0].tobytes()
        for seed in (0, 1, 2**64 - 1)
        for level in LEVELS
        for first in (0, 1, 10**6)
    ]
    assert len(set(images)) == len(images)
    streams = {uniforms(0, size, level, 0, 1)[0] for size in SIZES for level in LEVELS}
    assert len(streams) == len(SIZES) * len(LEVELS)


def test_unknown_sizes_and_levels_are_refused():
    with pytest.raises(ValueError, match="size 48"):
        draw_images(0, 48, "hard", 0, 1)
    with pytest.raises(ValueError, match="'hardest'"):
        draw_images(0, 32, "hardest", 0, 1)


def test_images_use_the_full_range_and_discs_lie_in_the_window():
    for size in SIZES:
        pixels, labels, margins, discs, failures = draw_details(0, size, "easy", 0, 20)
        assert pixels.shape == (20, size, size) and pixels.dtype == np.uint8
        assert labels.dtype == margins.dtype == np.uint8 and set(labels.tolist()) <= {0, 1}
        assert (pixels.min(axis=(1, 2)) == 0).all() and (pixels.max(axis=(1, 2)) == 255).all()
        assert discs.min() >= 0 and discs.max() < size and failures.min() >= 0


PINNED = {
    (32, "easy", 100): "e225f35567df23597247e5aee09734c574f1638b8e091af17b18436d1cfe5673",
    (32, "intermediate", 100): "42d74335c73828fba8267e15c798c15521858c8775b064ec979c2a757a995a00",
    (32, "hard", 100): "78471735564011de8470b068a6fa3f4b4418b1582ce73d5cc050ebd9d41e0ff0",
    (32, "hard", 1000): "462189d7c0fbdfbd829688d45b67f2916f67a550944b2646d6fdabf4296d480f",
    (64, "easy", 100): "8360e21a136393f747f897585d3cd4fc2afe666ebe9ddd1dba775fa5b0893901",
    (64, "intermediate", 100): "e9bb0592ba089d2651871744f5a64ca3a62bd629d148f24be1903767271ab79b",
    (64, "hard", 100): "4850f73d7c430d98d3bd4fc1cf3bddcf312aecdb9be6aad8d36b7123d4e711b6",
    (64, "hard", 1000): "383e4e6efc3fd685ff4a036fb998878e7c4f1755725aa5377a38dd04df7750e1",
    (128, "easy", 100): "ebcf219fee8a290ac93c3dbd1e43e319daba2b23cb128d1ed151aa35efc96b4e",
    (128, "intermediate", 100): "92194d28c84569d5d221d4af3798452b95d0c3b7d1f71a89159b2fc118bdadb7",
    (128, "hard", 100): "321794844f76ac57e4cbdb989925602398a39573ca961ce9033ca710415ab68c",
    (128, "hard", 1000): "94e3631c80497945ec3831e704b3afa367540f110a291daab51c00f91db6954d",
    (256, "easy", 100): "47223a8771ad5f19c986ede5d368b35550588ef81ff7b7652d2cc48210b8182c",
    (256, "intermediate", 100): "7c7a3cbac04df1192a014d1ac039a6451b65e1df59774f65a79d7c0ae9f83f2a",
    (256, "hard", 100): "8efc4bf777c421be8c034cce22241ddb4d944e070dc44b51e200f5793daf7a18",
    (256, "hard", 1000): "d13435ae0f1b8ae10629475845e18e355171497eccb4bf5797b185d0a613d656",
}


def _digest(size, level, count):
    pixels, labels, margins = draw_images(0, size, level, 0, count)
    return hashlib.sha256(pixels.tobytes() + labels.tobytes() + margins.tobytes()).hexdigest()


@pytest.mark.parametrize("size, level, count", [key for key in PINNED if key[0] == 32 or key[2] == 100])
def test_images_are_pinned(size, level, count):
    assert _digest(size, level, count) == PINNED[size, level, count]


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_thousand_large_images_are_pinned(size):
    assert _digest(size, "hard", 1000) == PINNED[size, "hard", 1000]


TARGET_IMAGES = 2000
TARGETS = {
    "pixel mean": (20.15, 1.97),
    "pixel standard deviation": (50.97, 2.54),
    "share of 0": (0.6597, 0.038),
    "pixels at 255": (2.25, 1.39),
    "distinct values": (64.0, 7.5),
    "components from 1": (8.35, 3.28),
    "largest component from 1": (286, 71),
    "components from 128": (21.1, 4.46),
    "mean component from 128": (4.34, 1.16),
    "disc level": (0.935, 0.054),
    "disc area": (3.06, 0.37),
    "distance": (12.98, 5.15),
    "distance, label 0": (13.03, 5.15),
    "distance, label 1": (12.93, 5.14),
}
"""Mean and sd of 2,000 images of the original generator with LRA's settings, size 32, level hard."""
HISTOGRAM = (
    *(0.8429, 0.0123, 0.0115, 0.0078, 0.0076, 0.0117, 0.0092, 0.0120),
    *(0.0185, 0.0206, 0.0165, 0.0104, 0.0065, 0.0058, 0.0025, 0.0043),
)


@pytest.fixture(scope="module")
def sample():
    return draw_details(0, 32, "hard", 0, 2000)


def components(pixels, level):
    """Sizes of each image's 8-connected components of values from `level` on."""
    labelled = (ndimage.label(image >= level, np.ones((3, 3)))[0] for image in pixels)
    return [np.bincount(image.ravel())[1:] for image in labelled]


def disc(image, y, x):
    """A disc's core level, the lowest of its three full pixels, and the pixels within 3 % of it around."""
    level = float(min(image[y, x], image[y - 1, x], image[y, x - 1]))
    around = image[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
    return level / 255, (np.abs(around - level) <= 0.03 * level).sum()


def statistics(pixels, labels, discs):
    """Each statistic's values, one for each image or disc."""
    low, high = components(pixels, 1), components(pixels, 128)
    distance = np.hypot(*(discs[:, 0] - discs[:, 1]).T)
    cores = [disc(image, *centre) for image, pair in zip(pixels, discs, strict=True) for centre in pair]
    return {
        "pixel mean": pixels.mean(axis=(1, 2)),
        "pixel standard deviation": pixels.std(axis=(1, 2)),
        "share of 0": (pixels == 0).mean(axis=(1, 2)),
        "pixels at 255": (pixels == 255).sum(axis=(1, 2)),
        "distinct values": [len(np.unique(image)) for image in pixels],
        "components from 1": [len(sizes) for sizes in low],
        "largest component from 1": [sizes.max() for sizes in low],
        "components from 128": [len(sizes) for sizes in high],
        "mean component from 128": [sizes.mean() for sizes in high],
        "disc level": [level for level, _ in cores],
        "disc area": [area for _, area in cores],
        "distance": distance,
        "distance, label 0": distance[labels == 0],
        "distance, label 1": distance[labels == 1],
    }


def test_statistics_are_those_of_the_original(sample):
    """Two samples of n and 2,000 images: their means may differ by 4 sd sqrt(1 / n + 1 / 2000)."""
    pixels, labels, _, discs, _ = sample
    for name, values in statistics(pixels, labels, discs).items():
        mean, sd = TARGETS[name]
        images = {"distance, label 0": 1000, "distance, label 1": 1000}.get(name, TARGET_IMAGES)
        count = images if name.startswith("distance, ") else len(labels)
        assert abs(np.mean(values) - mean) < 4 * sd * math.sqrt(1 / count + 1 / images), name


def test_the_histogram_is_that_of_the_original(sample):
    shares = np.stack([(sample[0] >> 4 == level).mean(axis=(1, 2)) for level in range(16)])
    bound = 4 * shares.std(axis=1) * math.sqrt(2 / TARGET_IMAGES) + 0.00005  # the targets have 4 digits
    assert (np.abs(shares.mean(axis=1) - HISTOGRAM) < bound).all()


def test_failed_pairs_are_as_frequent_as_in_the_original(sample):
    """About 325 pairs of size 32 for each image, most of them because a direction can start no snake."""
    assert abs(sample[4].mean() - 325) < 4 * sample[4].std() * math.sqrt(2 / TARGET_IMAGES)


def test_the_label_is_a_fair_coin(sample):
    assert abs(sample[1].mean() - 0.5) < 4 * 0.5 / math.sqrt(len(sample[1]))


def test_the_distance_between_discs_tells_the_label_as_little_as_in_the_original(sample):
    """The original's own code, run for 10,962 images, has joined discs 0.58 +- 0.03 pixels further apart."""
    distance = np.hypot(*(sample[3][:, 0] - sample[3][:, 1]).T)
    zero, one = distance[sample[1] == 0], distance[sample[1] == 1]
    spread = math.sqrt(zero.var() / len(zero) + one.var() / len(one))
    assert abs(one.mean() - zero.mean() - 0.58) < 4 * spread
    right = max(((distance > bound) == sample[1]).mean() for bound in np.arange(2, 30, 0.5))
    assert right < 0.58
