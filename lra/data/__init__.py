"""Data on disk: prepare, store, verify, show, export, and batches made from it."""

import os
from pathlib import Path


def data_root() -> Path:
    """$LRA_DATA, else ./data."""
    return Path(os.environ.get("LRA_DATA") or "data")
