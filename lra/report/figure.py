"""What every figure shares: its look, where it may be written, how it is saved, and how a page embeds it."""

import io
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
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
    "text.parse_math": False,  # a `$` in a name is a dollar sign
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


def text_size(figure: "Figure", text: str, size: float, weight: str = "normal") -> tuple[float, float]:
    """Width and height in pixels of a text of `size` points."""
    artist = figure.text(0, 0, text, fontsize=size, fontweight=weight)
    box = artist.get_window_extent(figure.canvas.get_renderer())
    artist.remove()
    return box.width, box.height


def fit(parts: Sequence[str], width: float, size: float = SMALL, weight: str = "normal") -> list[str]:
    """Parts side by side on as few lines of `width` inches as hold them; only a part longer than a line is
    broken, between its words, and only a word longer than a line within.
    """
    ruler = new(1, 1)

    def fits(text: str) -> bool:
        return text_size(ruler, text, size, weight)[0] / ruler.dpi <= width

    lines: list[str] = []
    for part in parts:
        for index, word in enumerate([part] if fits(part) else part.split()):
            longer = f"{lines[-1]}{' ' if index else '   '}{word}" if lines else word
            if lines and fits(longer):
                lines[-1] = longer
                continue
            while len(word) > 1 and not fits(word):
                held = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or fits(word[:n]))
                lines.append(word[:held])
                word = word[held:]
            lines.append(word)
    return lines


@dataclass(frozen=True)
class Heading:
    """A bold title over a panel, and under it in small lines what else has to be known."""

    title: list[str]
    rest: list[str]

    @classmethod
    def of(cls, title: str, rest: Sequence[str], width: float) -> "Heading":
        """Broken into lines of at most `width` inches."""
        return cls(fit([title], width, TITLE, "bold"), fit(rest, width))

    @property
    def height(self) -> float:
        """Inches above the panel."""
        return (9 + REST_STEP * len(self.rest) + 1.2 * TITLE * len(self.title)) / 72 + 0.08


REST_STEP = SMALL * 1.35  # points from one small line of a heading to the next


def write_heading(axes: "Axes", heading: Heading) -> None:
    text, pad = "\n".join(heading.title), 9 + REST_STEP * len(heading.rest)
    axes.set_title(text, loc="left", fontsize=TITLE, fontweight="bold", color=INK, pad=pad)
    for index, line in enumerate(reversed(heading.rest)):
        place = (0, 6 + REST_STEP * index)
        axes.annotate(
            line, (0, 1), place, "axes fraction", textcoords="offset points", fontsize=SMALL, color=NOTE
        )


def note_lines(width: float, notes: Sequence[str]) -> list[str]:
    """The notes below a figure `width` inches wide, as lines that fit."""
    limit = int((width - 0.3) * 72 / (0.53 * NOTE_SIZE))
    return [line for note in notes for line in textwrap.wrap(note, limit)]


def some(names: Iterable[str], count: int = 4) -> str:
    """`a, b and 12 more`: the first names of a list, each once."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def write_notes(figure: "Figure", lines: Sequence[str]) -> None:
    """Lines at the foot of a figure, the last one lowest."""
    width, height = figure.get_size_inches()
    for index, line in enumerate(reversed(lines)):
        y = (0.12 + LINE_HEIGHT * index) / height
        figure.text(0.15 / width, y, line, fontsize=NOTE_SIZE, color=NOTE, va="bottom")


def tick(value: float) -> str:
    """A number on an axis: `500`, `2k`, `0.2`."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{prefix}"
    return f"{value:g}"


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis, the roundest of which three lie between its ends."""
    found: list[float] = []
    for digits in LOG_DIGITS:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [d * 10.0**power for power in powers for d in digits if low <= d * 10.0**power <= high]
        if len(found) >= 3:
            return found
    return found


LOG_DIGITS = (
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9),
)


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """Labels of tables as figures have room for them: without the number of parameters and the hash of the
    configuration, and of at most `LABEL` characters, wherever the rest tells a label from all others.
    """
    labels = list(dict.fromkeys(labels))
    found: dict[str, str] = {}
    for shorten in (lambda label: _HASH.sub("", _without_params(label)), _without_params, str):
        waiting = [label for label in labels if label not in found]
        texts = {label: shorten(label) for label in waiting}
        uses = Counter([*texts.values(), *found.values()])
        found |= {label: text for label, text in texts.items() if uses[text] == 1}
    cut = {label: _cut(found.get(label, label)) for label in labels}
    uses = Counter(cut.values())
    return {label: cut[label] if uses[cut[label]] == 1 else found.get(label, label) for label in labels}


_HASH = re.compile(r" \[[0-9a-f]{6}\]$")


LABEL = 44  # characters


def _cut(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 16]}…{label[-15:]}"


def _without_params(label: str) -> str:
    label = re.sub(r" \(num_params=\d+\)", "", label)
    return re.sub(r"(, num_params=\d+(?=[,)])|num_params=\d+, )", "", label)


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
