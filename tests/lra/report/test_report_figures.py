"""The figures of lines and the heat map show what the records hold, and every text of them can be read."""

import itertools
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from report_samples import write_failure, write_measure, write_run

from lra import records
from lra.report import figure as pages
from lra.report import figures, stats, style
from lra.report.labels import stack

LONG = dict(
    device="CPU: AMD EPYC 9654 96-Core Processor (two sockets), 192 threads",
    selection="best_val",
    paper="luna2021",
)
BUCKETS = {"501-900": 0.03, "901-1210": 0.01, "1211-1999": -0.02}
KERNEL = {"mode": "train", "own": {"kernel": "math"}}


def everything(root, count):
    """`count` mechanisms of similar accuracies: all there is of ListOps, tests alone of Text, and costs."""
    for index, model in enumerate(style.KNOWN[:count]):
        accuracy = 0.3 + 0.1 * math.sin(2.3 * index) ** 2
        write_run(root, model, 0, accuracy + 0.3, kept=False, task="text", length=4096, **LONG)
        for seed in range(2):
            by_length = {k: {"accuracy": accuracy + d - 0.01 * seed, "num": 500} for k, d in BUCKETS.items()}
            fields = dict(tokens_per_s=1e6 * (1 + index % 7), peak_mem_mib=900.0, kept=False, **LONG)
            folder = write_run(root, model, seed, accuracy, accuracy_by_length=by_length, **fields)
            lines = [{"step": s, "loss": 2 - accuracy * s / 100} for s in (50, 100, 150)]
            lines += [{"step": s, "val_accuracy": accuracy * s / 150} for s in (100, 150)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for mode in ("train", "infer"):
            for length in (1024, 4096, 16384):
                step_ms = (
                    None if index == 3 and length > 5000 else 3 + index % 5 + length / (300 + 900 * index)
                )
                write_measure(root, model, mode, length, step_ms, device=LONG["device"])
    return records.load(root)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("many"), 20)


@pytest.fixture(scope="module")
def few(many):
    return first(many, 3)


def first(frame, count):
    return frame[frame["model"].isin(style.KNOWN[:count])].reset_index(drop=True)


def texts(figure):
    """(text, extent) of everything written in a figure."""
    from matplotlib import rc_context

    with rc_context(pages.LOOK):  # as files are written
        return _texts(figure)


def _texts(figure):
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    found = [artist for artist in figure.findobj(Text) if artist.get_text().strip() and artist.get_visible()]
    for axes in figure.axes:  # ticks beyond the limits are not drawn
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            margin = 1e-6 * (high - low)
            hidden = [t for t in axis.get_major_ticks() if not low - margin <= t.get_loc() <= high + margin]
            out = {id(label) for tick in hidden for label in (tick.label1, tick.label2)}
            found = [artist for artist in found if id(artist) not in out]
    return [(artist.get_text(), artist.get_window_extent(renderer)) for artist in found]


def covered(first, second):
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > 0.5 and height > 0.5


@pytest.mark.parametrize("count", [5, 12, 20])
def test_no_text_of_any_figure_covers_another_or_leaves_the_page(many, count):
    drawn = figures.every_figure(first(many, count))
    assert {one.name.split("-")[0] for one in drawn} == set(figures.KINDS)
    for one in drawn:
        width, height = one.figure.get_size_inches() * one.figure.dpi
        placed = texts(one.figure)
        assert len(placed) > count
        for index, (text, box) in enumerate(placed):
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
            assert inside, (one.name, text)
            clash = [other for other, place in placed[index + 1 :] if covered(box, place)]
            assert not clash, (one.name, text, clash)


def test_long_conditions_break_the_line_over_a_panel_of_speed(tmp_path):
    for length in (500, 600):
        write_run(tmp_path, "linear", 0, 0.3, length=length, tokens_per_s=1e6, kept=False, **LONG)
    (drawn,) = figures.draw("speed", records.load(tmp_path))
    width = drawn.figure.get_size_inches()[0] * drawn.figure.dpi
    assert all(box.x1 <= width for _, box in texts(drawn.figure))
    left, right = (axes.get_tightbbox(drawn.figure.canvas.get_renderer()) for axes in drawn.figure.axes)
    assert left.x1 <= right.x0


SCALED = ", ".join(f"num_{split}={size}" for split, size in (("train", 300), ("val", 200), ("test", 250)))
VARIANT = f"listops-{{}} (scaled, not the LRA setting, {SCALED}, max_depth=7, max_args=4, data_seed=12)"


