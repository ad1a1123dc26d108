"""Tables of growth, crossovers, parts of memory and the LRA paper's ratios, as users read them."""

import csv
import io
import os
from pathlib import Path

import pytest
from cost_samples import NO_SPREAD, write_costs

from lra import records
from lra.report import render, tables
from lra.report.cost_tables import cost_tables, crossover_text
from lra.report.efficiency import printed
from lra.report.growth import CROSSES, NEVER, Crossover

LENGTHS = (1000, 2000, 3000, 4000)
GOLDEN = Path(__file__).parent / "golden"
SUFFIXES = {"text": "txt", "latex": "tex"}


def find(root, title: str):
    """The only table whose title begins so, and its rows by mechanism."""
    (table,) = [t for t in tables.build(records.load(root)) if t.title[0].startswith(title)]
    return table, {row["mechanism"]: row for row in table.rows}


def crossover(state: str, **facts) -> Crossover:
    facts = {"compared": (1024, 4096, 16384, 65536)} | facts
    return Crossover("linear", "linear", "train", "step_ms", "softmax", state, **facts)


@pytest.fixture
def measured(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1e-3 * n**2, memory=lambda n: 1e-4 * n**2, oom=(65536,))
    write_costs(tmp_path, "linear", lambda n: 5.0 * n, spread=NO_SPREAD)
    write_costs(tmp_path, "identity", lambda n: 0.1 * n)
    return tmp_path


def test_growth_and_crossover_stand_below_the_measurements_with_floors_last(measured):
    growth, rows = find(measured, "Growth with length")
    assert [row["mechanism"] for row in growth.rows] == ["linear", "softmax", "identity"]
    assert rows["linear"]["train False"] == "1.00 ± 0.00" and rows["softmax"]["train False"] == "2.00 ± 0.00"
    assert "131,072 tokens a batch" in growth.title[-1]
    _, rows = find(measured, "Cheaper than fused softmax from")
    assert rows["linear"]["train step_ms"].startswith("5,000 (") and "softmax" not in rows
    assert rows["identity"]["train step_ms"] == "always"


@pytest.mark.parametrize("form", render.FORMATS)
def test_every_format_equals_its_golden_file(form, measured):
    rates = {
        "copy_bytes_per_s": 4e12,
        "matrix_flops_per_s": 7e14,
        "matrix_share": 0.25,
        "copy_share_at_least": 0.1,
    }
    text = dict(rule="batch", lengths=LENGTHS, batch=32, mode="train")
    write_costs(
        measured, "softmax", lambda n: 1e-3 * n**2, own={"kernel": "math"}, fixed=8.0, extra=rates, **text
    )
    write_costs(measured, "linformer", lambda n: 0.5 * n, oom=(4000,), extra={"largest_length": 3584}, **text)
    got = render.render(cost_tables(records.load(measured)), form, width=100)
    path = GOLDEN / f"cost.{SUFFIXES.get(form, form)}"
    if os.environ.get("LRA_UPDATE_GOLDEN"):
        path.write_text(got, encoding="utf-8")
    assert got == path.read_text(encoding="utf-8")


def test_csv_has_growth_and_crossovers_as_lines_of_their_own_kind(measured):
    lines = list(csv.DictReader(io.StringIO(render.render(tables.build(records.load(measured)), "csv"))))
    by_kind = {kind: [x for x in lines if x["kind"] == kind] for kind in ("measure", "growth", "crossover")}
    assert len(by_kind["measure"]) == 12, "three mechanisms at four lengths"
    (time,) = [x for x in by_kind["growth"] if x["label"] == "softmax" and x["what"] == "step_ms"]
    assert float(time["exponent"]) == pytest.approx(2.0) and time["tokens"] == "131072"
    (crossing,) = [x for x in by_kind["crossover"] if x["label"] == "linear" and x["what"] == "step_ms"]
    assert float(crossing["crossover_length"]) == pytest.approx(5000)
    assert by_kind["measure"][0]["activations_mib"] and by_kind["measure"][0]["weights_mib"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (crossover(CROSSES, length=2345.6, low=1999.9, high=3000.1), "2,350 (2,000 - 3,000)"),
        (crossover(CROSSES, length=2345.6, low=2000.0, high=3000.0, crossings=3), "2,350 (2,000 - 3,000) *"),
        (crossover(CROSSES, low=16384.0, high=65536.0), "between 16,384 and 65,536"),
        (crossover("always cheaper"), "always"),
        (crossover("always cheaper", high=1200.0), "always (or from 1,200)"),
        (crossover(NEVER, until=3100.0), "only up to 3,100"),
        (crossover(NEVER, low=50_000.0), "never (or from 50,000)"),
        (crossover(CROSSES, length=2345.6, low=1024.0, high=3000.1), "2,350 (1,024 - 3,000)"),
        (crossover(NEVER, ended="softmax: oom"), "not up to 65,536; softmax: oom beyond"),
        (crossover("always cheaper", compared=(1024, 4096)), "always; of 1,024 to 4,096"),
        (crossover("unknown"), "unknown"),
        (None, "-"),
    ],
)
def test_a_crossover_reads_as_one_phrase(found, text):
    assert crossover_text(found, ("1,024 to 65,536", "")) == text


