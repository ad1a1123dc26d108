"""What predictions are worth beyond their mean."""

import numpy as np


def accuracy_by_length(right: np.ndarray, lengths: np.ndarray, documents: int) -> dict[str, dict] | None:
    """Accuracy and count per quarter of the test rows by real length; None where all rows are equally
    long.
    """
    per_row = lengths.reshape(-1, documents).sum(1)
    edges = np.unique(np.quantile(per_row, [0, 0.25, 0.5, 0.75, 1]).round().astype(int))
    if len(edges) < 2:
        return None
    bucket = np.clip(np.searchsorted(edges, per_row, side="right") - 1, 0, len(edges) - 2)
    found = {}
    for index in range(len(edges) - 1):
        inside = bucket == index
        if inside.any():
            name = f"{edges[index]}-{edges[index + 1] - (index + 2 < len(edges))}"
            found[name] = {"accuracy": float(right[inside].mean()), "num": int(inside.sum())}
    return found
