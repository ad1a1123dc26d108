"""Which measurements may stand in one table and in one row of it, and what is said of those that may not."""

import pytest
from cost_samples import NO_SPREAD, write_costs

from lra import records
from lra.report import tables
from lra.report.growth import crossovers
from lra.report.series import settings

SHORT = (64, 128)


def built(root, title: str) -> list:
    return [t for t in tables.build(records.load(root)) if t.title[0].startswith(title)]


def costs(root, model="linear", factor=1.0, lengths=SHORT, **fields):
    write_costs(root, model, lambda n: factor * n, lengths=lengths, rule="batch", spread=NO_SPREAD, **fields)


def test_two_settings_of_a_mechanism_are_two_tables_named_by_the_command_line(tmp_path):
    costs(tmp_path, lengths=(64,), extra={"setting": "a"}, command="lra measure model=linear model.d_ff=16")
    costs(
        tmp_path, lengths=(128,), extra={"setting": "b"}, command="lra measure model=linear model.d_ff=1024"
    )
    found = built(tmp_path, "Time and memory of a step")
    assert [t.title[-1] for t in found] == ["model.d_ff=16", "model.d_ff=1024"]
    assert all("another setting" in t.warnings[0] for t in found)
    assert not built(tmp_path, "Step time (ms) by length")


def test_settings_that_no_command_line_tells_apart_go_by_their_digest(tmp_path):
    for setting in ("a1b2c3d4", "f6e5d4c3"):
        costs(tmp_path, extra={"setting": setting}, command="lra measure model=linear model.d_ff=16,1024")
    assert [t.title[-1] for t in built(tmp_path, "Step time")] == ["setting a1b2c3", "setting f6e5d4"]


def test_a_configuration_keeps_its_row_where_its_size_grows_with_length(tmp_path):
    for length in SHORT:
        costs(tmp_path, lengths=(length,), num_params=1000 * length)
        costs(tmp_path, lengths=(length,), num_params=2000 * length, own={"kernel": "relu"})
    (table,) = built(tmp_path, "Step time")
    assert [(row["mechanism"], row["0"], row["1"]) for row in table.rows] == [
        ("linear", "256", "512"),
        ("linear (kernel=relu)", "256", "512"),
    ]


@pytest.mark.parametrize("known", [True, False], ids=["setting on record", "not on record"])
def test_compiled_and_eager_runs_and_versions_of_torch_are_never_joined(known, tmp_path):
    for index, (compiled, torch) in enumerate([(True, "2.11"), (False, "2.11"), (False, "2.12")]):
        extra = {"compiled": compiled, "setting": f"{compiled}" if known else None}
        costs(tmp_path / str(index), factor=index + 1.0, torch=torch, extra=extra)
    titles = sorted(" ".join(t.title) for t in built(tmp_path, "Time and memory"))
    assert len(titles) == 3 == len(set(titles))
    endings = [title.rsplit("captured, ")[1] for title in titles]
    assert endings == ["compiled, packed", "packed torch 2.11", "packed torch 2.12"]
    values = [
        one.value(64, "step_ms")[0]
        for members in settings(records.load(tmp_path)).values()
        for one in members
    ]
    assert sorted(values) == pytest.approx([256.0, 512.0, 768.0])


def test_a_cell_that_could_not_be_compiled_stays_with_the_others_and_is_named(tmp_path):
    compiled = {"compiled": True, "setting": "asked"}
    costs(tmp_path, extra=compiled)
    costs(tmp_path, "nystrom", lengths=(64,), extra=compiled)
    costs(tmp_path, "nystrom", lengths=(128,), extra=compiled | {"compiled": False})
    note = "could not be compiled, run as they are: nystrom, train at 128"
    assert all(note in t.footnotes for t in tables.build(records.load(tmp_path)))
    assert len(built(tmp_path, "Time and memory")) == 1


def test_runs_that_do_not_say_their_setting_join_the_only_one_they_fit_and_are_counted(tmp_path):
    costs(tmp_path, extra={"compiled": False, "setting": "a"})
    costs(tmp_path, "fnet", extra={"compiled": False, "setting": None})
    (table,) = built(tmp_path, "Time and memory")
    assert "2 of 4 runs do not record their whole setting" in table.footnotes
    costs(tmp_path, "luna", extra={"compiled": False, "setting": "b"})
    assert len(built(tmp_path, "Time and memory")) == 3, "which of the two is not known"


def test_a_cell_measured_by_tokens_counts_among_those_of_the_same_batch(tmp_path):
    """`done` returns what `tokens=` measured when `batch_size=` asks for the same batch."""
    by_tokens = {"tokens": 256}
    costs(tmp_path, lengths=(64,), extra=by_tokens)
    costs(tmp_path, "softmax", 0.1, lengths=(64,), extra=by_tokens)
    for model, factor in (("linear", 1.0), ("softmax", 2.0)):
        costs(tmp_path, model, factor, lengths=(128, 256))
    found = {
        setting.rule: [s.lengths() for s in members]
        for setting, members in settings(records.load(tmp_path)).items()
    }
    assert found[("batch", 4)] == [[64, 128, 256]] * 2 and found[("tokens", 256)] == [[64]] * 2
    for length in SHORT:
        costs(tmp_path, "fnet", 9.0, lengths=(length,), extra={"tokens": 4 * length})
    joined = [s for k, m in settings(records.load(tmp_path)).items() if k.rule == ("batch", 4) for s in m]
    assert [one.lengths() for one in joined if one.mechanism == "fnet"] == [[64, 128]]
    (crossing,) = [
        c
        for c in crossovers(records.load(tmp_path))
        if (c.what, c.mechanism) == ("step_ms", "linear") and len(c.compared) > 1
    ]
    assert crossing.compared == (64, 128, 256) and 64 < crossing.length < 128


def test_one_mechanism_in_two_layouts_is_two_series(tmp_path):
    for layout, factor in (("packed", 1.0), ("padded", 3.0)):
        costs(tmp_path / layout, factor=factor, layout=layout)
    ((setting, members),) = settings(records.load(tmp_path)).items()
    assert sorted((one.label, round(one.value(64, "step_ms")[0])) for one in members) == [
        ("linear [packed]", 256),
        ("linear [padded]", 768),
    ]


def test_an_efficiency_preset_without_the_papers_batch_says_why_its_table_is_missing(tmp_path):
    costs(tmp_path, command="lra measure preset=efficiency batch_size=4")
    last = tables.build(records.load(tmp_path))[-1]
    assert any(note.startswith("no table beside the LRA paper: it takes") for note in last.footnotes)
