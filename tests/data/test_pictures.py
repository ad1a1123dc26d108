"""Pictures of stored data show what is stored."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
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


def drawn(monkeypatch, method):
    """What reaches the file by one method of the axes: [(its arguments, its options)]."""
    seen, plain = [], getattr(Axes, method)

    def noted(self, *arguments, **options):
        seen.append((arguments, options))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Axes, method, noted)
    return seen


def chart(task, out, length=64):
    """Draws the charts of a task; its store."""
    store = prepare(task, length)
    counted = {split: statistics(task, store, split) for split in ("train", "val", "test")}
    pictures.charts(task, store, counted, out)
    return store


def test_a_grid_holds_the_first_images_of_every_class(root, monkeypatch):
    task = Pixels(rows=60)
    store, seen = prepare(task, 64), drawn(monkeypatch, "imshow")
    out = pictures.grid(task, store, "test", root / "grid.png")
    split = store.split("test")
    wanted = [
        np.asarray(split.row(row)[0]).reshape(8, 8)
        for label in range(3)
        for row in np.flatnonzero(split.labels == label)[:8]
    ]
    assert all((image == b).all() for ((image,), _), b in zip(seen, wanted, strict=True))
    assert {(options["vmin"], options["vmax"]) for _, options in seen} == {(0, 255)}
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
    out = root / f"charts.{suffix}"
    chart(cls(), out)
    text = out.read_text() if suffix == "svg" else ""
    assert out.stat().st_size > 5000 and (suffix == "png" or "<svg" in text)


def test_the_bars_of_the_labels_are_their_shares_of_each_split(root, monkeypatch):
    seen = drawn(monkeypatch, "bar")
    store = chart(Pixels(rows=60), root / "charts.png")
    assert len(seen) == 3
    for index, ((places, heights, *_), options) in enumerate(seen):
        labels = store.split(options["label"]).labels
        np.testing.assert_allclose(heights, 100 * np.bincount(labels, minlength=3) / 60)
        assert np.rint(places).tolist() == [0, 1, 2] and options["label"] == ("train", "val", "test")[index]


def test_the_bars_of_the_symbols_are_the_shares_of_the_most_frequent_ones(root, monkeypatch):
    seen = drawn(monkeypatch, "bar")
    tokens = np.asarray(chart(Synthetic(rows=60), root / "charts.png").split("train").tokens)
    (_, heights), _ = seen[3]  # after those of the labels
    np.testing.assert_allclose(heights, np.sort(100 * np.bincount(tokens)[1:] / len(tokens))[::-1])


def test_the_curves_of_the_grey_levels_are_their_shares_of_each_split(root, monkeypatch):
    seen = drawn(monkeypatch, "plot")
    store = chart(Pixels(rows=60), root / "charts.png")
    assert [options["label"] for _, options in seen] == ["train", "val", "test"]
    for (levels, shares), options in seen:
        tokens = np.asarray(store.split(options["label"]).tokens)
        found, counts = np.unique(tokens, return_counts=True)
        assert levels == found.tolist()
        np.testing.assert_allclose(shares, 100 * counts / len(tokens))


def test_the_histograms_of_the_lengths_are_shares_with_the_longest_in_the_last_bin(root, monkeypatch):
    seen = drawn(monkeypatch, "hist")
    store = chart(Pairs(rows=200), root / "charts.png", length=1000)
    longest = max(store.manifest["splits"][name]["length"]["99"] for name in ("train", "val", "test"))
    assert max(store.split("train").lengths) > longest
    assert [options["label"] for _, options in seen] == ["train", "val", "test"]
    for (lengths, bins), options in seen:
        assert (bins[0], bins[-1]) == (0, longest) and sum(options["weights"]) == pytest.approx(100)
        assert len(set(options["weights"])) == 1
        assert lengths.tolist() == np.minimum(store.split(options["label"]).lengths, longest).tolist()


def test_the_mean_image_is_that_of_the_training_images(root, monkeypatch):
    seen = drawn(monkeypatch, "imshow")
    split = chart(Pixels(rows=60), root / "charts.png").split("train")
    (((mean,), _),) = seen
    np.testing.assert_allclose(mean, np.asarray(split.tokens, float).reshape(60, 8, 8).mean(0))


def test_a_place_that_cannot_be_written_is_refused(root):
    task = Pixels()
    store = prepare(task, 64)
    for out, message in ((root / "grid.txt", "ends in .png"), (Path("/no/such/grid.png"), "not a folder")):
        with pytest.raises(UserError, match=message):
            pictures.grid(task, store, "train", out)
