"""Intervals and ties: against closed forms, against scipy, and by simulation."""

import itertools

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from lra.report import stats


def test_interval_is_the_stated_formula():
    scores, num_test = [0.340, 0.344, 0.351], 2000
    got = stats.summarise(scores, num_test)
    mean, of_seeds = np.mean(scores), np.var(scores, ddof=1) / 3
    of_test = mean * (1 - mean) / num_test
    freedom = (of_seeds + of_test) ** 2 / (of_seeds**2 / 2)
    half = scipy_stats.t.ppf(0.975, freedom) * np.sqrt(of_seeds + of_test)
    assert got.basis == stats.BOTH and got.num_seeds == 3
    np.testing.assert_allclose(
        (got.mean, got.std, got.low, got.high), (mean, np.std(scores, ddof=1), mean - half, mean + half)
    )


def test_seeds_that_agree_leave_the_normal_interval_of_the_test_set():
    got = stats.summarise([0.4, 0.4, 0.4], 1000)
    half = scipy_stats.norm.ppf(0.975) * np.sqrt(0.4 * 0.6 / 1000)
    np.testing.assert_allclose((got.low, got.high), (0.4 - half, 0.4 + half))


def test_one_seed_gets_the_wilson_interval_of_the_test_set():
    got = stats.summarise([0.3], 200)
    expected = scipy_stats.binomtest(60, 200).proportion_ci(method="wilson")
    np.testing.assert_allclose((got.low, got.high), (expected.low, expected.high))
    assert got.std is None and got.basis == stats.TEST_ONLY


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0]])
def test_interval_never_has_zero_width(scores):
    got = stats.summarise(scores, 50)
    assert 0.0 <= got.low < got.high <= 1.0


def test_unknown_test_size_is_said_in_the_basis():
    assert stats.summarise([0.3, 0.4], None).basis == stats.SEEDS_ONLY
    assert stats.summarise([0.3], None).low is None
    assert stats.summarise([], 100).mean is None


def interval_coverage(seed_sd, accuracy, trials, generator, num_seeds=3, num_test=2000):
    """Share of intervals that hold the true accuracy; seeds shift it, on one test set."""
    hits = 0
    for _ in range(trials):
        true = np.clip(accuracy + seed_sd * generator.standard_normal(num_seeds), 0, 1)
        scores = np.searchsorted(np.sort(generator.random(num_test)), true) / num_test
        got = stats.summarise(scores, num_test)
        hits += got.low <= accuracy <= got.high
    return hits / trials


@pytest.mark.parametrize("seed_sd", [0.0, 0.01, 0.02])
def test_interval_covers_about_95_percent(seed_sd):
    # Standard error of a share near 0.95 from 1,500 trials: 0.6 points, so that 93 % is three of them below.
    coverage = interval_coverage(seed_sd, 0.36, 1500, np.random.default_rng(1))
    assert 0.93 <= coverage <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seed_sd", [0.0, 0.0025, 0.005, 0.01, 0.015, 0.02])
@pytest.mark.parametrize("accuracy", [0.36, 0.64])
def test_interval_covers_93_to_97_percent(seed_sd, accuracy):
    coverage = interval_coverage(seed_sd, accuracy, 20_000, np.random.default_rng(2))
    assert 0.93 <= coverage <= 0.97


def simulate(generator, accuracies, seed_sd, *, shared, own, num_seeds=3, num_test=2000):
    """Rows of bool [n N]; examples are hard for all (`shared`), for a mechanism (`own`), or for one seed."""
    count = len(accuracies)
    difficulty = np.sqrt(shared) * generator.standard_normal(num_test)
    difficulty = difficulty + np.sqrt(own) * generator.standard_normal((count, 1, num_test))
    alone = np.sqrt(max(0.0, 1 - shared - own)) * generator.standard_normal((count, num_seeds, num_test))
    true = np.reshape(accuracies, (-1, 1, 1)) + seed_sd * generator.standard_normal((count, num_seeds, 1))
    return list(difficulty + alone < special.ndtri(np.clip(true, 1e-6, 1 - 1e-6)))


