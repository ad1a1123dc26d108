"""Whether the intervals cover and the letters keep their error, on data whose truth is known."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import lra
from lra.report import simulation

ROOT = Path(lra.__file__).resolve().parents[1]

# Standard error of a share near 0.95 from 1,200 trials: 0.6 points; of one near 0.05 from 250: 1.4.


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize(("num_test", "seed_sd"), [(2000, 0.0), (2000, 0.01), (10_000, 0.02)])
def test_interval_of_several_seeds_covers_at_least_93_percent(num_seeds, num_test, seed_sd):
    kind = dict(num_seeds=num_seeds, num_test=num_test, alike=True)
    coverage = simulation.interval_coverage(np.random.default_rng(1), 0.36, seed_sd, trials=1200, **kind)
    assert simulation.LEAST <= coverage <= 0.99


def test_interval_of_one_seed_covers_the_test_set_and_not_the_seeds():
    generator, kind = np.random.default_rng(2), dict(num_seeds=1, num_test=10_000, alike=True)
    coverage = simulation.interval_coverage(generator, 0.64, 0.0, trials=1200, **kind)
    assert 0.93 <= coverage <= 0.97
    assert simulation.interval_coverage(generator, 0.64, 0.02, trials=300, **kind) < 0.5


def test_interval_is_wide_where_seeds_err_on_examples_of_their_own():
    kind = dict(num_seeds=3, num_test=2000, alike=False)
    assert simulation.interval_coverage(np.random.default_rng(3), 0.36, 0.005, trials=500, **kind) > 0.97


def test_scores_have_the_accuracy_the_spread_and_the_correlation_asked_for():
    generator = np.random.default_rng(4)
    for alike, correlation in ((True, 1.0), (False, 0.0)):
        drawn = np.array(
            [
                simulation.scores(generator, 0.4, 0.0, num_seeds=2, num_test=500, alike=alike)
                for _ in range(1500)
            ]
        )
        assert abs(drawn.mean() - 0.4) < 0.003
        assert drawn[:, 0].std() == pytest.approx(np.sqrt(0.24 / 500), rel=0.08)
        assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(correlation, abs=0.1)


@pytest.mark.parametrize(("count", "num_seeds"), [(2, 2), (4, 3)])
def test_equal_mechanisms_are_rarely_told_apart(count, num_seeds):
    error, _, _ = simulation.family_wise_error(
        np.random.default_rng(5), count, 0.02, trials=250, num_seeds=num_seeds
    )
    assert error <= 0.05 + 3 * 0.014


@pytest.mark.parametrize(("num_seeds", "num_test"), [(2, 2000), (3, 500)])
def test_one_unstable_mechanism_among_calm_ones_is_rarely_told_apart(num_seeds, num_test):
    """The pooled variance alone lets 12 % and 9 % of such pairs pass; standard error of 5 % here: 0.8."""
    seed_sd = [0.05] + [0.0] * 5
    error, _, worst = simulation.family_wise_error(
        np.random.default_rng(8), 6, seed_sd, trials=800, num_seeds=num_seeds, num_test=num_test
    )
    assert error <= 0.05 + 3 * 0.008 and worst <= 0.05 + 3 * 0.008


def test_mcnemar_alone_would_call_luck_a_difference():
    """Why it decides nothing: where seeds scatter, many tables of equals show a difference."""
    ours, mcnemar, _ = simulation.family_wise_error(np.random.default_rng(6), 4, 0.02, trials=80)
    assert ours <= 0.1 and mcnemar > 0.3


def test_a_difference_of_ten_spreads_is_found_and_its_interval_holds_it():
    apart, holds = simulation.difference_of_two(np.random.default_rng(7), 0.05, 0.005, trials=100)
    assert apart >= 0.9 and holds >= 0.93


def test_the_same_seed_gives_the_same_tables():
    first, second = (simulation.error_table(4, seed=3) for _ in range(2))
    assert first.data == second.data and len(first.rows) == len(first.data)
    assert all(set(column.key for column in first.columns) <= set(row) for row in first.rows)


def test_the_script_writes_the_three_tables(tmp_path, monkeypatch, capsys):
    output = tmp_path / "tables" / "simulation.md"
    monkeypatch.setattr(sys, "argv", ["simulate_intervals.py", "-o", str(output), "--trials", "4"])
    runpy.run_path(str(ROOT / "scripts" / "simulate_intervals.py"), run_name="__main__")
    titles = re.findall(r"^### (.*)$", output.read_text(), re.MULTILINE)
    assert titles == re.findall(
        r"^### (.*)$", (ROOT / "results/tables/simulation.md").read_text(), re.MULTILINE
    )
    assert len(titles) == 3 and str(output) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_claims_hold_in_all_conditions_of_the_committed_tables():
    coverage, error, power = simulation.tables(4000, seed=11)
    for cell in coverage.data:
        if cell["num_seeds"] > 1:
            assert cell["coverage"] >= simulation.LEAST, cell
        elif cell["seed_sd"] == 0:
            assert 0.93 <= cell["coverage"] <= 0.97, cell
    for cell in error.data:
        assert cell["ours"] <= 0.05 + 3 * 0.007 and cell["worst_pair"] <= 0.05 + 3 * 0.007, cell
    for cell in power.data:
        assert cell["coverage"] >= simulation.LEAST, cell