@pytest.mark.parametrize("kind", ["speed", "lengths"])
def test_a_long_title_is_broken_over_its_panel_and_makes_no_figure_wider(tmp_path, kind):
    sizes = []
    for variant in ("listops-{}", VARIANT):
        for length in (500, 600):
            by_length = {name: {"accuracy": 0.3, "num": 400} for name in BUCKETS}
            write_run(
                tmp_path, "linear", 0, 0.3, length=length, tokens_per_s=1e6, accuracy_by_length=by_length,
                data_variant=variant.format(length), config_hash=variant[:9] + str(len(variant)), kept=False,
            )  # fmt: skip
        frame = records.load(tmp_path)
        chosen = frame[frame["data_variant"].str.len().gt(20) == (variant is VARIANT)].reset_index(drop=True)
        (drawn,) = figures.draw(kind, chosen)
        sizes.append(drawn.figure.get_size_inches())
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]
    placed = texts(drawn.figure)
    titles = [box for text, box in placed if text.startswith("ListOps (")]
    assert len(titles) == 2 and not any(covered(*pair) for pair in itertools.combinations(titles, 2))
    assert all(box.y1 <= sizes[1][1] * drawn.figure.dpi for box in titles)
    beside = [box for text, box in placed if text == "test accuracy, %"]
    assert max(box.x0 for box in beside) > min(titles, key=lambda box: box.x0).x1


def test_long_names_push_no_text_of_the_heat_map_off_the_page(tmp_path):
    write_run(tmp_path, "a_name_of_some_forty_characters_in_length", 0, 0.3, kept=False)
    (drawn,) = figures.draw("heat", records.load(tmp_path))
    width = drawn.figure.get_size_inches()[0] * drawn.figure.dpi
    assert all(box.x0 >= 0 and box.x1 <= width for _, box in texts(drawn.figure))


def test_a_word_longer_than_a_line_is_broken_within():
    assert pages.fit(["x" * 100], 2) != ["x" * 100] and "".join(pages.fit(["x" * 100], 2)) == "x" * 100


@pytest.mark.parametrize("name", ["a$x$b", "a$\\foo{$"])
def test_a_name_with_dollars_is_written_as_it_is(tmp_path, name):
    write_run(tmp_path / "runs", name, 0, 0.3, tokens_per_s=1e6, kept=False)
    for length in (1024, 4096):
        write_measure(tmp_path / "runs", name, "train", length, 5.0, config_hash=f"c{length}")
    frame = records.load(tmp_path / "runs")
    for kind in ("speed", "cost", "heat"):
        figures.write(kind, frame, tmp_path / f"{kind}.svg")
        (drawn,) = figures.draw(kind, frame)
        assert any(text.startswith(name) for text, _ in texts(drawn.figure))


def test_a_name_has_the_same_look_in_every_figure_whatever_else_they_show(tmp_path):
    names = [f"own_{index}" for index in range(12)]
    for name in names:
        write_run(tmp_path, name, 0, 0.3, tokens_per_s=1e6, kept=False)
    looks = style.styles(names)
    moved = next(name for name in names if style.styles([name])[name] != looks[name])  # by another's hash
    for length in (1024, 4096):
        write_measure(tmp_path, moved, "train", length, 5.0, config_hash=f"c{length}")
    frame, look = records.load(tmp_path), looks[moved]
    (drawn,) = figures.draw("cost", frame)
    assert drawn.figure.axes[0].lines[0].get_color() == look.colour
    assert drawn.figure.axes[0].lines[0].get_marker() == look.marker


def test_no_mechanism_has_the_sign_of_a_failure():
    assert style.FAILURE not in style.MARKERS


def test_short_labels_leave_out_only_what_is_told_otherwise():
    labels = {
        "linear (batch_size=32, num_params=70794) [97352f]": "linear (batch_size=32)",
        "linear (batch_size=8, num_params=70794) [cffcd8]": "linear (batch_size=8) [cffcd8]",
        "linear (batch_size=8, num_params=70794) [be32ab]": "linear (batch_size=8) [be32ab]",
        "performer (num_params=5)": "performer (num_params=5)",
        "performer (num_params=6)": "performer (num_params=6)",
        "luna (num_params=5)": "luna",
        "y" * 70: "y" * 28 + "…" + "y" * 15,
        "x" * 70: "x" * 70,
        "x" * 80: "x" * 80,
    }
    assert pages.short_labels(labels) == labels


def test_ticks_of_a_log_axis_are_round_at_least_three_and_apart():
    assert pages.log_ticks(2.1e-4, 8.4e-4) == pytest.approx([3e-4, 5e-4, 7e-4])
    assert pages.log_ticks(30, 5e4) == [100, 1000, 10000]
    assert pages.log_ticks(8e4, 6e5) == pytest.approx([1e5, 2e5, 5e5])
    assert len(pages.log_ticks(4.1, 4.1 * 1.69)) >= 3
    assert [pages.tick(value) for value in (1e12, 7e11, 1500, 0.2)] == ["1T", "700G", "1.5k", "0.2"]


