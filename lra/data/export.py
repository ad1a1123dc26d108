"""Rows for other tools, as one .npz file."""

import os
import zipfile
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
    small = {"offsets": offsets, "labels": split.labels[:rows], "vocab": np.array(store.vocab, dtype=np.str_)}
    partial = out.with_name(f".{out.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
            with archive.open("tokens.npy", "w", force_zip64=True) as member:
                header = {
                    "descr": split.tokens.dtype.str,
                    "fortran_order": False,
                    "shape": (int(offsets[-1]),),
                }
                np.lib.format.write_array_header_1_0(member, header)
                for first, part in split.chunks():  # a Path-X split is larger than many memories
                    if first < rows:
                        stop = int(part.offsets[min(len(part), rows - first) * part.documents])
                        member.write(part.tokens[:stop].tobytes())
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {out} ({error.strerror}); give another place with --out FILE.npz"
        ) from error
    return rows
