"""What every figure shares: its look, where it may be written, and how it is saved."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lra.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
INK, FAINT = "#222222", "#8A8A8A"
LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "lra",  # the same records give the same file
}


def check_path(path: Path) -> None:
    """Raises UserError for a suffix that is no figure's, and for a place that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw '{path}': a figure ends in {', '.join(SUFFIXES)}; rename the output")
    if not path.parent.is_dir() or path.is_dir():
        what = "is a folder" if path.is_dir() else f"'{path.parent}' is not a folder"
        raise UserError(f"cannot write '{path}': {what}; name a file in an existing folder")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure at once and without a date, so that equal figures are equal files."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    undated = {} if path.suffix.lower() == ".png" else {"metadata": {"CreationDate": None}}
    undated = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else undated
    try:
        figure.savefig(temporary, dpi=200, **undated)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
