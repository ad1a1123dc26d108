"""ListOps against an evaluator and a generator written here from the rules, and its target statistics.

Tolerances of statistics are 4 sd / sqrt(n) of the sample, plus the rounding of the target.
"""

import hashlib
import json
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.data.prepare import prepare
from lra.errors import UserError
from lra.tasks import listops as module
from lra.tasks import listops_generator as generator
from lra.tasks.listops import SYMBOLS, ListOps, evaluate

SMALL = {"num_train": 300, "num_val": 40, "num_test": 40}
DIGITS, OPERATORS = "0123456789", ["[MIN", "[MAX", "[MED", "[SM"]
LABELS = [0.167, 0.090, 0.078, 0.083, 0.091, 0.086, 0.078, 0.073, 0.088, 0.168]
LENGTHS = {1: 508, 5: 538, 10: 577, 25: 702, 50: 953, 75: 1309, 90: 1642, 95: 1801, 99: 1955}
ARGUMENTS = [0.1095, 0.1100, 0.1104, 0.1108, 0.1112, 0.1116, 0.1119, 0.1122, 0.1125]
ROOT_ARGUMENTS = [0.044, 0.065, 0.084, 0.101, 0.117, 0.131, 0.144, 0.155, 0.161]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path))
    return tmp_path


def value_of(symbols):
    """The value of an expression, by recursion and the statistics module."""

    def expression(position):
        if symbols[position] in DIGITS:
            return int(symbols[position]), position + 1
        operator, arguments, position = symbols[position], [], position + 1
        while symbols[position] != "]":
            argument, position = expression(position)
            arguments.append(argument)
        result = {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda values: int(statistics.median(values)),
            "[SM": lambda values: sum(values) % 10,
        }[operator](arguments)
        return result, position + 1

    value, end = expression(0)
    assert end == len(symbols)
    return value


def grow(rng, depth=1, max_depth=10, max_args=10):
    """A tree by the protocol's rules, its numbers from Python's generator."""
    if depth < max_depth and rng.random() <= 0.25:
        count = rng.randint(2, max_args)
        children = [grow(rng, depth + 1, max_depth, max_args) for _ in range(count)]
        return [rng.choice(OPERATORS), *(symbol for child in children for symbol in child), "]"]
    return [str(rng.randint(0, 9))]


def words(seed, attempt):
    """The documented random words of one attempt, in Python integers."""
    top, step = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(word):
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & top
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & top
        return word ^ (word >> 31)

    word = mix((mix((mix((seed + step) & top) + attempt) & top) + step) & top)
    while True:
        word = (word + step) & top
        yield mix(word)


def grow_from_words(stream, depth=1, max_depth=10, max_args=10):
    """A whole tree from the documented meaning of the words, without giving up early."""
    word = next(stream)
    is_operator = depth < max_depth and word % 4 == 0
    count = max_args - 1 if is_operator else 10
    high = word >> 32
    while (high * count) % 2**32 < 2**32 % count:
        high = next(stream) >> 32
    value = high * count // 2**32
    if not is_operator:
        return [str(value)]
    children = [grow_from_words(stream, depth + 1, max_depth, max_args) for _ in range(2 + value)]
    return [OPERATORS[word // 4 % 4], *(symbol for child in children for symbol in child), "]"]


def draw(count, length, *, seed=0, first=0, max_depth=10, max_args=10):
    flat, offsets, labels = generator.draw_block(
        np.uint64(seed), np.uint64(first), count, length // 4 + 1, length - 1, max_depth, max_args
    )
    rows = [[SYMBOLS[token - 1] for token in flat[a:b]] for a, b in zip(offsets, offsets[1:], strict=False)]
    return rows, labels.tolist()


def close(share, target, n, rounding):
    return abs(share - target) <= 4 * math.sqrt(target * (1 - target) / n) + rounding


trees = st.recursive(
    st.sampled_from(DIGITS).map(lambda digit: [digit]),
    lambda child: st.tuples(st.sampled_from(OPERATORS), st.lists(child, min_size=1, max_size=11)).map(
        lambda node: [node[0], *(symbol for part in node[1] for symbol in part), "]"]
    ),
    max_leaves=40,
)


def test_the_vocabulary_is_pinned():
    vocabulary = ListOps().vocabulary()
    assert len(vocabulary) == ListOps.vocab_size == 16 and vocabulary[0] == "<pad>"
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    assert digest == "4c4fcca5fd42f6dde614c9eb740d7d1f9c2941a1a4bd942fb251d68d63c3eb32"
    assert [SYMBOLS[i - 1] for i in (generator.MIN, generator.MAX, generator.MED, generator.SM)] == OPERATORS
    assert SYMBOLS[generator.CLOSE - 1] == "]"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 ]", 9),
        ("( ( ( [MAX 2 ) 9 ) ] )", 9),
        ("[MED 1 2 ]", 1),
        ("[MED 3 8 ]", 5),
        ("[MED 9 0 4 ]", 4),
        ("[SM 9 8 7 ]", 4),
        ("[MIN 4 [SM 5 5 ] 3 ]", 0),
    ],
)
def test_expressions_have_the_values_the_rules_give(expression, value):
    assert evaluate(expression) == value
    ids = [SYMBOLS.index(symbol) + 1 for symbol in expression.replace("(", "").replace(")", "").split()]
    assert evaluate(ids) == value


