"""Schedules of a ring: valid at any size, as long as the bound, shortest by a solver that knows no bound."""

import itertools
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

import lra
from models.schedules import (
    KINDS,
    Schedule,
    Step,
    check_schedule,
    count_products,
    lower_bound,
    make_schedule,
    schedule_stats,
)


class Program:
    """A linear program in zero-one and unit-interval variables, named by tuples; built row by row."""

    def __init__(self):
        self.index, self.rows, self.low, self.high = {}, [], [], []

    def variable(self, *name):
        return self.index.setdefault(name, len(self.index))

    def require(self, terms, low, high=np.inf):
        """low <= sum of factor * variable <= high."""
        self.rows.append([(self.variable(*name), factor) for factor, name in terms])
        self.low.append(low)
        self.high.append(high)

    def is_feasible(self, whole=("product", "send", "carry")):
        entries = [(r, c, f) for r, row in enumerate(self.rows) for c, f in row]
        at, column, factor = (np.array(part) for part in zip(*entries, strict=True))
        matrix = coo_array((factor, (at, column)), shape=(len(self.rows), len(self.index))).tocsr()
        integrality = [name[0] in whole for name in self.index]
        found = milp(
            np.zeros(len(self.index)),
            constraints=LinearConstraint(matrix, self.low, self.high),
            integrality=integrality,
            bounds=Bounds(0, 1),
            options={"time_limit": 60},
        )
        assert found.status in (0, 2), found.message  # solved, or shown to have no solution
        return found.status == 0


def can_be_done(homes, kind, num_steps):
    """Whether the machine can do all that is needed in `num_steps` steps.

    Written for the machine alone: no rounds, no bound; visitors may stay, without limit, or leave copies.
    """
    m, n, program = len(homes), sum(map(len, homes)), Program()
    home = {block: u for u, blocks in enumerate(homes) for block in blocks}
    times, units, blocks = range(num_steps), range(m), range(n)
    needed = [(i, j) for i in blocks for j in blocks if kind == "full" or j <= i]
    ways = {(i, j): [(i, j)] for i, j in needed}  # (block at home, other block)
    if kind == "tied":
        ways = {(i, j): list({(i, j), (j, i)}) for i, j in needed}
    for options in ways.values():
        program.require([(1, ("product", t, i, j)) for t in times for i, j in options], 1, 1)
    for t, u in itertools.product(times, units):
        here = [(i, j) for options in ways.values() for i, j in options if home[i] == u]
        program.require([(1, ("product", t, i, j)) for i, j in here], 0, 1)
        program.require([(1, ("send", t, u, j)) for j in blocks], 0, 1)
    for t, u, j in itertools.product(times, units, blocks):
        if home[j] == u:
            continue
        there, before = ("there", t, u, j), (u - 1) % m
        if t == 0:
            program.require([(1, there)], 0, 0)
        else:
            sent = ("send", t - 1, before, j)
            program.require([(-1, there), (1, ("there", t - 1, u, j)), (1, sent)], 0)
        program.require([(1, there), (-1, ("send", t, u, j))], 0)
        here = [(i, j) for i in homes[u] if any((i, j) in options for options in ways.values())]
        for pair in here:
            program.require([(1, there), (-1, ("product", t, *pair))], 0)
        if kind == "tied":  # what j gains at u goes home with a block that is sent
            left, carry = ("left", t + 1, u, j), ("carry", t, u, j)
            program.require([(1, ("send", t, u, j)), (-1, carry)], 0)
            for source in ([("product", t, *pair) for pair in here], [("left", t, u, j)]):
                program.require([(1, left), (1, carry), *[(-1, name) for name in source]], 0)
            if home[j] != before:
                program.require([(1, left), (-1, ("carry", t, before, j))], 0)
            if t == times[-1]:
                program.require([(1, left)], 0, 0)
    return program.is_feasible()


def ways_to_live(num_blocks, num_units, kind):
    """The ways to spread blocks over units: one if blocks are alike, else all, up to a turn of the ring."""
    if kind != "causal":
        return [make_schedule(num_blocks, num_units, kind).homes]
    each, found = num_blocks // num_units, []

    def spread(rest, homes):
        if not rest:
            found.append(homes)
        for chosen in itertools.combinations(rest, each):
            if homes or 0 in chosen:  # the first block lives at unit 0
                spread([block for block in rest if block not in chosen], (*homes, chosen))

    spread(list(range(num_blocks)), ())
    return found


SMALL = [
    (kind, n, m)
    for kind, most in (("full", 8), ("causal", 6), ("tied", 8))
    for n in range(2, most + 1)
    for m in range(1, n + 1)
    if n % m == 0
]