def test_equal_records_give_equal_files(few, tmp_path):
    for kind, suffix in (("cost", ".svg"), ("curves", ".svg"), ("heat", ".png"), ("heat", ".pdf")):
        targets = [tmp_path / f"{kind}{i}{suffix}" for i in (1, 2)]
        contents = [figures.write(kind, few, target)[0].read_bytes() for target in targets]
        assert contents[0] == contents[1], (kind, suffix)


def test_svgs_of_two_figures_share_no_id_and_refer_only_to_their_own(few):
    drawn = figures.draw("heat", few)[0]
    page = (
        "<div>"
        + "".join(pages.as_svg(drawn.figure, prefix, title="a < b") for prefix in ("f1", "f2"))
        + "</div>"
    )
    root = ElementTree.fromstring(page)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids) and {"f1", "f2"} <= set(ids)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', page))
    assert used and used <= set(ids)
    assert re.findall(r"([^\s>]*) ?\*\{", page) == ["#f1", "#f2"]  # the style rule stays in its figure


def test_a_prefix_that_cannot_begin_an_id_is_refused(few):
    with pytest.raises(ValueError, match="'1 x' cannot begin an id"):
        pages.as_svg(pages.new(1, 1), "1 x")


def test_only_kinds_with_material_are_drawn(tmp_path):
    write_run(tmp_path, "linear", 0, 0.3, kept=False)
    assert [one.name for one in figures.every_figure(records.load(tmp_path))] == ["heat"]


def panel(drawn, title):
    return next(axes for one in drawn for axes in one.figure.axes if axes.get_title(loc="left") == title)


def written(axes):
    return [text.get_text() for text in axes.texts]


def crossing(root):
    for length in (1024, 4096, 16384):
        write_measure(root, "softmax", "train", length, 10.0 * length / 1024)
        write_measure(root, "linear", "train", length, 20.0)
        math_ms = None if length > 5000 else 300.0
        write_measure(root, "softmax", "train", length, math_ms, config_hash="math", extra=KERNEL)
    return records.load(root)


def test_cost_rings_the_length_at_which_lines_cross_and_says_it(tmp_path):
    axes = panel(figures.draw("cost", crossing(tmp_path)), "Time of training step")
    rings = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "none"]
    (ring,) = (line for line in rings if len(line.get_xdata()) == 1)
    assert ring.get_xdata()[0] == pytest.approx(2048, rel=1e-6)
    assert ring.get_ydata()[0] == pytest.approx(20 * 1e3 / 131072)  # µs per token, on the line of softmax
    assert {"linear  from 2,000", "softmax"} <= set(written(axes))
    assert axes.get_ylabel() == "µs per token"


def test_cost_ends_a_line_with_a_cross_where_memory_ran_out(tmp_path):
    axes = panel(figures.draw("cost", crossing(tmp_path)), "Time of training step")
    (cross,) = (line for line in axes.lines if line.get_marker() == "X" and len(line.get_xdata()) == 1)
    assert cross.get_xdata()[0] == 4096
    assert "softmax (kernel=math)  never, out of memory" in written(axes)


def test_cost_is_ms_at_a_constant_batch_size(tmp_path):
    for length in (1024, 4096):
        write_measure(tmp_path, "linear", "train", length, 5.0, batch_size=32)
    (drawn,) = figures.draw("cost", records.load(tmp_path))
    assert panel([drawn], "Time of training step").get_ylabel() == "ms" and drawn.title.endswith("batch 32")


def test_past_a_dozen_lines_some_of_each_family_are_lit_or_the_ones_asked_for(many):
    names = lambda drawn: {  # noqa: E731
        t.get_text().split("  ")[0]
        for t in panel(drawn, "Time of training step").texts
        if t.get_color() == pages.INK
    }
    lit = names(figures.draw("cost", many))
    assert {"softmax", "linear"} <= lit and len(lit) < 16
    assert {style.family(name) for name in lit} == {style.family(n) for n in style.KNOWN[:20]} - {None}
    assert names(figures.draw("cost", many, ["bigbird", "mega"])) == {"bigbird", "mega"}


def test_curves_are_means_with_bands_over_the_steps_that_all_seeds_reached(tmp_path):
    for seed, steps in ((0, (10, 20, 30)), (1, (10, 20))):
        folder = write_run(tmp_path, "linear", seed, 0.3, kept=False)
        text = "".join(json.dumps({"step": s, "loss": s / 10 + seed}) + "\n" for s in steps)
        (folder / "metrics.jsonl").write_text(text)
    (drawn,) = figures.draw("curves", records.load(tmp_path))
    (axes,) = drawn.figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[10, 1.5], [20, 2.5]])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1.0, 3.0)


