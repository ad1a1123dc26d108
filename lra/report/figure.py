"""What every figure shares: its look, where it may be written, how it is saved, and how a page embeds it."""

import io
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from lra.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
INK, NOTE, FAINT, GRID = "#222222", "#666666", "#8A8A8A", "#E8E8E8"
TITLE, NOTE_SIZE, SMALL = 10.5, 8, 7.5  # points
LINE_HEIGHT = 0.155  # inches from one note to the next
LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.hinting": "no_hinting",  # a text is as wide in the file as it was when its place was chosen
    "svg.hashsalt": "lra",  # the same records give the same file
}


class NoMaterial(UserError):
    """The records hold nothing that a kind of figure could show."""


@dataclass(frozen=True)
class NamedFigure:
    """`name` is for files and addresses, `title` for people."""

    name: str
    title: str
    figure: "Figure"


def new(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches that can measure its texts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None)
    FigureCanvasAgg(figure)
    return figure


def text_size(figure: "Figure", text: str, size: float) -> tuple[float, float]:
    """Width and height in pixels of a text of `size` points."""
    artist = figure.text(0, 0, text, fontsize=size)
    box = artist.get_window_extent(figure.canvas.get_renderer())
    artist.remove()
    return box.width, box.height


def fit(parts: Sequence[str], width: float, size: float = SMALL) -> list[str]:
    """Parts side by side on as few lines of `width` inches as hold them; only a part longer than a line is
    broken, between its words.
    """
    ruler = new(1, 1)

    def fits(text: str) -> bool:
        return text_size(ruler, text, size)[0] / ruler.dpi <= width

    lines: list[str] = []
    for part in parts:
        for index, word in enumerate([part] if fits(part) else part.split()):
            longer = f"{lines[-1]}{' ' if index else '   '}{word}" if lines else word
            if lines and fits(longer):
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def heading(axes: "Axes", title: str, lines: Sequence[str] = ()) -> None:
    """A bold title over a panel, and under it in small lines what else has to be known."""
    step = SMALL * 1.35
    axes.set_title(title, loc="left", fontsize=TITLE, fontweight="bold", color=INK, pad=9 + step * len(lines))
    for index, line in enumerate(reversed(lines)):
        place = (0, 6 + step * index)
        axes.annotate(
            line, (0, 1), place, "axes fraction", textcoords="offset points", fontsize=SMALL, color=NOTE
        )


def note_lines(width: float, notes: Sequence[str]) -> list[str]:
    """The notes below a figure `width` inches wide, as lines that fit."""
    limit = int((width - 0.3) * 72 / (0.53 * NOTE_SIZE))
    return [line for note in notes for line in textwrap.wrap(note, limit)]


def write_notes(figure: "Figure", lines: Sequence[str]) -> None:
    """Lines at the foot of a figure, the last one lowest."""
    width, height = figure.get_size_inches()
    for index, line in enumerate(reversed(lines)):
        y = (0.12 + LINE_HEIGHT * index) / height
        figure.text(0.15 / width, y, line, fontsize=NOTE_SIZE, color=NOTE, va="bottom")


def tick(value: float) -> str:
    """A number on an axis: `500`, `2k`, `0.2`."""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{prefix}"
    return f"{value:g}"


def check_path(path: Path) -> None:
    """Raises UserError for a suffix that is no figure's, and for a place that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw '{path}': a figure ends in {', '.join(SUFFIXES)}; rename the output")
    if not path.parent.is_dir() or path.is_dir():
        what = "is a folder" if path.is_dir() else f"'{path.parent}' is not a folder"
        raise UserError(f"cannot write '{path}': {what}; name a file in an existing folder")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure at once and without a date, so that equal figures are equal files."""
    from matplotlib import rc_context

    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    dates = {".svg": "Date", ".pdf": "CreationDate"}
    key = dates.get(path.suffix.lower())
    try:
        with rc_context(LOOK):
            figure.savefig(temporary, dpi=200, metadata={key: None} if key else None)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def as_svg(figure: "Figure", prefix: str, *, title: str = "") -> str:
    """The figure as an <svg> element for an HTML page; equal figures give equal text.

    Ids and the style rule of the element are its own: several figures with different prefixes can stand in
    one page.
    """
    from matplotlib import rc_context

    if not re.fullmatch(r"[A-Za-z][\w-]*", prefix):
        raise ValueError(f"'{prefix}' cannot begin an id: use a letter, then letters, digits, '-' or '_'")
    file = io.StringIO()
    with rc_context(LOOK):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace("*{", f"#{prefix} *{{")
    name = f"<title>{escape(title)}</title>" if title else ""
    opening, rest = text.split(">", 1)
    return f'<svg id="{prefix}" role="img"{opening.removeprefix("<svg")}>{name}{rest}'
