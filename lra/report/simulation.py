"""Whether the intervals cover and the tie test keeps its error, tried on data whose truth is known.

Everything is seeded. Accuracy of a seed: a true value per mechanism, moved by that seed (standard deviation
`seed_sd`), then measured on a test set of finite size. `scripts/simulate_intervals.py` writes the tables.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from lra.report import stats
from lra.report.cells import Column, Table

LEAST = 0.93  # what the 95 % interval of two seeds or more covers at least, in all conditions tried here
SHARED, OWN_EXAMPLES = "all seeds", "each its own"


def scores(
    generator: np.random.Generator,
    accuracy: float,
    seed_sd: float,
    *,
    num_seeds: int,
    num_test: int,
    alike: bool,
) -> np.ndarray:
    """Measured accuracies of some seeds on one test set, [n].

    `alike`: the seeds err on the same examples as far as their accuracies allow, so that the test set moves
    all of them together. Else each errs on examples of its own.
    """
    true = np.clip(accuracy + seed_sd * generator.standard_normal(num_seeds), 0, 1)
    if not alike:
        return generator.binomial(num_test, true) / num_test
    found, below, left = np.empty(num_seeds), 0.0, num_test
    for index in np.argsort(true):  # how many of the examples lie between one accuracy and the next
        between = (true[index] - below) / (1 - below) if below < 1 else 0.0
        left -= generator.binomial(left, min(max(between, 0.0), 1.0))
        found[index], below = (num_test - left) / num_test, true[index]
    return found


def interval_coverage(
    generator: np.random.Generator, accuracy: float, seed_sd: float, *, trials: int, **kind
) -> float:
    """Share of `stats.summarise`'s intervals that hold the true accuracy; `kind` as in `scores`."""
    hits = 0
    for _ in range(trials):
        got = stats.summarise(scores(generator, accuracy, seed_sd, **kind), kind["num_test"])
        hits += got.low <= accuracy <= got.high
    return hits / trials