@pytest.mark.parametrize(
    "expression", ["", "[MAX 1 2", "[MAX ]", "1 2", "]", "[MAX 1 ] 2", "[FIRST 1 2 ]", "[SM 12 ]"]
)
def test_a_malformed_expression_is_refused(expression):
    with pytest.raises(UserError):
        evaluate(expression)


@pytest.mark.parametrize("expression", ["[MAX 1 2", "[MAX ]", "1 2", "]", "[MAX 1 ] 2", "[MAX [MIN 3 4"])
def test_the_compiled_evaluator_marks_a_malformed_expression(expression):
    ids = np.array([SYMBOLS.index(symbol) + 1 for symbol in expression.split()], np.uint8)
    assert generator.values(ids, np.array([0, len(ids)])).tolist() == [-1]


@settings(max_examples=300, deadline=None)
@given(st.lists(trees, min_size=1, max_size=3))
def test_both_evaluators_agree_with_an_independent_one(rows):
    expected = [value_of(row) for row in rows]
    assert [evaluate(row) for row in rows] == expected
    flat = np.array([SYMBOLS.index(symbol) + 1 for row in rows for symbol in row], np.uint8)
    assert generator.values(flat, np.cumsum([0, *map(len, rows)])).tolist() == expected


def test_the_random_words_are_those_of_splitmix64():
    # The first output of splitmix64 from state 0, as published with it.
    assert int(generator.mix(np.uint64(0x9E3779B97F4A7C15))) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(
    ("seed", "length", "depth", "arguments"), [(0, 32, 10, 10), (7, 200, 6, 5), (2**62, 90, 10, 7)]
)
def test_an_attempt_gives_the_documented_tree_and_only_whole_trees_are_rejected(
    seed, length, depth, arguments
):
    rows, labels = draw(1500, length, seed=seed, first=10**6, max_depth=depth, max_args=arguments)
    grown = [grow_from_words(words(seed, 10**6 + i), 1, depth, arguments) for i in range(1500)]
    kept = [tree for tree in grown if length / 4 < len(tree) < length]
    assert len(kept) > 10
    assert rows == kept
    assert labels == [value_of(tree) for tree in kept]


def test_trees_are_distributed_as_those_of_an_independent_generator():
    rng, slow = random.Random(1), []
    drawn = 0
    while len(slow) < 800:
        tree, drawn = grow(rng), drawn + 1
        if 100 < len(tree) < 400:
            slow.append(tree)
    fast, _ = draw(60_000, 400)
    assert close(len(fast) / 60_000, len(slow) / drawn, drawn, 4 * math.sqrt(0.05 / 60_000))
    for measure in (
        len,
        value_of,
        lambda tree: sum(symbol in OPERATORS for symbol in tree),
        lambda tree: tree.count("[SM"),
    ):
        a, b = [measure(tree) for tree in fast], [measure(tree) for tree in slow]
        spread = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        assert abs(statistics.mean(a) - statistics.mean(b)) < 4 * spread


def check_table(rows_lengths, labels, counted, n):
    """The whole table of target statistics, for n rows of the length 2,000."""
    assert abs(rows_lengths.mean() - 1034.8) <= 4 * rows_lengths.std() / math.sqrt(n) + 0.05
    # 0.003: the target quantiles are whole numbers and were measured on 200,000 trees themselves.
    for percent, target in LENGTHS.items():
        assert close((rows_lengths <= target).mean(), percent / 100, n, 0.003)
    assert rows_lengths.min() >= 501 and rows_lengths.max() <= 1999
    for label, target in enumerate(LABELS):
        assert close((labels == label).mean(), target, n, 0.0005)
    operators, digits = list(counted["operators"].values()), list(counted["digits"].values())
    num_operators = counted["operators per tree"]["mean"] * n
    assert all(close(share, 0.25, num_operators, 0) for share in operators) and len(operators) == 4
    # An operator has six arguments on average, and all but one of them are digits.
    assert all(close(share, 0.1, 5 * num_operators, 0) for share in digits) and len(digits) == 10
    # Numbers of arguments within a tree are not independent, as the tree must fit: the bound is loose.
    for share, target in zip(counted["arguments"].values(), ARGUMENTS, strict=True):
        assert close(share, target, num_operators / 4, 0.00005)
    for share, target in zip(counted["root arguments"].values(), ROOT_ARGUMENTS, strict=True):
        assert close(share, target, n, 0.0005)
    assert counted["levels of operators"].get("9", 0) > 0.999 and "10" not in counted["levels of operators"]
    assert abs(counted["operators per tree"]["mean"] - 147.2) <= 4 * 55.8 / math.sqrt(n) + 0.05
    assert abs(counted["operators per tree"]["sd"] - 55.8) <= 4 * 55.8 / math.sqrt(n)
    assert counted["wrong labels"] == 0


