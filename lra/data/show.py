"""Looking at stored rows: examples as text, and what a split contains in numbers."""

from typing import Any

import numpy as np

from lra.data.store import Split, Store, summary
from lra.errors import UserError
from lra.tasks.base import Task

_MOST_FREQUENT = 20


def examples(task: Task, store: Store, split_name: str, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows of a split, decoded: split, row, label, class, lengths, documents."""
    split, classes = store.split(split_name), task.class_names()
    shown = []
    for index in range(min(limit, len(split))):
        documents, label = split.row(index), int(split.labels[index])
        _check_ids(store, split_name, max(int(document.max()) for document in documents))
        shown.append(
            {
                "split": split_name,
                "row": index,
                "label": label,
                "class": classes[label],
                "lengths": [len(document) for document in documents],
                "documents": [task.decode(document, store.vocab) for document in documents],
            }
        )
    return shown


def _check_ids(store: Store, split_name: str, largest: int) -> None:
    if store.vocab and largest >= len(store.vocab):
        raise UserError(
            f"{store.path}: {split_name} has the id {largest}, the vocabulary has {len(store.vocab)} "
            f"symbols; build it again: {store.remedy} --force"
        )


def statistics(task: Task, store: Store, split_name: str) -> dict[str, Any]:
    """Rows, label shares, lengths, shares of the symbols that occur, and what the task itself counts."""
    split = store.split(split_name)
    counted = summary(split.lengths, split.labels, task.num_classes)
    counts = symbol_counts(split)
    names = store.vocab or [str(value) for value in range(len(counts))]
    _check_ids(store, split_name, len(counts) - 1)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return {
        "rows": counted["rows"],
        "tokens": counted["tokens"],
        "labels": {str(label): count / len(split) for label, count in enumerate(counted["label_counts"])},
        "majority": max(counted["label_counts"]) / len(split),
        "length": counted["length"],
        "symbols": {names[index]: float(counts[index] / counts.sum()) for index in order},
        **task.statistics(split),
    }


def symbol_counts(split: Split) -> np.ndarray:
    """How often each stored number occurs, [largest number + 1]."""
    counts = np.zeros(np.iinfo(split.tokens.dtype).max + 1, np.int64)
    for _, part in split.chunks():
        counts += np.bincount(part.tokens, minlength=len(counts))
    return counts[: np.flatnonzero(counts).max() + 1]


def examples_text(shown: list[dict[str, Any]]) -> str:
    """Examples for people: a line with the label, then the documents."""
    parts = []
    for example in shown:
        lengths = " and ".join(f"{length:,}" for length in example["lengths"])
        named = "" if example["class"] == str(example["label"]) else f" ({example['class']})"
        parts.append(
            f"{example['split']} {example['row']}   label {example['label']}{named}   length {lengths}"
        )
        parts += [f"{document}\n" for document in example["documents"]]
    return "\n".join(parts)


def statistics_text(counted: dict[str, Any]) -> str:
    """Statistics for people: one line for each quantity, shares in percent."""
    lines = []
    for name, value in counted.items():
        if not isinstance(value, dict):
            lines.append(f"{name}: {_percent(value) if name == 'majority' else format(value, ',')}")
            continue
        if name == "length" and value["min"] == value["max"]:
            shown = [f"{value['max']:,} in every document"]
        elif name in ("length", "operators per tree"):
            shown = [f"{_quantile(key)} {_number(number)}" for key, number in value.items()]
        else:
            shown = [f"{key} {_percent(share)}" for key, share in list(value.items())[:_MOST_FREQUENT]]
        more = f", ... ({len(value)} in all)" if len(value) > len(shown) > 1 else ""
        lines.append(f"{name}: {', '.join(shown)}{more}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _quantile(key: str) -> str:
    return f"{key} %:" if key.isdigit() else key
