"""From the snakes of Pathfinder images to their pixels: two discs are added, the contrast is stretched.

As in `pathfinder_generator`, all that this file's compiled code uses is in it, or comes as an argument.
"""

import numpy as np

from lra.tasks.listops_generator import compiled


@compiled
def resized_pixel(total):
    """A sum of pixels times fixed-point coefficients, rounded and clipped to 0..255."""
    return max(0, min(255, (total + (1 << 21)) >> 22))


@compiled
def add_disc(t, picture, centre_y, centre_x):
    """Draw a disc into a picture. It is drawn finer and resized; only its surroundings are computed."""
    size, taps, reach = len(picture), t.disc_units.shape[1], np.int64(t.disc_radius)
    # Resizing spreads a fine pixel over taps / antialias pixels, so the disc fades to 0 within this distance.
    half = (reach + taps) // t.antialias + 1
    top, left = centre_y * t.antialias - reach, centre_x * t.antialias - reach
    first_x, end_x = max(0, centre_x - half), min(size, centre_x + half + 1)
    across = np.zeros((2 * reach + 1, size), np.int64)
    for row in range(2 * reach + 1):
        for x in range(first_x, end_x):
            total = 0
            for tap in range(taps):
                column = t.disc_starts[x] + tap - left
                if (column - reach) ** 2 + (row - reach) ** 2 <= t.disc_radius**2:
                    total += 255 * t.disc_units[x, tap]
            across[row, x] = resized_pixel(total)
    for y in range(max(0, centre_y - half), min(size, centre_y + half + 1)):
        for x in range(first_x, end_x):
            total = 0
            for tap in range(taps):
                row = t.disc_starts[y] + tap - top
                if 0 <= row <= 2 * reach:
                    total += t.disc_units[y, tap] * across[row, x]
            picture[y, x] = max(picture[y, x], np.uint8(resized_pixel(total)))


@compiled
def save(t, targets, distractors, discs, pixels):
    """Combine three pictures and stretch what comes out over 0..255."""
    size = len(pixels)
    light = np.empty((size, size))
    for y in range(size):
        for x in range(size):
            snakes = max(t.target_light[targets[y, x]], t.distractor_light[distractors[y, x]])
            light[y, x] = max(snakes, discs[y, x] / 255)
    low = light.min()
    scale = 255 / (light.max() - low)
    for y in range(size):
        for x in range(size):
            pixels[y, x] = np.uint8(np.floor(max(0.0, min(255.0, (light[y, x] - low) * scale)) + 0.5))


@compiled
def develop(t, snakes, discs):
    """Pixels uint8 [count, size, size] of a block; snakes: stamped target and shorter ones, uint8
    [count, 2, size, size]; discs: their centres, int64 [count, 2, (y, x)].
    """
    count, size = len(snakes), snakes.shape[2]
    pixels, lit = np.empty((count, size, size), np.uint8), np.empty((size, size), np.uint8)
    for index in range(count):
        lit[:] = 0
        for y, x in discs[index]:
            add_disc(t, lit, y, x)
        save(t, snakes[index, 0], snakes[index, 1], lit, pixels[index])
    return pixels
