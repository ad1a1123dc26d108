"""The figure: it exists, is refused with a reason, and its names neither collide nor leave the panel."""

import itertools

import numpy as np
import pytest
from report_samples import write_failure, write_run

from lra import records
from lra.errors import UserError
from lra.report import plots, style
from lra.report.labels import Box, Spot, place_labels


def small_sweep(root, **fields):
    for index, model in enumerate(("softmax", "linear", "identity")):
        for seed in range(2):
            write_run(
                root, model, seed, 0.3 + 0.02 * index, kept=False, tokens_per_s=1e6 * (index + 1), **fields
            )
    return records.load(root)


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_suffix_decides_the_format(tmp_path, suffix, magic):
    target = tmp_path / f"figure{suffix}"
    assert plots.accuracy_speed(small_sweep(tmp_path / "runs"), target) == [target]
    assert target.read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [target.name]


def test_figures_are_the_same_bytes_each_time(tmp_path):
    frame = small_sweep(tmp_path / "runs")
    for name in ("a.svg", "b.svg"):
        plots.accuracy_speed(frame, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_more_than_four_panels_go_on_to_a_second_file(tmp_path):
    for length in (500, 600, 700, 800, 900):
        write_run(tmp_path / "runs", "linear", 0, 0.3, length=length, tokens_per_s=1e6, kept=False)
    written = plots.accuracy_speed(records.load(tmp_path / "runs"), tmp_path / "figure.png")
    assert [path.name for path in written] == ["figure.png", "figure-2.png"]


def test_one_point_without_memory_is_drawn(tmp_path):
    write_run(tmp_path / "runs", "linear", 0, 0.3, examples_per_s=90.0, majority_accuracy=None, kept=False)
    assert plots.accuracy_speed(records.load(tmp_path / "runs"), tmp_path / "one.png")


def test_nothing_to_draw_is_an_error_that_says_what_is_needed(tmp_path):
    write_run(tmp_path / "runs", "linear", 0, 0.3, kept=False)
    write_failure(tmp_path / "runs", "reformer", 0, "failed", "boom")
    with pytest.raises(UserError, match="both a test accuracy and a speed"):
        plots.accuracy_speed(records.load(tmp_path / "runs"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("figure.gif", "ends in .png, .svg, .pdf"), ("no/figure.png", "is not a folder")]
)
def test_bad_output_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        plots.accuracy_speed(small_sweep(tmp_path / "runs"), tmp_path / name)


def test_names_of_a_crowd_neither_collide_nor_leave_the_panel():
    generator, frame = np.random.default_rng(0), Box(0, 0, 600, 400)
    centres = generator.normal((300, 200), (60, 25), (12, 2))
    spots = [Spot(x, y, 8, 60, 12) for x, y in centres]
    markers = [Box.around(s.x, s.y, 16, 16) for s in spots]
    places = place_labels(spots, markers, frame, gap=3)
    boxes = [Box.around(p.x, p.y, 60, 12) for p in places]
    assert sum(a.overlap(b) for a, b in itertools.combinations(boxes, 2)) == 0
    assert all(box.outside(frame) == 0 for box in boxes)
    assert sum(box.overlap(marker) for box in boxes for marker in markers) < 60


def test_looks_are_fixed_and_sixty_names_differ():
    assert style.styles(["nystrom"])["nystrom"] == style.styles(["softmax", "x", "nystrom"])["nystrom"]
    for names in ([f"mechanism_{i}" for i in range(60)], [*style.KNOWN, *(f"new_{i}" for i in range(20))]):
        looks = style.styles(names)
        assert len(set(looks.values())) == 60
        assert style.styles(reversed(names)) == looks
    assert len(set(style.KNOWN)) == len(style.KNOWN)
