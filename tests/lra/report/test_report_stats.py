"""Intervals, paired tests and letters: against closed forms and against scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lra.report import simulation, stats


def test_interval_is_the_stated_formula():
    scores, num_test = [0.340, 0.344, 0.351], 2000
    got = stats.summarise(scores, num_test)
    mean, of_seeds = np.mean(scores), np.var(scores, ddof=1) / 3
    of_test = mean * (1 - mean) / num_test
    quantiles = scipy_stats.t.ppf(0.975, 2) * of_seeds + scipy_stats.norm.ppf(0.975) * of_test
    half = quantiles / np.sqrt(of_seeds + of_test)
    assert got.basis == stats.BOTH and got.num_seeds == 3
    np.testing.assert_allclose(
        (got.mean, got.std, got.low, got.high), (mean, np.std(scores, ddof=1), mean - half, mean + half)
    )


def test_without_a_test_size_the_interval_is_that_of_student():
    scores = [0.30, 0.34, 0.35]
    got = stats.summarise(scores, None)
    expected = scipy_stats.t.interval(0.95, 2, loc=np.mean(scores), scale=scipy_stats.sem(scores))
    np.testing.assert_allclose((got.low, got.high), expected)


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


def test_a_clear_difference_is_found_among_many_rows():
    generator, found = np.random.default_rng(6), 0
    for _ in range(20):
        rows, _ = simulation.rows(generator, [0.35] * 5 + [0.18] * 5, 0.007)
        letters = stats.tie_letters(rows)
        found += sum(not set(a) & set(b) for a in letters[:5] for b in letters[5:])
    assert found >= 0.9 * 20 * 25


def test_the_row_that_scatters_more_than_the_pool_is_tested_on_its_own_degrees_of_freedom():
    """One of four seeds is right on every example: 3 degrees, so Cochran's quantile; five seeds: 4, Welch."""
    num_test = 1000
    for num_seeds, few in ((4, True), (5, False)):
        unstable = np.zeros((num_seeds, num_test), dtype=bool)
        unstable[0] = True
        calm = np.tile(np.arange(num_test) % num_seeds == 0, (num_seeds, 1))
        (got,) = stats.differences([unstable, calm])
        of_seeds = unstable.mean(axis=1).var(ddof=1) / num_seeds
        of_test = ((unstable.mean(axis=0) - calm.mean(axis=0)).var() * num_test + 2) / num_test**2
        variance, freedom = of_seeds + of_test, num_seeds - 1
        student = scipy_stats.t.ppf(0.975, freedom)
        if few:
            quantile = (of_seeds * student + of_test * scipy_stats.norm.ppf(0.975)) / variance
        else:
            quantile = scipy_stats.t.ppf(0.975, variance**2 / (of_seeds**2 / freedom + of_test**2 / num_test))
        assert got.gap == pytest.approx(0, abs=1e-12) and got.p_value == pytest.approx(1)
        assert got.high == pytest.approx(quantile * np.sqrt(variance), rel=1e-9)


def test_few_discordant_examples_decide_as_in_an_exact_test():
    """Five examples one way and none the other: McNemar's exact p-value is 0.0625, eight: 0.0078."""
    base = np.tile(np.arange(2000) < 700, (3, 1))
    for discordant, tied in ((5, True), (8, False)):
        other = base.copy()
        other[:, 700 : 700 + discordant] = True
        assert (stats.tie_p_values([base, other])[0] > 0.05) == tied


def test_two_rows_that_only_seeds_tell_apart_are_tested_as_student_does():
    """Every example right or wrong by the seed alone: the joint test is then the two-sample t test."""
    rows = [
        np.repeat(np.array([right], dtype=bool).T, 100_000, axis=1) for right in ([1, 1, 1, 0], [1, 0, 0, 0])
    ]
    (got,) = stats.differences(rows)
    expected = scipy_stats.ttest_ind([1, 1, 1, 0], [1, 0, 0, 0])
    assert got.gap == 0.5
    np.testing.assert_allclose(got.p_value, expected.pvalue, rtol=1e-3)
    np.testing.assert_allclose(
        (got.low, got.high), np.clip(expected.confidence_interval(0.95), -1, 1), rtol=1e-3
    )


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.03, 0.04, 0.3])
def test_interval_of_a_difference_leaves_out_zero_if_and_only_if_its_p_value_is_small(gap):
    generator = np.random.default_rng(8)
    for _ in range(5):
        rows, _ = simulation.rows(generator, [0.4 + gap, 0.4], 0.01, num_test=500)
        (got,) = stats.differences(rows)
        assert (got.low > 0 or got.high < 0) == (got.p_value <= 0.05)
        assert 0 < got.p_value <= 1


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (3, 9), (7, 7), (40, 62)])
def test_mcnemar_is_the_mid_p_of_the_discordant_examples(b, c):
    first, second = np.zeros((1, 200), dtype=bool), np.zeros((1, 200), dtype=bool)
    first[0, :b], second[0, b : b + c] = True, True
    got = stats.mcnemar(first, second)
    binomial = scipy_stats.binom(b + c, 0.5)
    expected = min(1.0, 2 * binomial.cdf(min(b, c)) - binomial.pmf(min(b, c)))
    assert (got.num_pairs, got.only_first, got.only_second) == (1, b, c)
    np.testing.assert_allclose(got.p_values, [expected] * 3)


def test_mcnemar_takes_every_seed_against_every_seed():
    generator = np.random.default_rng(9)
    first, second = generator.random((2, 300)) < 0.5, generator.random((3, 300)) < 0.4
    each = [stats.mcnemar(a[None], b[None]) for a in first for b in second]
    got = stats.mcnemar(first, second)
    assert got.num_pairs == 6
    assert got.only_first == sum(one.only_first for one in each)
    assert got.only_second == sum(one.only_second for one in each)
    p_values = [one.p_values[0] for one in each]
    np.testing.assert_allclose(got.p_values, (min(p_values), np.median(p_values), max(p_values)))


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]), ([0.4, 0.1, 0.35], [0.2, 0.5]), ([0.3, 0.3], [0.3, 0.3, 0.3])],
)
def test_permutation_deals_the_seeds_in_all_ways(first, second):
    got = stats.permutation(first, second)
    expected = scipy_stats.permutation_test(
        (first, second), lambda a, b: abs(np.mean(a) - np.mean(b)), alternative="greater", n_resamples=np.inf
    )
    assert got.exact
    np.testing.assert_allclose(got.p_value, expected.pvalue)


def test_permutation_of_three_and_three_seeds_cannot_fall_below_a_tenth():
    got = stats.permutation([0.9, 0.91, 0.92], [0.1, 0.11, 0.12])
    assert got.p_value == got.smallest == 0.1
    assert stats.permutation([0.9], [0.1]).p_value == 1.0
    assert stats.permutation([0.9, 0.8], [0.1, 0.2, 0.3]).smallest == 0.1


def test_permutation_of_many_seeds_is_drawn_and_repeats(monkeypatch):
    monkeypatch.setattr(stats, "MOST_DEALS", 5000)
    generator = np.random.default_rng(10)
    first, second = generator.random(12), generator.random(12) + 0.4
    got = stats.permutation(first, second)
    assert not got.exact and got == stats.permutation(first, second)
    assert 1 / stats.MOST_DEALS <= got.p_value < 0.05


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
