"""What tables may not do: rank unequal rows in silence, average by halves, judge a number too soon."""

import pytest
from report_samples import write_failure, write_measure, write_run

from lra import records
from lra.report import tables, verdicts
from lra.report.averages import FIVE
from lra.report.groups import train_groups
from lra.report.published import Cell
from lra.report.stats import summarise

LENGTHS = dict(listops=2000, text=4096, retrieval=4000, image=1024, pathfinder32=1024, pathx=16384)
SIX = "6 tasks, failed Path-X as 50"


def build(folder, by=None):
    return tables.build(records.load(folder), by)


def row_of(table, mechanism):
    return next(row for row in table.rows if row["mechanism"] == mechanism)


# Warnings.


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("paper", "skyformer2021", "another recipe (skyformer2021)"),
        ("recipe_version", 2, "another recipe (nystromformer2021 version 2)"),
        ("precision", "fp32", "another precision (fp32)"),
        ("selection", "test", "another selection rule (test)"),
        ("data_origin", "stand_in", "another data"),
        ("data_hash", "f00", "another data"),
    ],
)
def test_tables_of_one_task_under_other_conditions_warn_of_each_other(tmp_path, key, value, says):
    write_run(tmp_path, "linear", 0, 0.3)
    write_run(tmp_path, "softmax", 0, 0.4, **{key: value})
    first, second = sorted(build(tmp_path), key=lambda table: table.rows[0]["mechanism"])
    assert any(says in warning and "rank no rows" in warning for warning in first.warnings)
    assert any("rank no rows" in warning for warning in second.warnings)


@pytest.mark.parametrize(("key", "value"), [("task", "text"), ("length", 1000), ("device", "NVIDIA A100")])
def test_tables_of_different_tasks_or_devices_need_no_warning(tmp_path, key, value):
    write_run(tmp_path, "linear", 0, 0.3, majority_accuracy=None)
    write_run(tmp_path, "softmax", 0, 0.4, **{key: value})
    assert [table.warnings for table in build(tmp_path) if not table.matrix] == [[], []]


def test_matrices_by_task_under_two_recipes_warn(tmp_path):
    write_run(tmp_path, "linear", 0, 0.3)
    write_run(tmp_path, "linear", 0, 0.4, paper="skyformer2021", config_hash="other")
    for table in build(tmp_path, "task"):
        assert any("under another recipe" in warning for warning in table.warnings)


def test_columns_of_one_task_with_different_data_warn(tmp_path):
    write_run(tmp_path, "linear", 0, 0.3)
    write_run(tmp_path, "linear", 0, 0.4, data_hash="another", config_hash="other")
    (table,) = build(tmp_path, "task")
    assert "ListOps 2,000 [anothe], ListOps 2,000 [listop] hold different data" in table.warnings[0]


def test_rows_that_ran_with_other_settings_than_the_rest_are_named(tmp_path):
    shared = "seeded (paper: not)"
    write_run(tmp_path, "linear", 0, 0.3, deviations=[shared])
    write_run(tmp_path, "softmax", 0, 0.4, deviations=[shared, "train.num_steps=50 (recipe: 5000)"])
    (table,) = build(tmp_path)
    assert table.warnings == ["rows of different settings stand together: softmax has train.num_steps=50"]


def test_settings_that_all_rows_share_and_a_mechanisms_own_parameters_are_no_warning(tmp_path):
    for model, own in (("linear", {}), ("nystrom", {"num_landmarks": 32})):
        named = [f"model.{key}={value} (recipe: 64)" for key, value in own.items()]
        write_run(tmp_path, model, 0, 0.3, deviations=["train.lr=0.1", *named], extra={"own": own})
    (table,) = build(tmp_path)
    assert table.warnings == []


@pytest.mark.parametrize(("params", "warned"), [(220_000, False), (221_000, True), (100_000, False)])
def test_more_than_ten_percent_more_parameters_than_softmax_is_a_warning(tmp_path, params, warned):
    write_run(tmp_path, "softmax", 0, 0.4)
    write_run(tmp_path, "luna", 0, 0.4, num_params=params)
    (table,) = build(tmp_path)
    expected = ["more than 10 % more parameters than softmax (200 k): luna 221 k (+10 %)"]
    assert table.warnings == (expected if warned else [])


def test_without_softmax_the_median_row_is_the_baseline_and_floors_do_not_count(tmp_path):
    for model, params in (("linear", 200_000), ("luna", 210_000), ("mega", 400_000), ("identity", 9_000)):
        write_run(tmp_path, model, 0, 0.3, num_params=params)
    (table,) = build(tmp_path)
    assert table.warnings == [
        "more than 10 % more parameters than the median row (210 k): mega 400 k (+90 %)"
    ]