def test_parts_of_memory_and_shares_name_the_rates_they_are_of(tmp_path):
    rates = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 7e14}
    shares = rates | {"matrix_share": 0.25, "copy_share_at_least": 0.125}
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, fixed=8.0, extra=shares)
    table, rows = find(tmp_path, "Peak memory in parts")
    assert (rows["linear"]["weights"], rows["linear"]["optimizer"]) == ("2.00", "6.00")
    assert (rows["linear"]["matrix_share"], rows["linear"]["copy_share_at_least"]) == ("25.0", "12.5")
    assert any("4,000 GB/s" in note and "700 TFLOP/s" in note for note in table.footnotes)


def test_a_cell_out_of_memory_names_the_largest_length_that_fits(tmp_path):
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, oom=(65536,), extra={"largest_length": 40960})
    table, _ = find(tmp_path, "Peak memory in parts")
    assert [row["largest_length"] for row in table.rows] == ["", "", "", "40,960"]


def test_a_search_that_ended_early_and_cells_without_parts_are_said(tmp_path):
    found = {"largest_length": 40960, "shortest_oom_length": 65536}
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, oom=(65536,), extra=found)
    write_costs(tmp_path, "fnet", lambda n: 1.0 * n, extra={"memory_mib": None})
    table, _ = find(tmp_path, "Peak memory in parts")
    assert table.rows[-1]["largest_length"] == ">= 40,960"
    assert any(note.startswith(">=: no longer length was tried") for note in table.footnotes)
    assert "not told here: 4 measurements whose records have no parts of memory" in table.footnotes


def test_parts_of_a_repeated_cell_are_those_of_its_last_run(tmp_path):
    for index, fixed in enumerate((8.0, 16.0)):
        write_costs(tmp_path / str(index), "linear", lambda n: 1.0 * n, fixed=fixed, lengths=(1024, 4096))
    table, _ = find(tmp_path, "Peak memory in parts")
    assert [row["weights"] for row in table.rows] == ["4.00", "4.00"]


def test_explicit_softmax_out_of_memory_is_not_said_of_the_mechanism(tmp_path):
    text = dict(rule="batch", lengths=LENGTHS, batch=32)
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n, own={"kernel": "math"}, oom=(4000,), **text)
    write_costs(tmp_path, "linformer", lambda n: 0.5 * n, **text)
    _, rows = find(tmp_path, "Efficiency beside the LRA paper")
    assert rows["linformer"]["speed 4000"] == "- (explicit: oom) / 5.50"
    assert rows["softmax"]["memory 4000"] == "oom / 1.00"


def test_the_efficiency_table_stands_beside_the_papers_ratios(tmp_path):
    text = dict(rule="batch", lengths=LENGTHS, batch=32)
    write_costs(tmp_path, "softmax", lambda n: 1e-3 * n**2, own={"kernel": "math"}, **text)
    write_costs(tmp_path, "softmax", lambda n: 5e-4 * n**2, **text)
    write_costs(tmp_path, "linformer", lambda n: 0.5 * n, memory=lambda n: 1e-3 * n, oom=(4000,), **text)
    table, rows = find(tmp_path, "Efficiency beside the LRA paper")
    assert table.rows[0]["mechanism"] == "softmax (kernel=math)"
    assert rows["softmax (kernel=math)"]["speed 1000"] == "1.00 / 1.00"
    assert rows["softmax"]["speed 4000"] == "2.00 / -", "the paper has no fused kernel"
    assert rows["linformer"]["speed 3000"] == "6.00 / 3.70"
    assert rows["linformer"]["memory 1000"] == "0.100 / 0.435"
    assert rows["linformer"]["speed 4000"] == "oom / 5.50"
    (line,) = [x for x in table.data if x["mechanism"] == "linformer" and x["length"] == 3000]
    assert line["speed_over_explicit"] == pytest.approx(6.0) and line["published_speed"] == 3.7


def test_without_explicit_softmax_there_is_no_efficiency_table(tmp_path):
    write_costs(tmp_path, "linformer", lambda n: 0.5 * n, rule="batch", lengths=LENGTHS, batch=32)
    assert not [t for t in tables.build(records.load(tmp_path)) if t.title[0].startswith("Efficiency")]


def test_published_ratios_are_those_of_the_paper():
    """Table 2 of arXiv 2011.04006: the Performer is 5.7 times as fast at 4K and takes 1.06 of 9.48 GB."""
    found = printed("performer", 4000)
    assert found.speed == 5.7 and found.memory == pytest.approx(1.06 / 9.48)
    assert printed("softmax", 4000).speed == 1.0 and printed("mamba", 4000).speed is None
    assert printed("performer", 4096).speed is None, "the paper measured 4,000"
