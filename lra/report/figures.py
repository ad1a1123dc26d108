"""Every kind of figure by name, in files or as a list for a page: the one place that draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lra.errors import UserError, unknown
from lra.report.figure import LOOK, NamedFigure, NoMaterial, check_path, save

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    "speed": "accuracy against speed, memory as area",
    "cost": "time and memory against length, crossovers with fused softmax marked",
    "curves": "learning curves with their spread over seeds",
    "lengths": "accuracy by real length of the test examples",
    "heat": "mechanisms by tasks as a heat map",
}
OF_LINES = ("cost", "curves", "lengths")  # where `models` chooses the lines in colour


def draw(kind: str, frame: "pd.DataFrame", models: Sequence[str] | None = None) -> list[NamedFigure]:
    """The figures of one kind; UserError for an unknown kind and for records that have nothing for it."""
    from matplotlib import rc_context

    from lra.report import plot_accuracy, plot_cost, plot_heat, plots
    from lra.report.style import styles

    if kind not in KINDS:
        raise unknown("figure", kind, KINDS)
    if models and kind not in OF_LINES:
        raise UserError(
            f"--models chooses which lines are in colour, and figure '{kind}' has none; leave it out, "
            f"or draw {', '.join(OF_LINES)}"
        )
    looks = styles(str(name) for name in frame["model"].dropna())  # one look in all figures of a frame
    with rc_context(LOOK):
        if kind == "speed":
            return plots.accuracy_speed(frame, looks)
        if kind == "heat":
            return plot_heat.heat(frame)
        lines = {"cost": plot_cost.cost, "curves": plot_accuracy.curves, "lengths": plot_accuracy.lengths}
        return lines[kind](frame, looks, models)


def write(
    kind: str, frame: "pd.DataFrame", path: str | Path, models: Sequence[str] | None = None
) -> list[Path]:
    """Draws into files and returns them; a second figure goes to `name-2.png` beside the first, and so on."""
    path = Path(path)
    check_path(path)
    written = []
    for number, named in enumerate(draw(kind, frame, models), start=1):
        target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        save(named.figure, target)
        written.append(target)
    return written


def every_figure(frame: "pd.DataFrame") -> list[NamedFigure]:
    """The figures of all kinds for which the records have material, in the order of `KINDS`."""
    found = []
    for kind in KINDS:
        try:
            found += draw(kind, frame)
        except NoMaterial:
            continue
    return found
