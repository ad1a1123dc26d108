"""Tables: golden files for each rendering, and the rules that keep numbers from being misread."""

import csv
import io
import os
from pathlib import Path

import pytest
from report_samples import CONDITIONS, write_failure, write_measure, write_run, write_small

from lra import records
from lra.errors import UserError
from lra.report import render, tables
from lra.report.cells import Table, number, p_text, si

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def without_growth(monkeypatch):
    """Tables of growth and crossovers have tests and golden files of their own."""
    monkeypatch.setattr(tables.cost_tables, "cost_tables", lambda frame: [])


def golden(name: str, got: str) -> None:
    """Compares with a committed file; LRA_UPDATE_GOLDEN=1 writes it."""
    path = GOLDEN / name
    if os.environ.get("LRA_UPDATE_GOLDEN"):
        path.write_text(got, encoding="utf-8")
    assert got == path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def frame(runs):
    return records.load(runs)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The few runs of `report_samples.write_small`."""
    root = tmp_path_factory.mktemp("small")
    write_small(root)
    return records.load(root)


@pytest.mark.parametrize(
    ("name", "by", "form", "width"),
    [
        ("wide.txt", None, "text", None),
        ("terminal_100.txt", None, "text", 100),
        ("terminal_80.txt", None, "text", 80),
        ("by_task.txt", "task", "text", 80),
        ("table.md", None, "md", None),
        ("table.csv", None, "csv", None),
    ],
)
def test_rendering_equals_golden_file(frame, name, by, form, width):
    golden(name, render.render(tables.build(frame, by), form, width=width))


@pytest.mark.parametrize(
    ("name", "form", "width"),
    [
        ("small.txt", "text", 120),
        ("small.md", "md", None),
        ("small.csv", "csv", None),
        ("small.tex", "latex", None),
        ("small.html", "html", None),
    ],
)
def test_tables_with_pairs_equal_golden_file(small, name, form, width):
    golden(name, render.render(tables.build(small, pairs=True), form, width=width))


@pytest.mark.parametrize("width", [78, 80, 100, 120, 200])
@pytest.mark.parametrize("by", ["length", "task"])
def test_no_line_is_wider_than_the_terminal(frame, width, by):
    lines = render.render(tables.build(frame, by), "text", width=width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_columns_that_do_not_fit_are_named(frame):
    text = render.render(tables.build(frame)[1:2], "text", width=80)
    assert "not shown at this width: state, FLOPs/step, params, tokens/s" in text
    assert "not shown" not in render.render(tables.build(frame), "text", width=None)


def by_title(found, start):
    return next(table for table in found if " ".join(table.title).startswith(start))


def row_of(table, mechanism):
    return next(row for row in table.rows if row["mechanism"] == mechanism)


def test_floors_stand_at_the_bottom_and_the_rest_is_sorted(frame):
    names = [row["mechanism"] for row in by_title(tables.build(frame), "ListOps (2,000").rows]
    assert names[:2] == ["nystrom", "softmax"]
    assert names[-3:] == ["reformer", "global_mean", "identity"]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("paper", "skyformer2021"),
        ("recipe_version", 2),
        ("precision", "fp32"),
        ("selection", "test"),
        ("layout", "padded"),
        ("device", "NVIDIA A100"),
        ("num_devices", 2),
        ("data_hash", "another"),
        ("data_variant", "another"),
        ("data_origin", "stand_in"),
        ("task", "text"),
        ("length", 1000),
    ],
)
def test_rows_under_different_conditions_are_never_ranked_together(tmp_path, key, other):
    write_run(tmp_path, "linear", 0, 0.3)
    write_run(tmp_path, "softmax", 0, 0.4, **{key: other})
    found = [table for table in tables.build(records.load(tmp_path)) if not table.matrix]
    assert [len(table.rows) for table in found] == [1, 1]
    assert found[0].title != found[1].title


def test_configurations_of_one_mechanism_are_labelled_by_what_differs(tmp_path):
    write_run(tmp_path, "nystrom", 0, 0.30)
    write_run(tmp_path, "nystrom", 0, 0.31, config_hash="b", extra={"own": {"num_landmarks": 32}})
    write_run(tmp_path, "linear", 0, 0.32)
    write_run(tmp_path, "linear", 0, 0.33, config_hash="c", batch_size=64)
    write_run(tmp_path, "luna", 0, 0.34)
    write_run(tmp_path, "luna", 0, 0.35, config_hash="dddddddddd")
    (table,) = tables.build(records.load(tmp_path))
    assert {row["mechanism"] for row in table.rows} == {
        "nystrom",
        "nystrom (num_landmarks=32)",
        "linear (batch_size=32)",
        "linear (batch_size=64)",
        "luna [luna-2]",
        "luna [dddddd]",
    }


def test_own_parameters_and_deviations_of_a_single_configuration_are_noted(tmp_path):
    write_run(tmp_path, "nystrom", 0, 0.3, extra={"own": {"num_landmarks": 32}}, deviations=["train.lr=0.1"])
    (table,) = tables.build(records.load(tmp_path))
    assert table.rows[0]["note"] == "1 seed: no verdict; num_landmarks=32"
    assert "all rows deviate from the paper: train.lr=0.1" in table.footnotes


def test_failed_cells_keep_their_row_with_counts_and_reasons(frame):
    row = row_of(by_title(tables.build(frame), "ListOps (2,000"), "reformer")
    assert row["n"] == "0" and row["accuracy"] == "diverged"
    assert "2 runs: diverged at step 812" in row["note"]
    assert "1 run: oom (needs 92.1 GiB" in row["note"]


def test_failure_that_fits_several_groups_keeps_its_own(tmp_path):
    write_run(tmp_path, "linear", 0, 0.3)
    write_run(tmp_path, "linear", 0, 0.3, device="cpu", config_hash="cpu")
    write_failure(tmp_path, "reformer", 0, "failed", "boom")
    found = tables.build(records.load(tmp_path))
    assert sorted(len(table.rows) for table in found) == [1, 1, 1]


def test_partly_failed_row_counts_only_what_ended_well(tmp_path):
    write_run(tmp_path, "linear", 0, 0.30, peak_mem_mib=100.0)
    write_run(tmp_path, "linear", 1, 0.32, peak_mem_mib=300.0)
    write_failure(
        tmp_path, "linear", 2, "failed", "CUDA error", config_hash="linear-2000", peak_mem_mib=9000.0
    )
    (table,) = tables.build(records.load(tmp_path))
    row = table.rows[0]
    assert (row["n"], row["accuracy"], row["peak_mem_mib"]) == ("2", "31.0 ± 1.4", "200")
    assert row["note"] == "1 run: failed (CUDA error)"
    assert table.data[0]["num_failed"] == 1


def test_a_seed_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", "linear", 0, 0.30)
    write_run(tmp_path / "b", "linear", 0, 0.32)
    (table,) = tables.build(records.load(tmp_path))
    assert table.rows[0]["n"] == "1" and table.rows[0]["accuracy"] == "30.0"
    assert "1 run of a seed already counted" in table.rows[0]["note"]


@pytest.mark.parametrize(("accuracy", "noted"), [(0.17, True), (0.1, True), (0.25, False)])
def test_at_majority_is_noted_if_the_interval_reaches_it(tmp_path, accuracy, noted):
    for seed in range(3):
        write_run(tmp_path, "linear", seed, accuracy)
    (table,) = tables.build(records.load(tmp_path))
    assert ("at majority" in table.rows[0]["note"]) == noted


def test_one_seed_is_marked_and_gets_no_letter(frame):
    table = by_title(tables.build(frame), "ListOps (2,000")
    row = row_of(table, "performer")
    assert row["ci95"].endswith("†") and row["accuracy"] == "31.8"
    assert "1 seed: no verdict" in row["note"]
    assert "no letter for want of a second seed: performer" in table.footnotes


def test_letters_mark_ties(frame):
    data = {row["label"]: row["letters"] for row in by_title(tables.build(frame), "ListOps (2,000").data}
    assert set(data["softmax"]) & set(data["luna"])
    assert set(data["linear"]) & set(data["identity"])
    assert not set(data["softmax"]) & set(data["linear"])


def test_missing_predictions_give_no_letters_and_say_so(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "linear", seed, 0.3, kept=False)
        write_run(tmp_path, "softmax", seed, 0.4, kept=False)
    (table,) = tables.build(records.load(tmp_path))
    assert table.footnotes[0] == "no letters for want of test predictions with labels: softmax, linear"


def test_predictions_that_contradict_the_record_are_not_paired(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "linear", seed, 0.3)
        write_run(tmp_path, "softmax", seed, 0.4, test_accuracy=0.5)
    (table,) = tables.build(records.load(tmp_path))
    assert any("agree with the recorded accuracy: softmax" in note for note in table.footnotes)


def test_published_numbers_stand_only_beside_the_papers_own_length(frame):
    found = tables.build(frame)
    assert row_of(by_title(found, "ListOps (2,000"), "softmax")["published"] == "37.10"
    assert "published" not in [column.key for column in by_title(found, "ListOps (1,000").columns]


def test_published_numbers_from_memory_are_flagged(frame):
    table = by_title(tables.build(frame), "Text (4,096")
    assert row_of(table, "luna")["published"] == "~65.78"
    assert any(note.startswith("~:") for note in table.footnotes)


def test_method_of_peak_memory_is_a_footnote(frame):
    assert "peak MiB: highest resident set size" in by_title(tables.build(frame), "Text (512").footnotes


def test_matrices_by_length_show_every_length(frame):
    table = by_title(tables.build(frame), "Accuracy (%) by length: ListOps")
    assert [column.title for column in table.columns] == ["mechanism", "1,000", "2,000"]
    assert table.rows[-1] == {"mechanism": "majority class", "0": "16.6", "1": "16.6"}
    assert row_of(table, "reformer") == {"mechanism": "reformer", "0": "", "1": "diverged"}


def test_one_seed_is_marked_in_matrices(frame):
    for by in ("length", "task"):
        table = by_title(tables.build(frame, by), "Accuracy (%) by")
        assert "31.8†" in row_of(table, "performer").values()
        assert "†: one seed" in table.footnotes


def test_measurements_show_oom_with_its_reason(frame):
    table = by_title(tables.build(frame), "Time and memory")
    row = next(r for r in table.rows if r["length"] == "16,384" and "math" in r["mechanism"])
    assert (row["status"], row["note"], row["step_ms"]) == ("oom", "out of memory at 139 GiB", "-")
    matrix = by_title(tables.build(frame), "Step time (ms) by length, train")
    assert row_of(matrix, "softmax (kernel=math)")["2"] == "oom"


def test_floors_stand_below_the_measurements_too(tmp_path):
    for model, step_ms in (("identity", 1.0), ("softmax", 9.0), ("linear", 3.0)):
        for length in (1024, 4096):
            write_measure(tmp_path, model, "train", length, step_ms)
    section, *matrices = tables.build(records.load(tmp_path))
    assert [row["mechanism"] for row in section.rows] == ["linear", "softmax", "identity"] * 2
    assert [[row["mechanism"] for row in m.rows][-1] for m in matrices] == ["identity"] * 2


def test_a_table_without_floors_says_which_are_missing(tmp_path):
    for model in ("linear", "softmax"):
        write_run(tmp_path, model, 0, 0.3)
    (table,) = tables.build(records.load(tmp_path))
    assert any("model=identity,global_mean" in note for note in table.footnotes)


def test_cells_of_another_number_of_seeds_than_usual_say_so(frame):
    table = by_title(tables.build(frame), "Accuracy (%) by length: ListOps")
    assert row_of(table, "nystrom")["1"] == "35.4 ± 0.3 (n=2)"
    assert row_of(table, "softmax")["1"] == "34.4 ± 0.3"
    assert "mean ± std over 3 seeds unless noted" in table.footnotes


def test_cost_columns_are_there_where_records_have_them(small):
    table = tables.build(small)[0]
    row = row_of(table, "linear")
    shown = [row[key] for key in ("params", "flops_per_step", "state_size", "step_ms", "tokens_per_s")]
    assert shown == ["200 k", "12.5 G", "2.11 k", "2.50", "4.20M"] and row["peak_mem_mib"] == "353"
    measured = next(t for t in tables.build(small) if t.title[0] == "Time and memory of a step")
    assert "flops_per_step" not in [column.key for column in measured.columns]


def test_csv_has_plain_numbers_and_every_row_once(frame):
    rows = list(csv.DictReader(io.StringIO(render.render(tables.build(frame), "csv"))))
    sections = [table for table in tables.build(frame) if not table.matrix]
    assert len(rows) == sum(len(table.rows) for table in sections)
    softmax = next(
        r for r in rows if r["label"] == "softmax" and r["length"] == "2000" and r["kind"] == "train"
    )
    assert softmax["published_percent"] == "37.1" and softmax["accuracy_percent"] == "34.4"
    assert float(softmax["ci95_low_percent"]) < 34.4 < float(softmax["ci95_high_percent"])


def test_csv_has_six_digits_of_any_p_value_and_no_rounding_noise():
    data = [{"holm_p": 1.23456789e-12, "mean": 36.4123456, "std": 3.4e-15, "none": None}]
    text = render.render([Table(("T",), [], [], [], data)], "csv")
    assert text.splitlines()[1] == "1.23457e-12,36.412346,0.0,"


def test_csv_of_rows_and_pairs_is_one_file_with_a_kind_per_line(small):
    rows = list(csv.DictReader(io.StringIO(render.render(tables.build(small, pairs=True), "csv"))))
    kinds = [row["kind"] for row in rows]
    assert kinds.count("train") == 6 and kinds.count("pair") == 10 and kinds.count("measure") == 4
    pair = next(row for row in rows if (row["row"], row["other"]) == ("softmax", "luna"))
    assert pair["accuracy_percent"] == "" and float(pair["difference_points"]) == pytest.approx(0.6)


def test_csv_by_task_has_the_same_rows(frame):
    by_task = render.render(tables.build(frame, "task"), "csv").splitlines()
    assert sorted(by_task) == sorted(render.render(tables.build(frame), "csv").splitlines())


def test_markdown_cells_cannot_break_the_table(tmp_path):
    write_failure(tmp_path, "reformer", 0, "failed", "a | b ~ c *d* <e>\nnext line")
    text = render.render(tables.build(records.load(tmp_path)), "md")
    assert r"a \| b \~ c \*d\* \<e> next line" in text


def test_unknown_format_and_arrangement_name_the_choices(frame):
    with pytest.raises(UserError, match="unknown table format 'xlsx'.*csv, html, latex, md, text"):
        render.render(tables.build(frame), "xlsx")
    with pytest.raises(UserError, match="did you mean 'task'.*length, task"):
        tables.build(frame, "tasks")


def test_a_label_names_only_the_deviations_that_tell_configurations_apart(tmp_path):
    write_run(tmp_path, "softmax", 0, 0.3, config_hash="a", deviations=["seeded", "train.lr=0.1"])
    write_run(tmp_path, "softmax", 1, 0.3, config_hash="b", deviations=["seeded"])
    (table,) = tables.build(records.load(tmp_path))
    assert {row["mechanism"] for row in table.rows} == {"softmax (train.lr=0.1)", "softmax"}
    assert "all rows deviate from the paper: seeded" in table.footnotes


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (842, "842"), (12_345, "12.3k"), (999_600, "1.00M"), (54.7e12, "54.7T")],
)
def test_large_numbers_read_with_three_digits_and_a_prefix(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0004, "< 0.001"), (0.0123, "0.012"), (0.35, "0.35"), (1.0, "1.00")]
)
def test_p_values_read_with_two_digits(value, text):
    assert p_text(value) == text


def test_a_matrix_marks_cells_of_which_a_seed_failed(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "softmax", seed, 0.4)
    write_run(tmp_path, "linear", 0, 0.4)
    write_failure(tmp_path, "linear", 1, "diverged", "at step 9", config_hash="linear-2000", **CONDITIONS)
    (table,) = tables.build(records.load(tmp_path), "task")
    cells = {row["mechanism"]: row["0"] for row in table.rows}
    assert cells["linear"].endswith("†‡") and "‡" not in cells["softmax"]
    (note,) = [note for note in table.footnotes if note.startswith("‡")]
    assert note.endswith("linear in ListOps 2,000: 1 diverged")


def test_numbers_below_a_thousandth_are_not_nought():
    assert [number(x) for x in (0.00024414, 0.001, 0.0, 2e-6)] == ["0.00024", "0.001", "0.000", "2.0e-06"]
