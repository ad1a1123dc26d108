"""Intervals and ties for accuracies measured with few seeds on one shared test set.

Two things move a measured accuracy: the seed, and which examples happen to be in the test set. An interval
that leaves out either is too narrow, and a comparison that leaves out the seeds calls luck a difference: an
example-wise test (McNemar, or a bootstrap over examples) of mechanisms whose seeds scatter by two points
declares some difference in most tables of equals. A permutation of the seeds has no such fault, but with 3
+ 3 seeds its p-value cannot fall below 0.1, so that alone it never tells anything apart. Hence both questions
are answered here with both variances; McNemar and the permutation are shown beside that and decide nothing.
`lra.report.simulation` checks all of this.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
FEW = 4  # degrees of freedom of a seed variance below which Satterthwaite's rule rejects equals too often
MOST_DEALS = 200_000  # 10 + 10 seeds can be dealt in 184,756 ways
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
BOTH, TEST_ONLY, SEEDS_ONLY = "seeds and test set", "test set only", "seeds only"


@dataclass(frozen=True)
class Summary:
    """Accuracy of one mechanism, as fractions; `low` to `high` is the interval, `basis` what it joins."""

    num_seeds: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    basis: str | None


def summarise(accuracies: Sequence[float], num_test: int | None, *, level: float = LEVEL) -> Summary:
    """Mean, spread over seeds (ddof 1) and an interval for the accuracy on unseen seeds and examples.

    Several seeds: se^2 = s^2/n + p(1-p)/N, times Cochran's quantile (Cochran and Cox 1950): that of t with n
    - 1 degrees of freedom for the seeds and the normal one for the test set, weighted by their variances.
    Satterthwaite's degrees of freedom would be narrower and, at two or three seeds that scatter by more than
    the test set does, hold the truth in 87 to 92 % of cases only. The sum of variances is exact if seeds err
    on the same examples and wide otherwise, since s^2 then holds part of the test variance. One seed:
    Wilson's interval of the test set alone. Without `num_test`: the seeds alone.
    """
    n = len(accuracies)
    if n == 0:
        return Summary(0, None, None, None, None, None)
    mean = float(np.mean(accuracies))
    if n == 1:
        low, high = wilson(mean, num_test, level=level) if num_test else (None, None)
        return Summary(1, mean, None, low, high, TEST_ONLY if num_test else None)
    std = float(np.std(accuracies, ddof=1))
    of_seeds = std**2 / n
    of_test = mean * (1 - mean) / num_test if num_test else 0.0
    if of_seeds + of_test == 0.0:  # every seed at 0 or 1, or no test size: the formula's width is zero
        low, high = wilson(mean, num_test, level=level) if num_test else (None, None)
        return Summary(n, mean, std, low, high, BOTH if num_test else None)
    variance = of_seeds + of_test
    half = _cochran((1 - level) / 2, of_seeds / variance, n - 1) * math.sqrt(variance)
    basis = BOTH if num_test else SEEDS_ONLY
    return Summary(n, mean, std, max(0.0, mean - half), min(1.0, mean + half), basis)


def wilson(accuracy: float, num_test: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval for a share of `num_test` examples; stays inside [0, 1] and never has zero width."""
    from scipy.special import ndtri

    z = float(ndtri(0.5 + level / 2))
    scale = 1 + z**2 / num_test
    centre = (accuracy + z**2 / (2 * num_test)) / scale
    half = z * math.sqrt(accuracy * (1 - accuracy) / num_test + z**2 / (4 * num_test**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


# Ties. r rows, n seeds, N test examples.


@dataclass(frozen=True)
class Difference:
    """Mean accuracy of one row minus that of another, as fractions, with its interval; the p-value is for
    this pair alone.
    """

    gap: float
    low: float
    high: float
    p_value: float


def differences(rows: Sequence[np.ndarray], *, level: float = LEVEL) -> list[Difference]:
    """The joint test of each pair of rows, in the order of `itertools.combinations`.

    Each row is bool [n N]: seeds by the same N test examples, n >= 2. Null: equal accuracy over seeds and
    examples. The variance of a difference of means is the seed variance of both rows plus the variance over
    examples of the paired difference. Two or three seeds can agree by luck, hence Student's test with the
    seed variance pooled over all rows. One unstable row among calm ones is more than the pool says: if a row
    of the pair scatters more than the pool, the pair must pass Welch's test too, with the variances of its
    two rows alone and Satterthwaite's degrees of freedom rounded down; the larger p-value and the wider
    interval count. One imaginary example in each direction (Agresti and Min 2005) keeps a handful of
    discordant examples from deciding.
    """
    assert all(len(row) >= 2 for row in rows), "one seed says nothing about the spread over seeds"
    assert len({row.shape[1] for row in rows}) <= 1, "rows of different test sets cannot be paired"
    spreads = [float(row.mean(axis=1).var(ddof=1)) for row in rows]
    freedoms = [len(row) - 1 for row in rows]
    pooled = sum(f * s for f, s in zip(freedoms, spreads, strict=True)) / max(sum(freedoms), 1)
    per_example = [row.mean(axis=0) for row in rows]  # share of seeds that got it right, [N]

    found = []
    for a, b in itertools.combinations(range(len(rows)), 2):
        difference = per_example[a] - per_example[b]
        gap = float(difference.mean())
        examples = (float(((difference - gap) ** 2).sum()) + 2) / difference.size**2
        of_seeds = [(pooled / len(rows[a]) + pooled / len(rows[b]), sum(freedoms))]
        if max(spreads[a], spreads[b]) > pooled:
            own = [spreads[row] / len(rows[row]) for row in (a, b)]
            freedom = sum(own) ** 2 / (own[0] ** 2 / freedoms[a] + own[1] ** 2 / freedoms[b])
            of_seeds.append((sum(own), math.floor(freedom + 1e-9)))
        tested = [
            _half_and_p(gap, seeds, freedom, examples, difference.size, level) for seeds, freedom in of_seeds
        ]
        half, p_value = (max(values) for values in zip(*tested, strict=True))
        found.append(Difference(gap, max(-1.0, gap - half), min(1.0, gap + half), p_value))
    return found


def _half_and_p(
    gap: float, seeds: float, freedom: float, examples: float, num_test: int, level: float
) -> tuple[float, float]:
    """Half the width of the interval of `gap`, and its p-value.

    `seeds`: its variance over seeds, known to `freedom` degrees; `examples`: that over `num_test` examples.
    Satterthwaite's rule joins the two; below `FEW` degrees it is Cochran's quantile, as in `summarise`.
    """
    from scipy.special import stdtr, stdtrit

    error = math.sqrt(seeds + examples)
    if seeds and freedom < FEW:
        kind = (seeds / error**2, freedom)
        return _cochran((1 - level) / 2, *kind) * error, _cochran_p(abs(gap) / error, *kind)
    joined = error**4 / (seeds**2 / freedom + examples**2 / num_test)
    return float(stdtrit(joined, 0.5 + level / 2)) * error, 2 * float(stdtr(joined, -abs(gap) / error))


def _cochran(tail: float, share: float, freedom: float) -> float:
    """What is exceeded with probability `tail`: a `share` of t's quantile, the rest the normal one."""
    from scipy.special import ndtri, stdtrit  # the quantiles of scipy.stats, without its start-up time

    return -(share * float(stdtrit(freedom, tail)) + (1 - share) * float(ndtri(tail)))


def _cochran_p(statistic: float, share: float, freedom: float) -> float:
    """The two-sided p-value to which `_cochran` gives `statistic`, by bisection of its logarithm."""
    low, high = math.log(1e-30), math.log(0.5)
    for _ in range(50):
        middle = (low + high) / 2
        above = _cochran(math.exp(middle), share, freedom) > statistic
        low, high = (middle, high) if above else (low, middle)
    return min(1.0, 2 * math.exp(high))


def tie_p_values(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The p-value of `differences` for each pair of rows, before Holm."""
    return np.asarray([difference.p_value for difference in differences(rows)])


@dataclass(frozen=True)
class McNemar:
    """Each seed of one row against each seed of another: examples that only one of the two models got right,
    summed over the seed pairs, and the smallest, median and largest p-value of them.
    """

    num_pairs: int
    only_first: int
    only_second: int
    p_values: tuple[float, float, float]


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's test per seed pair, mid-p (Fagerland et al. 2013). first: bool [n N], second: bool [m N].

    It asks whether two trained models differ on examples of this kind. A mechanism is more than the models
    of a few seeds: under equal mechanisms whose seeds scatter, it rejects far more often than it says.
    """
    from scipy.special import bdtr

    first, second = first.astype(np.float64), second.astype(np.float64)
    only_first, only_second = first @ (1 - second).T, (1 - first) @ second.T  # [n m]
    discordant, fewer = only_first + only_second, np.minimum(only_first, only_second)
    below = np.where(fewer > 0, bdtr(np.maximum(fewer - 1, 0), discordant.astype(int), 0.5), 0.0)
    p = np.minimum(1.0, bdtr(fewer, discordant.astype(int), 0.5) + below)
    p = np.where(discordant == 0, 1.0, p)
    extremes = (float(p.min()), float(np.median(p)), float(p.max()))
    return McNemar(p.size, round(only_first.sum()), round(only_second.sum()), extremes)


@dataclass(frozen=True)
class Permutation:
    """`smallest` is the least p-value that this many seeds can give."""

    p_value: float
    smallest: float
    exact: bool


def permutation(first: Sequence[float], second: Sequence[float]) -> Permutation:
    """Whether accuracies per seed differ: all ways to deal the seeds to the two rows, two-sided.

    More than `MOST_DEALS` ways are drawn from at random, always the same ones.
    """
    scores, n = np.asarray([*first, *second], dtype=np.float64), len(first)
    m, deals = len(second), math.comb(len(scores), n)
    if exact := deals <= MOST_DEALS:
        chosen = np.asarray(list(itertools.combinations(range(len(scores)), n)))
    else:
        shuffles = np.tile(np.arange(len(scores)), (MOST_DEALS - 1, 1))
        chosen = np.random.default_rng(0).permuted(shuffles, axis=1)[:, :n]
        chosen = np.vstack([np.arange(n), chosen])  # the deal at hand is one of them
    sums = scores[chosen].sum(axis=1)
    gaps = np.abs(sums / n - (scores.sum() - sums) / m)
    gap = abs(float(np.mean(first)) - float(np.mean(second)))
    p_value = float((gaps >= gap - 1e-12).mean())
    return Permutation(p_value, (2 if exact and n == m else 1) / len(chosen), exact)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values: rejecting those up to alpha keeps the family-wise error at alpha."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def tie_letters(
    rows: Sequence[np.ndarray], *, level: float = LEVEL, adjusted: np.ndarray | None = None
) -> list[str]:
    """Letters per row, the best with `a`: rows that share one cannot be told apart (Holm over all pairs).

    Each row is bool [n N], n >= 2, with the same N test examples; `adjusted` are Holm's p-values if known.
    """
    count = len(rows)
    different = np.zeros((count, count), dtype=bool)
    if count > 1:
        adjusted = holm(tie_p_values(rows)) if adjusted is None else adjusted
        for (i, j), p in zip(itertools.combinations(range(count), 2), adjusted, strict=True):
            different[i, j] = different[j, i] = p <= 1 - level
    order = sorted(range(count), key=lambda i: -float(np.mean(rows[i])))
    letters = compact_letters(different[np.ix_(order, order)])
    return [letters[order.index(i)] for i in range(count)]


def compact_letters(different: np.ndarray) -> list[str]:
    """Compact letter display: two ranked rows share a letter if and only if not `different` (bool [r r]).

    Insert and absorb (Piepho 2004): start with one letter for all, split it at each difference, drop
    letters whose rows another letter holds too. Letters are given in the order of the rows. Where that
    would take more than an alphabet (dozens of rows, some with a wide spread), two rows count as different
    only if every pair of rows ranked around them is: fewer differences, never a false one more, and each
    letter is then a run of rows.
    """
    columns = _insert_and_absorb(different) or _runs(different)
    columns.sort(key=lambda c: sorted(c))
    return ["".join(_letter(k) for k, c in enumerate(columns) if row in c) for row in range(len(different))]


def _insert_and_absorb(different: np.ndarray) -> list[frozenset[int]] | None:
    columns = [frozenset(range(len(different)))]
    for i, j in itertools.combinations(range(len(different)), 2):
        if not different[i, j]:
            continue
        split = [part for c in columns for part in ([c - {i}, c - {j}] if i in c and j in c else [c])]
        unique = list(dict.fromkeys(split))
        columns = [c for c in unique if not any(c < other for other in unique)]
        if len(columns) > len(ALPHABET):
            return None
    return columns


def _runs(different: np.ndarray) -> list[frozenset[int]]:
    count = len(different)
    reach = [max(j for j in range(count) if j == i or not different[i, j]) for i in range(count)]
    reach = np.maximum.accumulate(reach)  # a tie with a later row holds for every row ranked in between
    starts = [i for i in range(count) if i == 0 or reach[i] > reach[i - 1]]
    return [frozenset(range(i, int(reach[i]) + 1)) for i in starts]


def _letter(index: int) -> str:
    return ALPHABET[index] if index < len(ALPHABET) else f"[{index + 1}]"
