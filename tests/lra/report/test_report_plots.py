"""The figure: it exists, is refused with a reason, and its names neither collide nor leave the panel."""

import itertools
import warnings

import numpy as np
import pytest
from report_samples import write_failure, write_run

from lra import records, registry
from lra.errors import UserError
from lra.report import figures, style
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
    assert figures.write("speed", small_sweep(tmp_path / "runs"), target) == [target]
    assert target.read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [target.name]


def test_figures_are_the_same_bytes_each_time(tmp_path):
    frame = small_sweep(tmp_path / "runs")
    for name in ("a.svg", "b.svg"):
        figures.write("speed", frame, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_more_than_four_panels_go_on_to_a_second_file(tmp_path):
    for length in (500, 600, 700, 800, 900):
        write_run(tmp_path / "runs", "linear", 0, 0.3, length=length, tokens_per_s=1e6, kept=False)
    written = figures.write("speed", records.load(tmp_path / "runs"), tmp_path / "figure.png")
    assert [path.name for path in written] == ["figure.png", "figure-2.png"]


def test_one_point_without_memory_is_drawn(tmp_path):
    write_run(tmp_path / "runs", "linear", 0, 0.3, examples_per_s=90.0, majority_accuracy=None, kept=False)
    assert figures.write("speed", records.load(tmp_path / "runs"), tmp_path / "one.png")


def test_the_first_point_of_a_panel_does_not_make_an_axis_without_width(tmp_path):
    for length in (32, 64):
        write_run(
            tmp_path, "softmax", 0, 0.3, length=length, tokens_per_s=73564.2, peak_mem_mib=60, kept=False
        )
        write_run(
            tmp_path, "linear", 0, 0.3, length=length, tokens_per_s=220692.6, peak_mem_mib=60, kept=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        figures.write("speed", records.load(tmp_path), tmp_path / "two.svg")


def test_nothing_to_draw_is_an_error_that_says_what_is_needed(tmp_path):
    write_run(tmp_path / "runs", "linear", 0, 0.3, kept=False)
    write_failure(tmp_path / "runs", "reformer", 0, "failed", "boom")
    with pytest.raises(UserError, match="both a test accuracy and a speed"):
        figures.write("speed", records.load(tmp_path / "runs"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("figure.gif", "ends in .png, .svg, .pdf"), ("no/figure.png", "is not a folder")]
)
def test_bad_output_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        figures.write("speed", small_sweep(tmp_path / "runs"), tmp_path / name)


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


def test_a_name_between_two_markers_goes_where_it_is_in_no_doubt():
    """Right of the first the nearest place is free, and as near to the second; the next best costs less."""
    spots = [Spot(100, 100, 5, 30, 10), Spot(143, 100, 5, 30, 10)]
    walls = [Box(40, 80, 90, 120), Box(40, 106, 125, 110), Box(40, 90, 125, 94)]
    first, second = place_labels(spots, walls, Box(0, 0, 300, 200), gap=3)
    assert not first.doubtful and not second.doubtful and abs(first.y - 100) > 5


def test_names_keep_clear_of_error_bars(tmp_path):
    for index in range(6):
        for seed in range(2):
            accuracy = 0.4 + 0.02 * (index % 2) + 0.03 * seed
            fields = dict(tokens_per_s=1e6 * 1.25**index, peak_mem_mib=60.0, kept=False)
            write_run(tmp_path, f"a_long_name_{index}", seed, accuracy, **fields)
    (drawn,) = figures.draw("speed", records.load(tmp_path))
    (axes,) = drawn.figure.axes
    names = [text for text in axes.texts if text.get_text().startswith("a_long_name")]
    bars = [
        axes.transData.transform(line)
        for bar in axes.containers
        for line in (segment for lines in bar.lines[2] for segment in lines.get_segments())
    ]
    assert len(names) == len(bars) == 6
    for name in names:
        box = name.get_window_extent(drawn.figure.canvas.get_renderer())
        for (x, low), (_, high) in bars:
            assert not (box.x0 < x < box.x1 and box.y0 < high and low < box.y1), name.get_text()


def test_of_many_left_out_a_few_are_named_and_none_is_cut(tmp_path):
    write_run(tmp_path, "linear", 0, 0.3, tokens_per_s=1e6, kept=False)
    for index in range(30):
        write_failure(tmp_path, f"failed_{index:02}", 0, "failed", "boom")
    (drawn,) = figures.draw("speed", records.load(tmp_path))
    renderer = drawn.figure.canvas.get_renderer()
    note = next(text for text in drawn.figure.texts if text.get_text().startswith("Not drawn"))
    assert note.get_text().count("(failed)") == 4 and note.get_text().endswith("and 26 more.")
    assert note.get_window_extent(renderer).x1 <= drawn.figure.get_size_inches()[0] * drawn.figure.dpi


def test_a_crowd_of_points_gets_a_larger_figure_of_its_own(tmp_path):
    for index in range(21):
        for length in (500, 600)[: 1 + (index < 2)]:
            fields = dict(length=length, tokens_per_s=1e6 + 1e5 * index, peak_mem_mib=500.0, kept=False)
            write_run(tmp_path, f"m{index}", 0, 0.3 + 0.01 * index, **fields)
    drawn = figures.draw("speed", records.load(tmp_path))
    size = (12.0, pytest.approx(8.5, abs=0.2))
    assert [tuple(one.figure.get_size_inches()) for one in drawn] == [size] * 2


def test_looks_are_fixed_and_sixty_names_differ():
    assert style.styles(["nystrom"])["nystrom"] == style.styles(["softmax", "x", "nystrom"])["nystrom"]
    new = [f"new_{i}" for i in range(60 - len(style.KNOWN))]
    for names in ([f"mechanism_{i}" for i in range(60)], [*style.KNOWN, *new]):
        looks = style.styles(names)
        assert len(set(looks.values())) == 60
        assert style.styles(reversed(names)) == looks
    assert len(set(style.KNOWN)) == len(style.KNOWN)


def test_every_built_mechanism_has_a_colour_of_its_own():
    looks = style.styles(registry.names())
    assert set(looks) <= set(style.KNOWN)
    first = looks.keys() & set(style.KNOWN[: len(style.COLOURS)])
    assert len({looks[name].colour for name in first}) == len(first) == 10


def test_every_built_mechanism_but_floors_and_mixtures_has_one_family():
    members = [name for names in style.FAMILIES.values() for name in names]
    assert len(set(members)) == len(members)
    others = {name for name in registry.names() if style.family(name) is None}
    assert others == {"identity", "global_mean", "hybrid", "search"}


def test_a_variant_keeps_the_colour_and_marker_and_changes_the_dashes():
    look = style.styles(["softmax"])["softmax"]
    other = look.variant(1)
    assert (other.colour, other.marker) == (look.colour, look.marker) and other.dash != look.dash


# Linear RGB as seen without one kind of cone: Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


@pytest.mark.parametrize("vision", VISION)
def test_no_two_colours_look_alike_to_colour_blind_readers(vision):
    """CIELAB distances, of which about 2 is the least that can be seen side by side."""
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in style.COLOURS])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    x, y, z = np.cbrt(seen @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T).T
    lab = np.stack([116 * y, 500 * (x - y), 200 * (y - z)], axis=1)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 12
