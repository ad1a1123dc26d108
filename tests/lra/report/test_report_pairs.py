"""Pairs of rows: every pair once, the better row first, and only the verdict that its tests allow."""

import pytest
from report_samples import write_run

from lra import records
from lra.report import tables


def pairs(folder):
    return next(t for t in tables.build(records.load(folder), pairs=True) if t.title[0] == "Pairs of rows")


def write(folder, model, accuracy, seeds=3, **fields):
    for seed in range(seeds):
        write_run(folder, model, seed, accuracy, **fields)


def test_every_pair_stands_once_with_the_better_row_first(tmp_path):
    for model, accuracy in (("linear", 0.2), ("softmax", 0.4), ("identity", 0.3)):
        write(tmp_path, model, accuracy)
    table = pairs(tmp_path)
    assert [(line["row"], line["other"]) for line in table.data] == [
        ("softmax", "identity"),
        ("softmax", "linear"),
        ("identity", "linear"),  # a floor stands at the bottom of the table and may still be better
    ]
    for line in table.data:
        assert 0 < line["difference_low_points"] < line["difference_points"] < line["difference_high_points"]
        assert line["verdict"] == "told apart" and line["holm_p"] >= line["joint_p"]


def test_only_the_joint_test_decides(tmp_path):
    write(tmp_path, "linear", 0.40)
    write(tmp_path, "softmax", 0.41)
    (line,) = pairs(tmp_path).data
    assert line["num_seed_pairs"] == 9 and line["num_paired"] == 2000
    assert line["only_row"] - line["only_other"] == 9 * 0.01 * 2000
    assert line["mcnemar_p_smallest"] < 0.05 and line["permutation_p"] == 0.1
    assert line["verdict"] == ("told apart" if line["holm_p"] <= 0.05 else "tied")


def test_one_seed_is_compared_by_mcnemar_and_gets_no_verdict(tmp_path):
    write(tmp_path, "linear", 0.2, seeds=1)
    write(tmp_path, "softmax", 0.4, seeds=1)
    table = pairs(tmp_path)
    (row,) = table.rows
    assert row["mcnemar_p"] == "< 0.001" and row["difference"] == "+20.0"
    assert [row[key] for key in ("ci95", "permutation_p", "joint_p", "holm_p", "verdict")] == ["-"] * 5
    assert any(note.startswith("no verdict on 1 pair:") for note in table.footnotes)


def test_without_predictions_only_the_seeds_are_permuted(tmp_path):
    write(tmp_path, "linear", 0.2, kept=False)
    write(tmp_path, "softmax", 0.4, kept=False)
    (line,) = pairs(tmp_path).data
    assert line["permutation_p"] == line["permutation_p_least_possible"] == 0.1
    assert line["verdict"] is line["mcnemar_p_median"] is line["joint_p"] is None


def test_rows_of_other_test_examples_are_not_paired(tmp_path):
    write(tmp_path, "linear", 0.2)
    write(tmp_path, "softmax", 0.4, num_test=1000)
    (line,) = pairs(tmp_path).data
    assert line["num_seed_pairs"] is None and line["verdict"] is None


def test_a_table_of_one_row_has_no_pairs(tmp_path):
    write(tmp_path, "linear", 0.2)
    assert len(tables.build(records.load(tmp_path), pairs=True)) == 1


@pytest.mark.parametrize("by", [None, "task"])
def test_pairs_are_there_on_request_only(tmp_path, by):
    write(tmp_path, "linear", 0.2)
    write(tmp_path, "softmax", 0.4)
    for wanted in (False, True):
        found = tables.build(records.load(tmp_path), by, pairs=wanted)
        assert [t.title[0] == "Pairs of rows" for t in found] == [False] + [True] * wanted
