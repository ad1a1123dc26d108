"""Rows for other tools, as one .npz file."""

import os
from pathlib import Path

import numpy as np

from lra.data.store import Store
from lra.errors import UserError


def export(store: Store, split_name: str, out: Path, limit: int | None = None) -> int:
    """Write the first `limit` rows (None: all) of a split to `out` and return how many there were.

    The file holds `tokens` (flat), `offsets` [rows * documents + 1], `labels` [rows] and `vocab` (the meaning
    of each id; empty for pixels). It appears at once, when it is complete.
    """
    split = store.split(split_name)
    rows = len(split) if limit is None else min(limit, len(split))
    offsets = np.asarray(split.offsets[: rows * split.documents + 1])
    partial = out.with_name(f".{out.name}.partial")
    try:
        with open(partial, "wb") as handle:
            np.savez(
                handle,
                tokens=split.tokens[: offsets[-1]],
                offsets=offsets,
                labels=split.labels[:rows],
                vocab=np.array(store.vocab, dtype=np.str_),
            )
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {out} ({error.strerror}); give another place with --out FILE.npz"
        ) from error
    return rows
