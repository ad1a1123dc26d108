"""Schedules of attention in blocks on a ring of units: generated, checked, and no longer than they must be.

The machine, after Yu and Fujita 2020, arXiv 2012.01114: m units on a one-way ring. A sequence is cut into n
blocks, n a multiple of m, and n / m of them are at home at each unit: queries, keys and values. In a step a
unit makes at most one block product (i, j): the scores of the queries of block i, at home there, against the
keys of block j, at home or visiting, and the values of j summed by them. At the end of a step a unit sends at
most one block of keys and values to the next unit, which has it from the next step on, and drops it unless it
is its own. A unit has room for 2 n / m visitors: those of this round and those of the next.

By kind, the products that are needed are
    full    all pairs (i, j)
    causal  the pairs with j <= i, since earlier tokens do not see later ones
    tied    one of (i, j) and (j, i), since queries are keys and scores symmetric. The product serves both
            blocks: what j gains while it visits travels with it, and the schedule ends when all is at home
In round r = 0, ..., m - 1 the visitors of a unit are the blocks at home r units before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

KINDS = ("full", "causal", "tied")
PAPER = {"tied": 0.25, "causal": 0.50}  # the share of work that the paper skips, "almost", as we read it

# u unit, a place of a block among those at home, b place of a visitor among those of its round


@dataclass(frozen=True)
class Step:
    """Products (unit, i, j) made at once, and the transfers (unit, block) at their end."""

    products: tuple[tuple[int, int, int], ...]
    transfers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """What every unit does in every step; `homes` are the blocks at home at each unit."""

    kind: str
    homes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.homes))


@dataclass(frozen=True)
class Skipped:
    """Shares of block products that are not made: of scores, and of scores and sums of values together."""

    scores: float
    work: float
    paper: float | None


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind '{kind}' of schedule; choose from: {', '.join(KINDS)}")


def check_sizes(num_blocks: int, num_units: int) -> None:
    if num_units < 1 or num_blocks < 1 or num_blocks % num_units:
        raise ValueError(
            f"a ring needs num_units >= 1 and num_blocks a multiple of it; got num_units={num_units}, "
            f"num_blocks={num_blocks}"
        )


def homes_of(num_blocks: int, num_units: int, kind: str = "full") -> tuple[tuple[int, ...], ...]:
    """Neighbouring blocks, or for kind=causal stripes that turn back, so that units have equal work.

    An odd block a unit is from the first of the sequence, where the work differs least.
    """
    check_kind(kind)
    check_sizes(num_blocks, num_units)
    each, m = num_blocks // num_units, num_units
    if kind != "causal":
        return tuple(tuple(range(u * each, (u + 1) * each)) for u in range(m))
    stripes = [list(range(m))] if each % 2 else []
    while len(stripes) < each:
        first = len(stripes) * m
        stripes += [list(range(first, first + m)), list(range(first + 2 * m - 1, first + m - 1, -1))]
    return tuple(tuple(stripe[u] for stripe in stripes) for u in range(m))


def tied_product_is_made(unit, distance: int, a, b, num_units: int):
    """Whether a unit makes the product (a, b) of kind=tied in the round `distance`; numbers or tensors.

    Two units meet twice, once at home of each (at once, half a ring apart): each time they make the products
    of every second field of the board of their blocks, which leaves no visitor without one.
    """
    if distance == 0:
        return (a >= b) & (unit >= 0)
    first = (2 * distance < num_units) | ((2 * distance == num_units) & (2 * unit < num_units))
    return ((a + b) % 2 == 0) == first


def pairs_of(unit: int, distance: int, num_blocks: int, num_units: int, kind: str) -> list[tuple[int, int]]:
    """The products (a, b) of one unit in the round `distance`, visitor by visitor."""
    each = num_blocks // num_units
    board = [(a, b) for b in range(each) for a in range(each)]
    if kind == "tied":
        return [(a, b) for a, b in board if tied_product_is_made(unit, distance, a, b, num_units)]
    if kind == "causal":
        homes = homes_of(num_blocks, num_units, kind)
        mine, theirs = homes[unit], homes[(unit - distance) % num_units]
        return [(a, b) for a, b in board if theirs[b] <= mine[a]]
    return board


def make_schedule(num_blocks: int, num_units: int, kind: str = "full") -> Schedule:
    """A schedule for any number of blocks that is a multiple of the units, round by round.

    It is as long as `lower_bound`, and so shortest, but for kind=causal with an odd number >= 3 of blocks a
    unit, where it is at most (num_units - 1) / 2 steps longer.
    """
    homes, m, steps = homes_of(num_blocks, num_units, kind), num_units, []
    each = num_blocks // m
    for distance in range(m):
        leave = m > 1 and (
            kind == "tied" or distance < m - 1
        )  # visitors of the last round go home, or nowhere
        products: dict[int, list[tuple[int, int, int]]] = {}
        transfers: dict[int, list[tuple[int, int]]] = {}
        for u in range(m):
            visitors = homes[(u - distance) % m]
            used = [-1] * each  # the last step in which a visitor is needed
            for step, (a, b) in enumerate(pairs_of(u, distance, num_blocks, m, kind)):
                products.setdefault(step, []).append((u, homes[u][a], visitors[b]))
                used[b] = step if distance else -1  # a block may leave home while it is used there
            step = -1
            for b in sorted(range(each), key=lambda b: used[b]) if leave else ():
                step = max(step + 1, used[b])
                transfers.setdefault(step, []).append((u, visitors[b]))
        for step in range(1 + max([*products, *transfers])):
            steps.append(Step(tuple(products.get(step, ())), tuple(transfers.get(step, ()))))
    return Schedule(kind, homes, tuple(steps))


def lower_bound(num_blocks: int, num_units: int, kind: str = "full") -> int:
    """Steps that no schedule can do without: the products shared by m units at one a step; those of the last
    block at its home; for kind=tied, where others may make these, a whole turn of the ring, since some
    product is made away from one home.
    """
    check_sizes(num_blocks, num_units)
    products, _ = count_products(num_blocks, kind)
    return max(ceil(products / num_units), num_units if kind == "tied" else num_blocks)


def check_schedule(schedule: Schedule) -> None:
    """Runs a schedule on the machine; ValueError at the first thing that it cannot do or leaves undone."""
    homes, m, n = schedule.homes, len(schedule.homes), schedule.num_blocks
    check_kind(schedule.kind)
    check_sizes(n, m)
    if sorted(sum(homes, ())) != list(range(n)) or len({len(blocks) for blocks in homes}) != 1:
        raise ValueError(f"homes do not hold each of {n} blocks once, equally many a unit: {homes}")
    visitors: list[set[int]] = [set() for _ in range(m)]
    gained: set[tuple[int, int]] = set()  # (unit, block): what a block gained on its way
    made: list[tuple[int, int]] = []
    for number, step in enumerate(schedule.steps):
        for what, units in (("product", step.products), ("transfer", step.transfers)):
            busy = [unit for unit, *_ in units]
            if not set(busy) <= set(range(m)):
                raise ValueError(f"step {number}: a {what} of a unit that is none of 0 to {m - 1}: {units}")
            if len(busy) != len(set(busy)):
                raise ValueError(f"step {number}: a unit has more than one {what}: {units}")
        for u, i, j in step.products:
            if i not in homes[u] or (j not in homes[u] and j not in visitors[u]):
                raise ValueError(f"step {number}: unit {u} has not both blocks of product ({i}, {j})")
            if schedule.kind == "tied" and j not in homes[u]:
                gained.add((u, j))
            made.append((max(i, j), min(i, j)) if schedule.kind == "tied" else (i, j))
        arrivals = []
        for u, block in step.transfers:
            if block not in homes[u] and block not in visitors[u]:
                raise ValueError(f"step {number}: unit {u} sends block {block}, which it has not")
            visitors[u].discard(block)
            following = (u + 1) % m
            if (u, block) in gained:
                gained.remove((u, block))
                if block not in homes[following]:
                    gained.add((following, block))
            if block not in homes[following]:
                arrivals.append((following, block))
        for u, block in arrivals:
            visitors[u].add(block)
        if (most := max(map(len, visitors))) > 2 * n // m:
            raise ValueError(f"step {number}: a unit has {most} visitors, and room for {2 * n // m}")
    needed = [(i, j) for i in range(n) for j in range(n) if schedule.kind == "full" or j <= i]
    if sorted(made) != needed:
        wrong = set(needed).symmetric_difference(made) or {pair for pair in made if made.count(pair) > 1}
        raise ValueError(f"these products are not made exactly once: {sorted(wrong)}")
    if gained:
        raise ValueError(f"at the end, what blocks gained is away from home: {sorted(gained)}")


def count_products(num_blocks: int, kind: str = "full") -> tuple[int, int]:
    """Block products of scores, and of sums of values, that a sequence of `num_blocks` real blocks needs."""
    check_kind(kind)
    n = num_blocks
    half = n * (n + 1) // 2
    return {"full": (n * n, n * n), "causal": (half, half), "tied": (half, n * n)}[kind]


def schedule_stats(
    lengths: Sequence[int], *, padded_length: int, num_blocks: int, kind: str = "full"
) -> Skipped:
    """What skipping saves over all pairs of all blocks, for sequences of these lengths padded to one.

    Blocks that are padding throughout are skipped sequence by sequence, as `ring_attention` skips them.
    """
    check_sizes(num_blocks, 1)
    if not lengths or not all(0 <= length <= padded_length for length in lengths) or padded_length < 1:
        raise ValueError(
            "schedule_stats needs at least one length, and each from 0 to a padded_length >= 1; got "
            f"lengths={list(lengths)}, padded_length={padded_length}"
        )
    size = ceil(padded_length / num_blocks)
    scores, values = zip(*(count_products(ceil(n / size), kind) for n in lengths), strict=True)
    total = len(lengths) * num_blocks**2
    work = 1 - (sum(scores) + sum(values)) / (2 * total)
    return Skipped(scores=1 - sum(scores) / total, work=work, paper=PAPER.get(kind))
