"""Pictures of stored data show what is stored."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_tasks import Pairs, Pixels, Synthetic

from lra.data import pictures
from lra.data.prepare import prepare
from lra.data.show import statistics
from lra.errors import UserError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return tmp_path


def drawn(monkeypatch):
    """What reaches the file: [(image, row of the grid)]."""
    seen = []
    from matplotlib.axes import Axes

    plain = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, image, **kw: (seen.append(image), plain(self, image, **kw))[1]
    )
    return seen


def test_a_grid_holds_the_first_images_of_every_class(root, monkeypatch):
    task = Pixels(rows=60)
    store, seen = prepare(task, 64), drawn(monkeypatch)
    out = pictures.grid(task, store, "test", root / "grid.png")
    split = store.split("test")
    wanted = [
        np.asarray(split.row(row)[0]).reshape(8, 8)
        for label in range(3)
        for row in np.flatnonzero(split.labels == label)[:8]
    ]
    assert len(seen) == len(wanted) and all((a == b).all() for a, b in zip(seen, wanted, strict=True))
    assert Image.open(out).size[0] > 800


def test_a_class_without_images_leaves_an_empty_line(root):
    task = Pixels(rows=1)
    assert pictures.grid(task, prepare(task, 64), "val", root / "grid.png").is_file()


def test_a_grid_of_words_is_refused(root):
    with pytest.raises(UserError, match="has no images"):
        pictures.grid(Synthetic(), prepare(Synthetic(), 50), "train", root / "grid.png")


@pytest.mark.parametrize("cls", [Synthetic, Pairs, Pixels])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_charts_are_drawn_for_every_kind_of_task(cls, suffix, root):
    task = cls()
    store = prepare(task, 64)
    counted = {split: statistics(task, store, split) for split in ("train", "val", "test")}
    out = pictures.charts(task, store, counted, root / f"charts.{suffix}")
    text = out.read_text() if suffix == "svg" else ""
    assert out.stat().st_size > 5000 and (suffix == "png" or "<svg" in text)


def test_a_place_that_cannot_be_written_is_refused(root):
    task = Pixels()
    store = prepare(task, 64)
    for out, message in ((root / "grid.txt", "ends in .png"), (Path("/no/such/grid.png"), "not a folder")):
        with pytest.raises(UserError, match=message):
            pictures.grid(task, store, "train", out)
