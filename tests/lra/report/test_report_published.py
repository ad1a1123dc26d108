"""Published numbers: found by our names, flagged where they are not first hand."""

import pytest

from lra.report.published import PAPERS, facts, lookup, published


@pytest.mark.parametrize(
    ("paper", "task", "mechanism", "expected"),
    [
        ("nystromformer2021", "listops", "softmax", 37.10),
        ("nystromformer2021", "listops", "nystrom", 37.15),
        ("nystromformer2021", "pathfinder32", "linformer", 67.60),
        ("nystromformer2021", "avg", "performer", None),
        ("nystromformer2021_released", "text", "nystrom", 65.52),
        ("lra2021", "text", "linear", 65.90),
        ("lra2021", "listops", "local", 15.82),
        ("skyformer2021", "text", "softmax", 61.95),
        ("luna2021", "listops", "luna", 37.98),
        ("luna2021", "listops", "Luna-16", 37.43),
        ("mega2023", "pathx", "mega", 97.98),
        ("s4_2022", "listops", "s4", 59.60),
        ("nystromformer2021", "listops", "identity", None),
        ("none", "listops", "softmax", None),
        (None, "listops", "softmax", None),
    ],
)
def test_published_accuracy(paper, task, mechanism, expected):
    if task == "avg":
        assert published(paper, task, mechanism) is not None
    else:
        assert published(paper, task, mechanism) == expected


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_its_softmax_row(paper):
    assert 30 < published(paper, "listops", "softmax") < 40


def test_cells_from_memory_are_flagged():
    assert lookup("luna2021", "text", "luna").recalled
    assert not lookup("nystromformer2021", "text", "nystrom").recalled


def test_cells_a_paper_took_over_are_flagged():
    assert lookup("s4_2022", "text", "linear").copied
    assert not lookup("s4_2022", "text", "s4").copied
    assert lookup("mega2023", "text", "luna").copied


def test_every_fact_ships_with_its_source():
    frame = facts()
    named = frame[["source", "table", "mechanism", "metric", "where_seen"]]
    assert len(frame) > 1000 and (named != "").to_numpy().all()
    assert {"accuracy", "relative_speed", "memory_gb", "steps_per_s"} <= set(frame["metric"])
    assert frame["recalled"].any() and not frame["recalled"].all()
    assert frame["value"].notna().sum() > 900


def test_facts_from_memory_are_those_the_lookup_flags():
    recalled = facts().query("recalled and metric == 'accuracy' and source == 'Luna 2021 (Ma et al.)'")
    assert "Luna-256" in set(recalled["mechanism"])


def test_a_task_reported_as_not_learned_has_no_value():
    cell = lookup("lra2021", "pathx", "linear")
    assert cell.failed and cell.value is None and published("lra2021", "pathx", "linear") is None


def test_another_length_than_the_papers_has_no_published_number():
    assert lookup("nystromformer2021", "listops", "softmax", length=2000).value == 37.10
    assert lookup("nystromformer2021", "listops", "softmax", length=512) is None