def test_parameters_of_measurements_are_compared_at_one_length(tmp_path):
    for length in (1024, 4096):
        write_measure(tmp_path, "softmax", "train", length, 2.0, num_params=100_000 + length)
        math = dict(config_hash="m", extra={"mode": "train", "own": {"kernel": "math"}}, num_params=100_000)
        write_measure(tmp_path, "softmax", "train", length, 2.0, **math)
        size = 100_000 + 40_000 * (length == 4096)
        write_measure(tmp_path, "linformer", "train", length, 1.0, num_params=size)
    found = next(t for t in build(tmp_path) if t.title[0] == "Time and memory of a step")
    assert found.warnings == [
        "train at 4,096: more than 10 % more parameters than softmax (104 k): linformer 140 k (+34 %)"
    ]


@pytest.mark.parametrize(("kernel", "lacks"), [({}, "math"), ({"kernel": "math"}, "fused")])
def test_speed_beside_one_kernel_of_softmax_alone_is_a_warning(tmp_path, kernel, lacks):
    for length in (1024, 4096):
        write_measure(tmp_path, "linear", "train", length, 1.0)
        write_measure(tmp_path, "softmax", "train", length, 2.0, extra={"mode": "train", "own": kernel})
    warned = [t for t in build(tmp_path) if any(f"measure model.kernel={lacks} too" in w for w in t.warnings)]
    assert len(warned) == 3


# Averages.


def write_tasks(folder, model, tasks=FIVE, accuracy=0.6, seeds=2, **fields):
    for place, task in enumerate(tasks):
        for seed in range(seeds):
            known = dict(task=task, length=LENGTHS[task], num_test=1000, kept=False) | fields
            write_run(folder, model, seed, accuracy + 0.01 * place + 0.02 * seed, **known)


def average(folder, name):
    (table,) = build(folder, "task")
    cells = {row["mechanism"]: row.get(name) for row in table.rows}
    return cells, [note for note in table.footnotes if note.startswith(name)]


def test_average_of_five_tasks_is_named_and_spreads_over_seeds(tmp_path):
    write_tasks(tmp_path, "linear")
    write_tasks(tmp_path, "luna", tasks=FIVE[:4])
    cells, notes = average(tmp_path, "5 tasks")
    assert cells["linear"] == "63.0 ± 1.4" and cells["luna"] == ""
    assert notes == [
        "5 tasks: mean over ListOps, Text, Retrieval, Image, Pathfinder, for rows that have them all"
    ]


def test_there_is_no_average_over_the_tasks_that_happen_to_be_there(tmp_path):
    write_tasks(tmp_path, "linear", tasks=FIVE[:4])
    (table,) = build(tmp_path, "task")
    assert [column.title for column in table.columns][1:] == [
        "ListOps 2,000",
        "Text 4,096",
        "Retrieval 4,000",
        "Image 1,024",
    ]


def test_a_task_at_another_length_is_not_the_papers_task(tmp_path):
    write_tasks(tmp_path, "linear", tasks=FIVE[1:])
    write_tasks(tmp_path, "linear", tasks=FIVE[:1], length=512)
    assert average(tmp_path, "5 tasks")[0] == {"linear": None, "majority class": None}


def test_a_task_that_stands_twice_gives_no_average_and_says_why(tmp_path):
    write_tasks(tmp_path, "linear")
    write_tasks(tmp_path, "linear", tasks=("text",), length=4000)
    (table,) = build(tmp_path, "task")
    assert "5 tasks" not in table.rows[0]
    assert "no average over 5 tasks: Text stands here more than once" in table.footnotes


def test_tasks_of_two_recipes_make_no_average(tmp_path):
    write_tasks(tmp_path, "linear", tasks=FIVE[:3])
    write_tasks(tmp_path, "linear", tasks=FIVE[3:], paper="skyformer2021")
    assert all("5 tasks" not in row for table in build(tmp_path, "task") for row in table.rows)


def test_data_of_several_origins_are_named_below_an_average(tmp_path):
    write_tasks(tmp_path, "linear", tasks=FIVE[:4])
    write_tasks(tmp_path, "linear", tasks=FIVE[4:], data_origin="lossy_copy")
    assert average(tmp_path, "5 tasks")[1][0].endswith("data: regenerated, lossy copy")