def rows(
    generator: np.random.Generator,
    accuracies: Sequence[float],
    seed_sd: float | Sequence[float],
    *,
    shared: float = 0.5,
    own: float = 0.3,
    num_seeds: int = 3,
    num_test: int = 2000,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of bool [n N], and the true accuracy of each row's seeds [r n]; `seed_sd` of all or of each row.

    An example is hard for every mechanism (`shared`, a share of the variance), for one mechanism (`own`) or
    for one seed (the rest).
    """
    from scipy.special import ndtri

    count = len(accuracies)
    difficulty = np.sqrt(shared) * generator.standard_normal(num_test, dtype=np.float32)
    difficulty = difficulty + np.sqrt(own) * generator.standard_normal((count, 1, num_test), dtype=np.float32)
    alone = generator.standard_normal((count, num_seeds, num_test), dtype=np.float32)
    alone *= np.sqrt(max(0.0, 1 - shared - own))
    true = generator.standard_normal((count, num_seeds)) * np.reshape(seed_sd, (-1, 1))
    true += np.reshape(accuracies, (-1, 1))
    limit = ndtri(np.clip(true, 1e-6, 1 - 1e-6)).astype(np.float32)
    return list(difficulty + alone < limit[:, :, None]), true


def family_wise_error(
    generator: np.random.Generator,
    count: int,
    seed_sd: float | Sequence[float],
    *,
    trials: int,
    accuracy: float = 0.35,
    **kind,
) -> tuple[float, float, float]:
    """How often a table of `count` equal mechanisms shows a difference: by our letters, by McNemar alone;
    and how often the joint test rejects the pair of rows that it rejects most.

    McNemar alone: Holm over the pairs' median p-values of seed against seed.
    """
    ours = mcnemar = 0
    rejected = np.zeros(count * (count - 1) // 2)
    for _ in range(trials):
        found, _ = rows(generator, [accuracy] * count, seed_sd, **kind)
        p_values = stats.tie_p_values(found)
        rejected += p_values <= 1 - stats.LEVEL
        ours += stats.holm(p_values).min() <= 1 - stats.LEVEL
        medians = [stats.mcnemar(a, b).p_values[1] for a, b in itertools.combinations(found, 2)]
        mcnemar += stats.holm(np.asarray(medians)).min() <= 1 - stats.LEVEL
    return ours / trials, mcnemar / trials, float(rejected.max()) / trials


def difference_of_two(
    generator: np.random.Generator, gap: float, seed_sd: float, *, trials: int, accuracy: float = 0.35, **kind
) -> tuple[float, float]:
    """Two mechanisms that differ by `gap`: how often told apart, how often the interval holds `gap`."""
    apart = holds = 0
    for _ in range(trials):
        found, _ = rows(generator, [accuracy + gap, accuracy], seed_sd, **kind)
        (difference,) = stats.differences(found)
        apart += difference.p_value <= 1 - stats.LEVEL
        holds += difference.low <= gap <= difference.high
    return apart / trials, holds / trials


def tables(trials: int = 4000, seed: int = 0) -> list[Table]:
    """Coverage of the interval, error of the letters, and what the test finds.

    `trials` per cell of the first, a quarter of that in the others, where a trial is a table of mechanisms.
    """
    return [coverage_table(trials, seed), error_table(trials // 4, seed), power_table(trials // 4, seed)]


TESTED = (2000, 10_000)
SPREADS = (0.0, 0.005, 0.02)
# One unstable mechanism among calm ones: the spread of each row's seeds, by the number of rows.
UNEQUAL = {2: (0.05, 0.0), 3: (0.05, 0.003, 0.003), 6: (0.05,) + (0.0,) * 5, 8: (0.05,) + (0.003,) * 7}
UNEVEN = (
    (2, 2, 2000),
    (2, 2, 10_000),
    (2, 3, 10_000),
    (3, 3, 10_000),
    (6, 2, 2000),
    (6, 5, 2000),
    (8, 3, 2000),
)  # rows, seeds, test examples


def coverage_table(trials: int, seed: int) -> Table:
    """Rows: seeds, which examples they err on, accuracy; columns: test size and spread of the seeds."""
    generator = np.random.default_rng(seed)
    kinds = list(itertools.product((1, 2, 3, 5), (True, False), (0.18, 0.36, 0.64, 0.9)))
    conditions = list(itertools.product(TESTED, SPREADS))
    lines, data = [], []
    for num_seeds, alike, accuracy in kinds:
        if num_seeds == 1 and not alike:
            continue
        line = {"seeds": str(num_seeds), "accuracy": f"{100 * accuracy:.0f}"}
        line["examples"] = "-" if num_seeds == 1 else SHARED if alike else OWN_EXAMPLES
        for index, (num_test, seed_sd) in enumerate(conditions):
            kind = dict(num_seeds=num_seeds, num_test=num_test, alike=alike)
            share = interval_coverage(generator, accuracy, seed_sd, trials=trials, **kind)
            line[str(index)] = f"{100 * share:.1f}" + ("†" if num_seeds == 1 and seed_sd else "")
            data.append(
                {"kind": "coverage", "accuracy": accuracy, "seed_sd": seed_sd, **kind, "coverage": share}
            )
        lines.append(line)
    columns = [
        Column("seeds", "seeds"),
        Column("examples", "examples missed", left=True),
        Column("accuracy", "accuracy"),
        *(
            Column(str(i), f"N {num_test:,}, seeds ± {100 * sd:.1f}")
            for i, (num_test, sd) in enumerate(conditions)
        ),
    ]
    notes = [
        f"{trials:,} trials a cell: standard error {_error(trials):.1f} points near 95; seeds ± x: standard "
        "deviation of the true accuracy over seeds, in points; N: test examples",
        f"examples missed: the same by {SHARED}, so that the test set moves them together, or by "
        f"{OWN_EXAMPLES} (the formula then counts part of that variance twice and is wide)",
        f"claimed: {100 * LEAST:.0f} % or more for two seeds or more",
        "†: one seed has an interval of the test set alone, which tables mark: it does not cover the seeds",
    ]
    return Table(("Coverage of the 95 % interval (%)",), columns, lines, notes, data)


def error_table(trials: int, seed: int) -> Table:
    """How often tables of equal mechanisms show a difference."""
    generator = np.random.default_rng(seed + 1)
    lines, data = [], []
    conditions = [
        *itertools.product((2,), (2, 3), TESTED, (0.02,)),
        *itertools.product((3, 8), (2, 3), (2000,), SPREADS),
        (3, 5, 2000, 0.02),
        (3, 3, 10_000, 0.02),
        *((count, num_seeds, num_test, UNEQUAL[count]) for count, num_seeds, num_test in UNEVEN),
    ]
    for count, num_seeds, num_test, seed_sd in conditions:
        kind = dict(num_seeds=num_seeds, num_test=num_test)
        ours, mcnemar, worst = family_wise_error(generator, count, seed_sd, trials=trials, **kind)
        shares = {"ours": ours, "worst_pair": worst, "mcnemar": mcnemar}
        data.append({"kind": "error", "rows": count, "seed_sd": seed_sd, **kind, **shares})
        lines.append(
            {
                "rows": str(count),
                "seeds": str(num_seeds),
                "num_test": f"{num_test:,}",
                "seed_sd": _spread(seed_sd),
                **{name: f"{100 * share:.1f}" for name, share in shares.items()},
            }
        )
    columns = [
        Column("rows", "rows"),
        Column("seeds", "seeds"),
        Column("num_test", "test examples"),
        Column("seed_sd", "seeds ±"),
        Column("ours", "letters (joint test)"),
        Column("worst_pair", "worst pair"),
        Column("mcnemar", "McNemar alone"),
    ]
    notes = [
        f"{trials:,} tables a line: standard error {_error(trials):.1f} points near 5; at most 5 is claimed",
        "seeds ±: of every row, or of one row and of each other row",
        "worst pair: the pair of rows that the joint test rejects most often, before Holm; the most of many "
        "pairs is above 5 by luck too",
    ]
    notes.append("McNemar alone: median p-value over seed pairs, Holm over pairs of rows")
    return Table(("Tables of equal mechanisms that show a difference (%)",), columns, lines, notes, data)


def power_table(trials: int, seed: int) -> Table:
    """What a difference of two mechanisms must be to be found, and whether its interval covers it."""
    generator = np.random.default_rng(seed + 2)
    lines, data = [], []
    for num_seeds, num_test, seed_sd in itertools.product((2, 3, 5), TESTED, (0.005, 0.02)):
        kind = dict(num_seeds=num_seeds, num_test=num_test)
        line = {"seeds": str(num_seeds), "num_test": f"{num_test:,}", "seed_sd": f"{100 * seed_sd:.1f}"}
        coverages = []
        for gap in (0.0, 0.01, 0.02, 0.05):
            apart, holds = difference_of_two(generator, gap, seed_sd, trials=trials, **kind)
            coverages.append(holds)
            line[f"{gap}"] = f"{100 * apart:.1f}"
            data.append(
                {
                    "kind": "power",
                    "gap": gap,
                    "seed_sd": seed_sd,
                    **kind,
                    "told_apart": apart,
                    "coverage": holds,
                }
            )
        line["coverage"] = f"{100 * float(np.mean(coverages)):.1f}"
        lines.append(line)
    columns = [
        Column("seeds", "seeds"),
        Column("num_test", "test examples"),
        Column("seed_sd", "seeds ±"),
        *(Column(f"{gap}", f"{100 * gap:.0f} points apart") for gap in (0.0, 0.01, 0.02, 0.05)),
        Column("coverage", "interval covers"),
    ]
    notes = [f"{trials:,} trials a cell, two mechanisms; the interval's column joins the four differences"]
    return Table(("Two mechanisms told apart (%)",), columns, lines, notes, data)


def _spread(seed_sd: float | Sequence[float]) -> str:
    if isinstance(seed_sd, float):
        return f"{100 * seed_sd:.1f}"
    return f"{100 * seed_sd[0]:.1f}, {100 * seed_sd[1]:.1f}"


def _error(trials: int) -> float:
    return 100 * float(np.sqrt(0.05 * 0.95 / max(trials, 1)))