@pytest.mark.parametrize(("kind", "num_blocks", "num_units"), SMALL)
def test_no_schedule_of_a_small_ring_is_shorter(kind, num_blocks, num_units):
    schedule = make_schedule(num_blocks, num_units, kind)
    for homes in ways_to_live(num_blocks, num_units, kind):
        assert not can_be_done(homes, kind, len(schedule) - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_blocks", "num_units"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4), (6, 3)]
)
def test_the_solver_finds_a_schedule_of_that_length(num_blocks, num_units, kind):
    schedule = make_schedule(num_blocks, num_units, kind)
    assert can_be_done(schedule.homes, kind, len(schedule))


@pytest.mark.parametrize("kind", KINDS)
@given(num_units=st.integers(1, 9), each=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_every_size_has_a_valid_schedule_as_long_as_the_bound(kind, num_units, each):
    schedule = make_schedule(num_units * each, num_units, kind)
    check_schedule(schedule)
    over = len(schedule) - lower_bound(num_units * each, num_units, kind)
    uneven = kind == "causal" and each % 2 == 1 and each > 1
    assert over == ((num_units - 1) // 2 if uneven else 0)


def test_neighbouring_blocks_at_home_would_make_a_causal_schedule_longer():
    homes = ((0, 1), (2, 3))
    assert len(make_schedule(4, 2, "causal")) == 5
    assert not can_be_done(homes, "causal", 6) and can_be_done(homes, "causal", 7)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_units_take_a_part_of_the_time_that_one_takes(kind):
    assert len(make_schedule(64, 1, kind)) == count_products(64, kind)[0]
    assert len(make_schedule(64, 8, kind)) == count_products(64, kind)[0] // 8


def test_a_ring_with_one_tied_block_a_unit_gains_no_time_by_symmetry():
    assert len(make_schedule(6, 6, "tied")) == len(make_schedule(6, 6, "full")) == 6
    assert len(make_schedule(12, 6, "tied")) == 13 < len(make_schedule(12, 6, "full")) == 24


VALID = make_schedule(6, 3, "tied")


def with_step(number, **changes):
    steps = list(VALID.steps)
    steps[number] = replace(steps[number], **changes)
    return replace(VALID, steps=tuple(steps))


FIRST = VALID.steps[0]
WRONG = {
    "not made exactly once": with_step(0, products=FIRST.products[1:]),
    "more than one product": with_step(0, products=(*FIRST.products, FIRST.products[0])),
    "more than one transfer": with_step(0, transfers=(*FIRST.transfers, (0, 1))),
    "has not both blocks": with_step(0, products=((0, 0, 5), *FIRST.products[1:])),
    "sends block 5, which it has not": with_step(0, transfers=((0, 5), *FIRST.transfers[1:])),
    "away from home": with_step(len(VALID) - 1, transfers=()),
    "each of 6 blocks once": replace(VALID, homes=((0, 1), (2, 3), (4, 4))),
    "exactly once": replace(VALID, steps=(*VALID.steps, Step(((0, 0, 0),), ()))),
    "equally many a unit": replace(VALID, homes=((0, 1, 2), (3, 4), (5,))),
    "unknown kind 'masked'": replace(VALID, kind="masked"),
    "a product of a unit that is none of 0 to 2": with_step(0, products=((3, 0, 0), *FIRST.products)),
    "a transfer of a unit that is none of 0 to 2": with_step(0, transfers=((3, 0), *FIRST.transfers)),
}


@pytest.mark.parametrize("message", WRONG)
def test_the_check_refuses(message):
    check_schedule(VALID)
    with pytest.raises(ValueError, match=message):
        check_schedule(WRONG[message])


def test_the_check_refuses_a_second_product_under_a_negative_unit_number():
    valid = make_schedule(4, 2)
    first, second, *rest = valid.steps
    both = (*first.products, *((u - 2, i, j) for u, i, j in second.products))
    steps = (replace(first, products=both), replace(second, products=()), *rest)
    with pytest.raises(ValueError, match="a product of a unit that is none of 0 to 1"):
        check_schedule(replace(valid, steps=steps))
    sent = replace(first, transfers=tuple((u - 2, block) for u, block in first.transfers))
    with pytest.raises(ValueError, match="a transfer of a unit that is none of 0 to 1"):
        check_schedule(replace(valid, steps=(sent, *valid.steps[1:])))


def test_the_check_refuses_products_where_the_keys_are_and_not_the_queries():
    steps = (Step(((0, 1, 0), (1, 0, 1)), ((0, 0), (1, 1))), Step(((0, 1, 1), (1, 0, 0)), ()))
    with pytest.raises(ValueError, match="step 0: unit 0 has not both blocks of product \\(1, 0\\)"):
        check_schedule(Schedule("full", ((0,), (1,)), steps))


def test_the_check_refuses_a_block_that_carries_what_it_gained_halfway_home():
    valid = make_schedule(4, 4, "tied")
    assert not valid.steps[-1].products  # no block gains in the last round: it only travels
    with pytest.raises(ValueError, match="what blocks gained is away from home: .*(0, 1)"):
        check_schedule(replace(valid, steps=(*valid.steps[:-1], Step((), ()))))


def test_the_check_refuses_a_causal_product_with_its_sides_swapped():
    valid = make_schedule(4, 2, "causal")
    swapped = [
        replace(
            step,
            products=tuple(
                (u, j, i) if {i, j} <= set(valid.homes[u]) else (u, i, j) for u, i, j in step.products
            ),
        )
        for step in valid.steps
    ]
    with pytest.raises(ValueError, match="not made exactly once"):
        check_schedule(replace(valid, steps=tuple(swapped)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_blocks", "num_units"), [(4, 1), (4, 2), (9, 3), (4, 4)])
def test_no_block_is_sent_that_nobody_waits_for(kind, num_blocks, num_units):
    sent = sum(len(step.transfers) for step in make_schedule(num_blocks, num_units, kind).steps)
    turn = num_units if kind == "tied" and num_units > 1 else num_units - 1  # tied blocks go all the way home
    assert sent == turn * num_blocks


def test_the_check_refuses_more_visitors_than_there_is_room_for():
    transfers = [((3, 3), (2, 2), (1, 1)), ((3, 2), (2, 1)), ((3, 1),)]  # all to unit 0, which keeps them
    hoard = replace(make_schedule(4, 4), steps=tuple(Step((), sent) for sent in transfers))
    with pytest.raises(ValueError, match="step 2: a unit has 3 visitors, and room for 2"):
        check_schedule(hoard)


def test_shares_of_work_skipped_approach_the_25_and_50_percent_of_the_paper():
    for kind, paper in (("tied", 0.25), ("causal", 0.50)):
        shares = [schedule_stats([n], padded_length=n, num_blocks=n, kind=kind) for n in (2, 8, 64, 1024)]
        assert [s.paper for s in shares] == [paper] * 4
        gaps = [paper - s.work for s in shares]
        assert gaps == pytest.approx([paper / n for n in (2, 8, 64, 1024)])
    assert schedule_stats([8], padded_length=8, num_blocks=8).work == 0


def test_padding_is_skipped_for_each_sequence_and_beside_the_mirrored_half():
    full = schedule_stats([8, 4], padded_length=8, num_blocks=4)
    assert full.scores == full.work == pytest.approx(1 - (16 + 4) / 32) and full.paper is None
    tied = schedule_stats([8, 4], padded_length=8, num_blocks=4, kind="tied")
    assert tied.scores == pytest.approx(1 - (10 + 3) / 32)
    assert tied.work == pytest.approx(1 - (10 + 3 + 16 + 4) / 64)
    assert schedule_stats([5], padded_length=8, num_blocks=4).scores == pytest.approx(1 - 9 / 16)  # 3 blocks


def test_blocks_have_the_size_that_covers_the_padded_length():
    skipped = schedule_stats([7], padded_length=10, num_blocks=4)  # blocks of 3, 3, 3 and 1 tokens
    assert skipped.scores == pytest.approx(1 - 9 / 16)


@pytest.mark.parametrize(
    ("lengths", "own", "message"),
    [
        ([], {}, "at least one length"),
        ([4, 11], {}, "each from 0 to a padded_length >= 1; got lengths=.4, 11., padded_length=10"),
        ([-1], {}, "each from 0 to"),
        ([0], {"padded_length": 0}, "padded_length >= 1"),
        ([4], {"num_blocks": 0}, "num_blocks a multiple of it; got num_units=1, num_blocks=0"),
        ([4], {"kind": "masked"}, "unknown kind 'masked'"),
    ],
)
def test_statistics_of_nothing_or_of_the_impossible_are_refused(lengths, own, message):
    with pytest.raises(ValueError, match=message):
        schedule_stats(lengths, **{"padded_length": 10, "num_blocks": 4, **own})


@pytest.mark.parametrize(("num_blocks", "num_units"), [(0, 1), (5, 2), (4, 0)])
def test_sizes_that_make_no_sense_are_refused(num_blocks, num_units):
    with pytest.raises(ValueError, match="a multiple of it"):
        make_schedule(num_blocks, num_units)


def test_the_results_file_says_what_the_function_says(capsys):
    root = Path(lra.__file__).resolve().parents[1]
    runpy.run_path(str(root / "scripts" / "ring_skipped.py"), run_name="__main__")
    assert (root / "results" / "mechanisms" / "ring.md").read_text() == capsys.readouterr().out


def test_unknown_kind_is_refused_with_the_choices():
    for function in (make_schedule, lower_bound):
        with pytest.raises(ValueError, match="unknown kind 'masked'.*full, causal, tied"):
            function(4, 2, "masked")