@pytest.mark.parametrize(
    ("status", "cell"), [("oom", "60.0"), ("diverged", "60.0"), ("interrupted", ""), (None, "")]
)
def test_a_failed_path_x_counts_as_fifty_and_a_missing_one_does_not(tmp_path, status, cell):
    write_tasks(tmp_path, "linear", accuracy=0.6, seeds=1)
    write_tasks(tmp_path, "s4", tasks=(*FIVE, "pathx"), accuracy=0.8, seeds=1)
    if status:
        write_failure(tmp_path, "linear", 0, status, "no", task="pathx", length=16384)
    cells, notes = average(tmp_path, SIX)
    assert cells["s4"] == "82.5"
    assert cells["linear"] == (f"{(5 * 62 + 50) / 6:.1f}" if cell else "")
    assert ("Path-X counts as 50 for linear" in notes[0]) == bool(cell)


# Verdicts.


def cell(value=37.1, **flags):
    known = dict(failed=False, recalled=False, copied=False, mechanism="X", source="P", table="T", note="")
    return Cell(value, **(known | flags))


@pytest.mark.parametrize(
    ("scores", "origin", "changed", "expected"),
    [
        ([0.37, 0.371, 0.372], "original", False, "reproduced"),
        ([0.37, 0.371, 0.372], "regenerated", False, "consistent"),
        ([0.37, 0.371, 0.372], "lossy_copy", False, "not comparable"),
        ([0.37, 0.371, 0.372], "stand_in", False, "not comparable"),
        ([0.37, 0.371, 0.372], None, False, "not comparable"),
        ([0.37, 0.371, 0.372], "original", True, "not comparable"),
        ([0.37], "original", False, ""),
        ([0.50], "original", False, ""),
        ([0.37, 0.372], "original", False, ""),
        ([0.500, 0.501], "original", False, "higher"),
        ([0.25, 0.251, 0.252], "regenerated", False, "lower"),
        ([0.45, 0.451, 0.452], "original", False, "higher"),
        ([0.379, 0.379, 0.379], "original", False, "reproduced"),  # outside the interval, within a point
        ([0.381, 0.381, 0.381], "original", False, "reproduced"),  # just a point: the edge belongs to it
        ([0.30, 0.37, 0.50], "original", False, "reproduced"),  # 1.9 points off, inside a wide interval
    ],
)
def test_verdicts_respect_origin_seeds_and_settings(scores, origin, changed, expected):
    summary = summarise(scores, 100_000)
    assert verdicts.verdict(summary, cell(), origin=origin, changed=changed) == expected


def test_the_edge_of_the_tolerance_is_the_same_wherever_it_lies():
    for tenths in range(300, 900):
        summary = summarise([(tenths + 10) / 1000] * 3, 10**9)
        got = verdicts.verdict(summary, cell(tenths / 10), origin="original", changed=False)
        assert got == "reproduced", tenths


def test_where_nothing_was_printed_or_learned_there_is_no_verdict():
    summary = summarise([0.37, 0.371, 0.372], 2000)
    for printed in (None, cell(None, failed=True)):
        assert verdicts.verdict(summary, printed, origin="original", changed=False) == ""
    assert verdicts.verdict(summarise([], None), cell(), origin="original", changed=False) == ""


def test_what_a_recipe_does_otherwise_is_no_change_of_its_settings():
    assert not verdicts.changed(["seeded (paper: not)", "val = a tenth of train"])
    assert verdicts.changed(["seeded (paper: not)", "train.lr=0.1 (recipe: 0.01)"])


def test_verdicts_stand_in_the_table_with_their_meaning(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "softmax", seed, 0.371)
        write_run(tmp_path, "linear", seed, 0.2)
    (table,) = build(tmp_path)
    assert row_of(table, "softmax")["verdict"] == "consistent" and row_of(table, "linear")["verdict"] == ""
    assert any(note.startswith("verdict: ") for note in table.footnotes)
    assert [line["verdict"] for line in table.data] == ["consistent", None]


# Letters and their tests.


def test_tests_of_pairs_are_those_behind_the_letters(tmp_path):
    for model, accuracy in (("linear", 0.2), ("softmax", 0.4), ("luna", 0.405)):
        for seed in range(3):
            write_run(tmp_path, model, seed, accuracy)
    (group,) = train_groups(records.load(tmp_path))
    letters = {row.label: set(row.letters) for row in group.rows}
    assert len(group.tests) == 3
    for (first, second), (_, holm_p) in group.tests.items():
        assert bool(letters[first] & letters[second]) == (holm_p > 0.05)
