"""Pictures of stored data: a grid of images, and the charts of `lra data stats`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.data.store import Split, Store
from lra.errors import UserError
from lra.report.figure import INK, LOOK, check_path, save
from lra.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 8
_TINTS = {"train": "#0072B2", "val": "#E69F00", "test": "#009E73"}
_MOST_FREQUENT = 24


def grid(task: Task, store: Store, split_name: str, out: Path) -> Path:
    """Draws the first images of every class of a split, eight a row, as they are stored; returns the file."""
    import matplotlib
    from matplotlib.figure import Figure

    if task.stored != "pixels":
        raise UserError(f"{task.name} has no images to draw; leave --out away")
    check_path(out)
    split = store.split(split_name)
    repeats = 1 if task.num_classes > 4 else 4 // task.num_classes
    rows = [
        (label, members)
        for label in range(task.num_classes)
        for members in _first_of(split, label, repeats * COLUMNS)
    ]
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(COLUMNS * 1.1 + 0.9, len(rows) * 1.1 + 0.5))
        figure.suptitle(f"{store.data_variant}, {split_name} ({store.data_origin})", color=INK, fontsize=9)
        cells = figure.subplots(len(rows), COLUMNS, squeeze=False)
        for (label, members), line in zip(rows, cells, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, row in zip(line, members, strict=False):
                axes.imshow(_image(split, row), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            name = task.class_names()[label]
            line[0].text(
                -0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", color=INK, fontsize=8
            )
        figure.subplots_adjust(
            left=0.9 / figure.get_figwidth(), right=0.99, bottom=0.01, top=1 - 0.4 / figure.get_figheight(),
            wspace=0.06, hspace=0.06,
        )  # fmt: skip
        save(figure, out)
    return out


def charts(task: Task, store: Store, counted: dict[str, dict[str, Any]], out: Path) -> Path:
    """Draws the numbers of `lra data stats`: lengths or grey levels, labels, and the most frequent symbols or
    the mean image; returns the file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    check_path(out)
    pixels = task.stored == "pixels"
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        figure.suptitle(f"{store.data_variant} ({store.data_origin})", color=INK, fontsize=9)
        left, middle, right = figure.subplots(1, 3)
        (_grey_levels if pixels else _lengths)(left, store, counted)
        _labels(middle, task, counted)
        (_mean_image if pixels else _symbols)(right, store, counted)
        save(figure, out)
    return out


def _first_of(split: Split, label: int, count: int) -> list[list[int]]:
    """The first rows with a label, `COLUMNS` at a time; at least one line, even without a row."""
    members = np.flatnonzero(split.labels == label)[:count].tolist()
    return [members[first : first + COLUMNS] for first in range(0, max(1, len(members)), COLUMNS)]


def _image(split: Split, row: int) -> np.ndarray:
    pixels = np.asarray(split.row(row)[0])
    size = round(len(pixels) ** 0.5)
    return pixels.reshape(size, size)


def _lengths(axes: "Axes", store: Store, counted: dict[str, dict[str, Any]]) -> None:
    longest = max(numbers["length"]["99"] for numbers in counted.values())
    bins = np.linspace(0, longest, 61)
    for split in counted:
        lengths = store.split(split).lengths
        axes.hist(
            np.minimum(lengths, longest), bins, weights=np.full(len(lengths), 100 / len(lengths)),
            histtype="step", color=_TINTS[split], label=split,
        )  # fmt: skip
    axes.set(xlabel="length (the last bin holds the longest 1 %)", ylabel="share of documents, %")
    axes.legend(frameon=False)


def _grey_levels(axes: "Axes", store: Store, counted: dict[str, dict[str, Any]]) -> None:
    drawn = []
    for split, numbers in counted.items():
        shares = {int(level): 100 * share for level, share in numbers["symbols"].items()}
        levels = sorted(shares)
        drawn.append([shares[level] for level in levels])
        axes.plot(levels, drawn[-1], color=_TINTS[split], lw=0.9, label=split)
    axes.set(xlabel="grey level", ylabel="share of pixels, %")
    if max(map(max, drawn)) > 100 * min(map(min, drawn)):
        axes.set(ylabel="share of pixels, % (log)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _labels(axes: "Axes", task: Task, counted: dict[str, dict[str, Any]]) -> None:
    wide = 0.8 / len(counted)
    for index, (split, numbers) in enumerate(counted.items()):
        places = np.arange(task.num_classes) + (index - (len(counted) - 1) / 2) * wide
        shares = [100 * share for share in numbers["labels"].values()]
        axes.bar(places, shares, wide * 0.92, color=_TINTS[split], label=split)
    names = task.class_names()
    turned = {"rotation": 40, "ha": "right"} if max(map(len, names)) > 3 and len(names) > 4 else {}
    axes.set_xticks(range(task.num_classes), names, **turned)
    axes.set(xlabel="label", ylabel="share of rows, %")


def _symbols(axes: "Axes", store: Store, counted: dict[str, dict[str, Any]]) -> None:
    split, numbers = next(iter(counted.items()))
    shares = list(numbers["symbols"].items())[:_MOST_FREQUENT]
    axes.bar(range(len(shares)), [100 * share for _, share in shares], color=_TINTS[split])
    names = ["space" if name == " " else name for name, _ in shares]
    axes.set_xticks(range(len(shares)), names, rotation=90, fontsize=7, parse_math=False)
    more = f", {len(shares)} of {len(numbers['symbols'])}" if len(numbers["symbols"]) > len(shares) else ""
    axes.set(xlabel=f"most frequent symbols of {split}{more}", ylabel="share of tokens, %")


def _mean_image(axes: "Axes", store: Store, counted: dict[str, dict[str, Any]]) -> None:
    split = store.split(next(iter(counted)))
    part = split.part(0, min(len(split), 2000))
    size = round(float(part.lengths[0]) ** 0.5)
    mean = part.tokens.reshape(-1, size, size).mean(0)
    axes.imshow(mean, cmap="gray", interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"mean of {len(part):,} images of {split.name}", fontsize=9, color=INK)
