"""Checkpoints on disk: written atomically, read back only into the run they belong to."""

import os
from pathlib import Path
from typing import Any

import torch

from lra.errors import UserError

FORMAT = 2  # of what a run saves; raised with every change of it


def save(content: dict[str, Any], path: Path) -> None:
    """Writes beside `path` and renames, so that a killed process leaves the old file whole."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"format": FORMAT, **_apart(content)}, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
        part.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the checkpoint {path}: {error}; make room there, or set LRA_RUNS to another place"
        ) from error


def load(path: Path, *, config_hash: str, seed: int) -> dict[str, Any]:
    """The checkpoint at `path`; UserError if it is damaged, of another format or config."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        written, found = saved.get("format"), (saved["config_hash"], saved["seed"])
    except Exception as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}); delete it to start the run again"
        ) from error
    if written != FORMAT:
        raise UserError(
            f"checkpoint {path} was written by another version of lra; delete it, or add --force to begin "
            "anew"
        )
    if found != (config_hash, seed):
        raise UserError(
            f"checkpoint {path} belongs to another config (hash {found[0]}, seed {found[1]}); this run is "
            f"{config_hash}, seed {seed}. Delete its folder, or point LRA_RUNS at another one"
        )
    return saved


def _apart(content: Any) -> Any:
    """The content with copies of complex tensors: torch.save refuses those in one buffer with real ones."""
    if isinstance(content, dict):
        return {name: _apart(value) for name, value in content.items()}
    return content.clone() if isinstance(content, torch.Tensor) and content.is_complex() else content
