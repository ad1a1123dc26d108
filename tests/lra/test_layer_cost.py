"""What is read from layers' memory: growth per doubling, and claims that it breaks."""

import json

import pytest
import torch

from lra import environment
from lra.errors import UserError
from lra.layer_cost import (
    Row,
    Size,
    broken_claims,
    failures,
    growth,
    growth_table,
    layer_cost,
    main,
    time_table,
    write,
)


def rows(name, peaks, quadratic=False, **more):
    lengths = (4096, 8192, 16384)
    return [
        Row(name, {}, n, Size(), peak_mib=p, quadratic_memory=quadratic, **more)
        for n, p in zip(lengths, peaks, strict=True)
    ]


def test_growth_is_memory_over_that_of_half_the_length():
    assert growth(rows("a", (10.0, 21.0, 42.0))) == {("a", 8192): 2.1, ("a", 16384): 2.0}


@pytest.mark.parametrize(
    ("peaks", "quadratic", "broken"),
    [
        ((10.0, 20.0, 40.0), False, 0),
        ((10.0, 20.0, 48.0), False, 1),
        ((10.0, 25.0, 65.0), False, 2),
        ((10.0, 38.0, 150.0), True, 0),
        ((10.0, 20.0, 40.0), True, 1),
    ],
)
def test_a_claim_is_held_against_growth_in_both_directions(peaks, quadratic, broken):
    assert len(broken_claims(rows("a", peaks, quadratic))) == broken


def test_a_layer_that_could_not_be_measured_is_named():
    (said,) = broken_claims([Row("a", {}, 4096, Size(), status="oom", reason="too large")])
    assert "a at 4,096: oom, too large" in said


def test_out_of_memory_is_an_answer_of_a_quadratic_layer_alone():
    quadratic = [*rows("a", (10.0, 40.0, 160.0), True)[:2], Row("a", {}, 16384, Size(), status="oom")]
    assert failures(quadratic) == [] and len(broken_claims(quadratic)) == 1
    assert len(failures([Row("b", {}, 16384, Size(), status="oom", quadratic_memory=False)])) == 1
    assert len(failures([Row("b", {}, 16384, Size(), status="failed", quadratic_memory=True)])) == 1


def test_tables_have_a_line_per_mechanism():
    found = [*rows("a", (10.0, 20.0, 40.0)), *rows("b", (1.0, 4.0, 16.0), True)]
    line = growth_table(found).splitlines()[2]
    assert line.split() == "b 1.0 4.0 16.0 4.00 4.00 (claims quadratic)".split()
    assert len(time_table(found).splitlines()) == 3


@pytest.mark.parametrize("name", ["linear", "luna", "identity"])
def test_mixers_and_blocks_are_timed_on_a_cpu_too(name):
    row = layer_cost(name, 32, size=Size(batch_size=2, d_model=16), device="cpu")
    assert row.status == "ok" and row.step_ms > 0 and row.infer_ms > 0
    assert row.peak_mib is None and row.captured_ms is None


def test_an_error_is_a_result(tmp_path):
    row = layer_cost("local", 32, {"window": 0}, device="cpu")
    assert row.status == "failed" and "window" in row.reason
    write([row], tmp_path / "rows.jsonl")
    written = json.loads((tmp_path / "rows.jsonl").read_text())
    assert written["environment"]["torch"] == torch.__version__ and written["size"]["batch_size"] == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="needs a GPU"):
        main([])


def test_a_job_on_a_copy_of_the_tree_names_its_revision(monkeypatch):
    environment.git_revision.cache_clear()
    monkeypatch.setenv("LRA_GIT_REVISION", "abc")
    assert environment.git_revision() == "abc"
    environment.git_revision.cache_clear()