def test_a_sample_of_5000_trees_has_the_target_statistics():
    task = ListOps(num_train=5000, num_val=1, num_test=1)
    store = prepare(task, 2000)
    train = store.split("train")
    check_table(train.lengths, train.labels, task.statistics(train), 5000)
    made = store.manifest["generator"]
    assert close(made["accepted"] / made["attempts"], 0.0831, made["attempts"], 0.00005)


@pytest.mark.slow
def test_the_full_data_set_has_the_target_statistics():
    task = ListOps()
    store = prepare(task, 2000)
    train = store.split("train")
    check_table(train.lengths, train.labels, task.statistics(train), 96_000)
    assert (train.lengths.min(), train.lengths.max()) == (501, 1999)
    assert store.data_hash == "598cfddd44dd"


def test_splits_are_pinned_and_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 512)
    one = prepare(ListOps(**SMALL), 32, workers=1)
    hashes = {name: entry["sha256"] for name, entry in one.manifest["files"].items()}
    two = prepare(ListOps(**SMALL), 32, workers=2, force=True)
    assert {name: entry["sha256"] for name, entry in two.manifest["files"].items()} == hashes
    assert one.data_hash == two.data_hash == "c3466eef71c1"


def test_another_seed_gives_other_rows():
    a, b = prepare(ListOps(**SMALL), 32), prepare(ListOps(**SMALL, data_seed=1), 32)
    assert a.data_hash != b.data_hash and a.path != b.path


@pytest.mark.parametrize("length", [32, 33, 64, 127])
def test_lengths_lie_strictly_between_a_quarter_of_the_bound_and_the_bound(length):
    store = prepare(ListOps(**SMALL), length)
    lengths = np.concatenate([store.split(split).lengths for split in ("train", "val", "test")])
    assert (lengths > length / 4).all() and (lengths < length).all()
    assert lengths.max() >= length - 2 and lengths.min() <= length / 4 + 3


def test_equal_trees_are_kept_once_and_splits_are_disjoint(monkeypatch):
    plain = prepare(ListOps(**SMALL), 40)
    rows = [
        bytes(plain.split(s).row(i)[0]) for s in ("train", "val", "test") for i in range(len(plain.split(s)))
    ]
    assert len(set(rows)) == len(rows) == 380
    once = generator.draw_block
    monkeypatch.setattr(
        generator, "draw_block", lambda seed, first, *rest: once(seed, first // np.uint64(2), *rest)
    )
    # Every second block now starts in the middle of the one before, so many trees come twice.
    overlapping = prepare(ListOps(**SMALL), 40, force=True)
    assert overlapping.manifest["duplicates"] == {
        "within": {"train": 0, "val": 0, "test": 0},
        "between": {"train val": 0, "train test": 0, "val test": 0},
    }


@pytest.mark.parametrize(("length", "depth"), [(32, 10), (2000, 10), (4096, 12), (8192, 13), (32_768, 17)])
def test_depth_grows_only_above_the_length_of_lra(length, depth):
    assert ListOps().depth(length) == depth
    assert ListOps(max_depth=10).depth(length) == 10


def test_settings_that_give_no_trees_end_with_a_message(monkeypatch, root):
    monkeypatch.setattr(module, "PATIENCE", 1 << 13)
    with pytest.raises(UserError, match="too rare with max_depth=2 and max_args=3: 0 of 380 rows"):
        prepare(ListOps(max_depth=2, max_args=3, **SMALL), 64)
    assert not [path for path in root.iterdir() if path.is_dir()]


def test_validation_is_its_own_split():
    with pytest.raises(UserError, match="own validation split|validation split of its own"):
        ListOps(val="test").check()


def test_an_expression_is_shown_with_the_value_of_each_operator():
    task = ListOps()
    ids = np.array([SYMBOLS.index(symbol) + 1 for symbol in "[MAX 2 [MIN 4 7 ] 0 ]".split()])
    assert task.decode(ids, task.vocabulary()) == "[MAX 2 [MIN 4 7 ]=4 0 ]=4"


def test_a_long_expression_is_shown_as_an_indented_tree():
    task, (row, *_) = ListOps(), draw(400, 2000)[0]
    shown = task.decode(np.array([SYMBOLS.index(symbol) + 1 for symbol in row]), task.vocabulary())
    assert len(shown.splitlines()) > 10 and max(map(len, shown.splitlines())) <= 110
    assert shown.endswith(f"]={value_of(row)}")
    assert [part.split("=")[0] for part in shown.split()] == row