def test_curves_leave_out_what_has_one_point_and_say_so(tmp_path):
    for model, seed, steps in (("linear", 0, (10, 20)), ("linear", 1, (10,)), ("softmax", 0, (10,))):
        folder = write_run(tmp_path, model, seed, 0.3, kept=False)
        text = "".join(json.dumps({"step": s, "loss": s / 10}) + "\n" for s in steps)
        (folder / "metrics.jsonl").write_text(text)
    frame = records.load(tmp_path)
    (drawn,) = figures.draw("curves", frame)
    assert "linear" in written(drawn.figure.axes[0]) and "softmax" not in written(drawn.figure.axes[0])
    np.testing.assert_allclose(drawn.figure.axes[0].lines[0].get_xdata(), [10, 20])
    notes = [text for text, _ in texts(drawn.figure)]
    assert "Not drawn, a single point each: training loss of linear, training loss of softmax." in notes
    with pytest.raises(pages.NoMaterial, match="a single point, and a curve takes two"):
        figures.draw("curves", frame[frame["model"] == "softmax"].reset_index(drop=True))


def test_curves_of_a_mechanism_that_never_ended_well_carry_its_status(tmp_path):
    write_failure(tmp_path, "reformer", 0, "diverged", "loss is nan", **CONDITIONS_KNOWN)
    log = next(tmp_path.iterdir()) / "metrics.jsonl"
    log.write_text('{"step": 5, "loss": 2.0}\n{"step": 8, "loss": 2.5}\n{"step": 10, "loss": NaN}\n')
    (drawn,) = figures.draw("curves", records.load(tmp_path))
    assert "reformer  diverged" in written(drawn.figure.axes[0])


CONDITIONS_KNOWN = dict(device="cpu", precision="fp32", num_devices=1)


def test_lengths_bars_are_the_intervals_of_the_tables(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6)):
        by_length = {name: {"accuracy": accuracy, "num": 400} for name in ("9-12", "13-20")}
        write_run(tmp_path, "linear", seed, 0.5, accuracy_by_length=by_length, kept=False)
    (drawn,) = figures.draw("lengths", records.load(tmp_path))
    (axes,) = drawn.figure.axes
    expected = stats.summarise([0.5, 0.6], 400)
    bar = axes.collections[0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 1], [100 * expected.low, 100 * expected.high])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9–12\n400", "13–20\n400"]


def heat_cells(frame):
    from matplotlib.patches import Rectangle

    axes = figures.draw("heat", frame)[0].figure.axes[0]
    return axes, [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_heat_runs_from_the_majority_class_to_the_best_and_hatches_failures(tmp_path):
    import matplotlib

    write_run(tmp_path, "softmax", 0, 0.366, kept=False)
    write_run(tmp_path, "linear", 0, 0.266, kept=False)
    write_run(tmp_path, "identity", 0, 0.166, kept=False)
    write_failure(tmp_path, "reformer", 0, "diverged", "loss is nan")
    axes, cells = heat_cells(records.load(tmp_path))
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "softmax",
        "linear",
        "reformer",
        "identity",
    ]
    colours = matplotlib.colormaps["cividis"]
    np.testing.assert_allclose(cells[0].get_facecolor(), colours(1.0))
    np.testing.assert_allclose(cells[1].get_facecolor(), colours(0.5), atol=0.02)  # a row of 256 colours
    np.testing.assert_allclose(cells[3].get_facecolor(), colours(0.0))
    assert cells[2].get_hatch() and not cells[0].get_hatch()
    assert {"36.6", "26.6", "16.6", "diverged"} <= set(written(axes))
    assert "37.10" in written(axes)  # softmax as Nystromformer's authors print it


def test_stacked_names_keep_their_order_and_move_no_more_than_they_must():
    assert stack([0.5], 0.1, 0, 1) == [0.5]
    np.testing.assert_allclose(stack([0.5, 0.52, 0.9], 0.1, 0, 1), [0.46, 0.56, 0.9])
    np.testing.assert_allclose(stack([2, 3, -1], 0.1, 0, 1), [0.85, 0.95, 0.05])
    wanted = np.random.default_rng(0).normal(0.5, 0.05, 20).tolist()
    places = stack(wanted, 0.05, 0, 1)
    np.testing.assert_allclose(np.sort(places), np.linspace(0.025, 0.975, 20))
    assert np.argsort(places).tolist() == np.argsort(wanted).tolist()
