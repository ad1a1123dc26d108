"""Every pair of rows of one table, tested four ways; the verdict is that of the joint test after Holm.

McNemar alone is no verdict: it compares two trained models, and calls equal mechanisms different far more
often than 5 % once their seeds scatter. A permutation of the seeds alone is none either: with 3 + 3 seeds
its p-value cannot be below 0.1. `lra.report.simulation` shows both.
"""

import itertools

import numpy as np

from lra.report import stats
from lra.report.cells import Column, Table, p_text
from lra.report.groups import Group, Row

PAIRS = [
    Column("row", "row", left=True, wrap=True),
    Column("other", "other", left=True, wrap=True),
    Column("difference", "difference"),
    Column("ci95", "95 %", drop=5, left=True),
    Column("holm_p", "Holm p"),
    Column("verdict", "verdict", left=True),
    Column("joint_p", "joint p", drop=4),
    Column("permutation_p", "permutation p", drop=3, left=True),
    Column("discordant", "only row : other", drop=2),
    Column("mcnemar_p", "McNemar p", drop=1, left=True),
]
TOLD_APART, TIED = "told apart", "tied"


def pair_table(group: Group) -> Table | None:
    """One line per pair of rows that have an accuracy, the better row first; None for fewer than two rows."""
    tested = [row for row in group.rows if row.summary.mean is not None]
    tested.sort(key=lambda row: -row.summary.mean)
    if len(tested) < 2:
        return None
    data = [pair_data(group, a, b) for a, b in itertools.combinations(tested, 2)]
    title = ("Pairs of rows", *group.title())
    return Table(title, PAIRS, [_texts(line) for line in data], _footnotes(data), data, keys=2)


def pair_data(group: Group, first: Row, second: Row) -> dict:
    """The plain numbers of one pair; None for what these runs cannot tell."""
    swapped = (second.label, first.label) in group.tests
    test = group.tests.get((second.label, first.label) if swapped else (first.label, second.label))
    joint, holm_p = test if test is not None else (None, None)
    low, high = (None, None) if joint is None else (joint.low, joint.high)
    if joint is not None and swapped:
        low, high = -joint.high, -joint.low
    same = _same_examples(first, second)
    models = stats.mcnemar(first.correct, second.correct) if same else None
    scores = [
        [run["test_accuracy"] for run in row.ok if run["test_accuracy"] is not None]
        for row in (first, second)
    ]
    deal = stats.permutation(*scores) if min(map(len, scores)) > 1 else None
    return {
        "kind": "pair",
        **group.facts,
        "row": first.label,
        "other": second.label,
        "num_seeds_row": len(scores[0]),
        "num_seeds_other": len(scores[1]),
        "num_paired": first.correct.shape[1] if same else None,
        "difference_points": 100 * (first.summary.mean - second.summary.mean),
        "difference_low_points": None if low is None else 100 * low,
        "difference_high_points": None if high is None else 100 * high,
        "num_seed_pairs": models.num_pairs if models else None,
        "only_row": models.only_first if models else None,
        "only_other": models.only_second if models else None,
        "mcnemar_p_smallest": models.p_values[0] if models else None,
        "mcnemar_p_median": models.p_values[1] if models else None,
        "mcnemar_p_largest": models.p_values[2] if models else None,
        "permutation_p": deal.p_value if deal else None,
        "permutation_p_least_possible": deal.smallest if deal else None,
        "joint_p": joint.p_value if joint else None,
        "holm_p": holm_p,
        "verdict": None if holm_p is None else TOLD_APART if holm_p <= 1 - stats.LEVEL else TIED,
    }


def _same_examples(first: Row, second: Row) -> bool:
    arrays = (first.correct, second.correct)
    return all(isinstance(a, np.ndarray) for a in arrays) and arrays[0].shape[1] == arrays[1].shape[1]


def _texts(line: dict) -> dict[str, str]:
    def between(low: str, high: str) -> str:
        return "-" if line[low] is None else f"{line[low]:+.1f} to {line[high]:+.1f}"

    models, deal = line["num_seed_pairs"] is not None, line["permutation_p"]
    p_values = [line[f"mcnemar_p_{which}"] for which in ("smallest", "median", "largest")]
    return {
        "row": line["row"],
        "other": line["other"],
        "difference": f"{line['difference_points']:+.1f}",
        "ci95": between("difference_low_points", "difference_high_points"),
        "discordant": f"{line['only_row']:,} : {line['only_other']:,}" if models else "-",
        "mcnemar_p": _range(p_values) if models else "-",
        "permutation_p": "-"
        if deal is None
        else f"{p_text(deal)} (min {p_text(line['permutation_p_least_possible'])})",
        "joint_p": p_text(line["joint_p"]),
        "holm_p": p_text(line["holm_p"]),
        "verdict": line["verdict"] or "-",
    }


def _range(p_values: list[float]) -> str:
    """`0.008 / 0.28 / 0.92`; one of them where they read the same."""
    texts = [p_text(value) for value in p_values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _footnotes(data: list[dict]) -> list[str]:
    joint = [line for line in data if line["holm_p"] is not None]
    found = ["difference: row minus other, in points of accuracy"]
    if joint:
        found[0] += "; 95 %: its interval over seeds and test examples, of this pair alone"
        plural = "s" * (len(joint) > 1)
        found.append(
            f"verdict: joint test over seeds and examples, Holm over {len(joint)} pair{plural}, at 0.05; "
            "the letters of the table above are the same test"
        )
    if any(line["num_seed_pairs"] for line in data):
        found.append(
            "only row : other: examples that one model got right and the other did not, summed over every "
            "seed of one with every seed of the other; McNemar p: smallest / median / largest (mid-p); "
            "it compares trained models: where seeds scatter it rejects equal mechanisms, hence no verdict"
        )
    if any(line["permutation_p"] is not None for line in data):
        found.append(
            "permutation p: over all ways to deal the seeds to the two rows; min: the least that these seeds "
            "can reach (3 + 3 seeds: 0.10)"
        )
    lacking = sum(line["holm_p"] is None for line in data)
    if lacking:
        pairs = f"{lacking} pair{'s' * (lacking > 1)}"
        found.append(
            f"no verdict on {pairs}: it takes two seeds and test predictions with labels of both rows"
        )
    return found
