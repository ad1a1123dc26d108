"""Where to write the names of points so that they cover neither markers nor each other; lengths in pixels."""

import math
from dataclasses import dataclass

ANGLES = [math.radians(degrees) for degrees in (0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 300, 240)]
DISTANCES = (0, 6, 14, 24, 38, 56, 80, 110)
ROUNDS = 4
DOUBT = 3.0  # a name is in doubt if another marker is not at least this much farther away than its own


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> "Box":
        """A box by its centre."""
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def overlap(self, other: "Box") -> float:
        """Area that both cover."""
        apart = self.right <= other.left or other.right <= self.left
        if apart or self.top <= other.bottom or other.top <= self.bottom:
            return 0.0
        width = min(self.right, other.right) - max(self.left, other.left)
        return width * (min(self.top, other.top) - max(self.bottom, other.bottom))

    def outside(self, frame: "Box") -> float:
        """Area that does not lie in `frame`."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(frame)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to a point."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


@dataclass(frozen=True)
class Spot:
    """A marker at x, y of some radius, and the size of the name it wants."""

    x: float
    y: float
    radius: float
    width: float
    height: float


@dataclass(frozen=True)
class Place:
    """The centre of a name, its distance from its marker, and whether another marker is about as near."""

    x: float
    y: float
    distance: float
    doubtful: bool


def place_labels(spots: list[Spot], obstacles: list[Box], frame: Box, *, gap: float) -> list[Place]:
    """A place for each name: as near to its marker as can be had without covering anything.

    Each name takes the cheapest of about a hundred places around its marker; a few rounds let the first
    ones move out of the way of the later ones. Deterministic.
    """
    boxes = [[_candidate(spot, angle, gap + d) for d in DISTANCES for angle in ANGLES] for spot in spots]
    distances = [[_distance(box, spot) for box in own] for own, spot in zip(boxes, spots, strict=True)]
    doubts = [
        [
            any(_distance(box, other) < d + DOUBT for other in spots if other is not spot)
            for box, d in zip(*pair, strict=True)
        ]
        for spot, *pair in zip(spots, boxes, distances, strict=True)
    ]
    fixed = [
        [
            4 * sum(box.overlap(o) for o in obstacles) + 20 * box.outside(frame) + d**1.2 + 70 * doubt
            for box, d, doubt in zip(*triple, strict=True)
        ]
        for triple in zip(boxes, distances, doubts, strict=True)
    ]
    chosen: list[int | None] = [None] * len(spots)
    for _ in range(ROUNDS):
        for index, own in enumerate(boxes):
            others = [boxes[i][c] for i, c in enumerate(chosen) if c is not None and i != index]
            costs = [fixed[index][k] + 12 * sum(box.overlap(o) for o in others) for k, box in enumerate(own)]
            chosen[index] = min(range(len(own)), key=costs.__getitem__)
    places = []
    for index, best in enumerate(chosen):
        box = boxes[index][best or 0]
        centre = (box.left + box.right) / 2, (box.bottom + box.top) / 2
        places.append(Place(*centre, distances[index][best or 0], doubts[index][best or 0]))
    return places


def stack(wanted: list[float], height: float, low: float, high: float) -> list[float]:
    """Centres of labels in one column between `low` and `high`, in the order of the ones they want.

    None overlaps another, and the sum of squares by which they miss what they want is the least possible.
    The column has to hold them all.
    """
    assert len(wanted) * height <= high - low + 1e-6, "a column too short for its labels"
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    blocks: list[list[float]] = []  # [sum, count] of wanted places, each less the height of what lies below
    for rank, index in enumerate(order):
        blocks.append([wanted[index] - rank * height, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    free = [total / count for total, count in blocks for _ in range(int(count))]
    last = high - height / 2 - (len(wanted) - 1) * height
    places = [0.0] * len(wanted)
    for rank, (index, place) in enumerate(zip(order, free, strict=True)):
        places[index] = min(max(place, low + height / 2), last) + rank * height
    return places


def _distance(box: Box, spot: Spot) -> float:
    """From a name to the rim of a marker, 0 if it lies on it."""
    return max(0.0, math.dist(box.nearest(spot.x, spot.y), (spot.x, spot.y)) - spot.radius)


def _candidate(spot: Spot, angle: float, distance: float) -> Box:
    """A box whose edge is `distance` away from the marker in a direction."""
    reach = spot.radius + distance
    dx, dy = math.cos(angle), math.sin(angle)
    x = spot.x + dx * reach + dx * spot.width / 2
    y = spot.y + dy * reach + dy * spot.height / 2
    return Box.around(x, y, spot.width, spot.height)