def family_wise_error(trials, generator, count, seed_sd, **kind):
    wrong = 0
    for _ in range(trials):
        rows = simulate(generator, [0.35] * count, seed_sd, **kind)
        wrong += stats.holm(stats.tie_p_values(rows)).min() <= 0.05
    return wrong / trials


@pytest.mark.parametrize("seed_sd", [0.0, 0.02])
def test_equal_mechanisms_are_rarely_told_apart(seed_sd):
    # True rates are 1 to 3 %; 6 % or less of 300 trials fails by chance with a probability below 1e-3.
    error = family_wise_error(300, np.random.default_rng(3), 4, seed_sd, shared=0.5, own=0.3)
    assert error <= 0.06


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed_sd", [0.0, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize(
    "kind", [dict(shared=0.5, own=0.3), dict(shared=0.9, own=0.1)], ids=["usual", "hard"]
)
def test_family_wise_error_is_at_most_six_percent(seed_sd, count, kind):
    assert family_wise_error(1500, np.random.default_rng(4), count, seed_sd, **kind) <= 0.06


def test_an_example_wise_test_alone_would_call_luck_a_difference():
    """Why the seed variance is part of the test: without it most tables of equals show a difference."""
    generator, wrong, trials = np.random.default_rng(5), 0, 60
    for _ in range(trials):
        rows = simulate(generator, [0.35] * 4, 0.02, shared=0.5, own=0.3)
        pairs = list(itertools.combinations(rows, 2))
        p_values = []
        for a, b in pairs:
            difference = a.mean(axis=0) - b.mean(axis=0)
            statistic = difference.mean() / (difference.std(ddof=1) / np.sqrt(difference.size))
            p_values.append(2 * scipy_stats.norm.sf(abs(statistic)))
        wrong += stats.holm(np.asarray(p_values)).min() <= 0.05
    assert wrong / trials > 0.3


def test_a_clear_difference_is_found_among_many_rows():
    generator, found = np.random.default_rng(6), 0
    for _ in range(20):
        rows = simulate(generator, [0.35] * 5 + [0.18] * 5, 0.007, shared=0.5, own=0.3)
        letters = stats.tie_letters(rows)
        found += all(not set(a) & set(b) for a in letters[:5] for b in letters[5:])
    assert found >= 19


def test_few_discordant_examples_decide_as_in_an_exact_test():
    """Five examples one way and none the other: McNemar's exact p-value is 0.0625, eight: 0.0078."""
    base = np.tile(np.arange(2000) < 700, (3, 1))
    for discordant, tied in ((5, True), (8, False)):
        other = base.copy()
        other[:, 700 : 700 + discordant] = True
        assert (stats.tie_p_values([base, other])[0] > 0.05) == tied


def test_identical_rows_are_tied_and_opposite_rows_are_not():
    right = np.ones((2, 50), dtype=bool)
    assert stats.tie_letters([right, right]) == ["a", "a"]
    assert stats.tie_letters([~right, right]) == ["b", "a"]
    assert stats.tie_letters([right]) == ["a"] and stats.tie_letters([]) == []


def test_holm_steps_down():
    got = stats.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(got, [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("seed", range(20))
def test_rows_share_a_letter_if_and_only_if_they_are_tied(seed):
    generator = np.random.default_rng(seed)
    different = np.triu(generator.random((7, 7)) < 0.4, 1)
    different |= different.T
    letters = stats.compact_letters(different)
    for i, j in itertools.combinations(range(7), 2):
        assert bool(set(letters[i]) & set(letters[j])) == (not different[i, j])


def test_letters_of_many_rows_stay_few_and_never_invent_a_difference():
    generator = np.random.default_rng(0)
    different = np.triu(generator.random((60, 60)) < 0.5, 1)
    different |= different.T
    letters = stats.compact_letters(different)
    assert len(set("".join(letters))) <= 60
    for i, j in itertools.combinations(range(60), 2):
        assert different[i, j] or set(letters[i]) & set(letters[j])
