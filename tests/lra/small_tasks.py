"""The six tasks small enough for a test: a few rows of each, from files where the task reads files."""

from collections.abc import Callable
from pathlib import Path

from image_samples import python_batches, write_files

MODEL = ["model.d_model=16", "model.d_ff=32", "model.num_layers=1"]


def write_reviews(folder: Path, *, rows: int = 40) -> Path:
    """Reviews of different lengths, train.csv and test.csv with `rows` each."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        lines = [
            f"{part} {('dull', 'great')[i % 2]} film {i} {'really ' * (i % 7)},{i % 2}" for i in range(rows)
        ]
        (folder / f"{part}.csv").write_text("\n".join(["text,label", *lines, ""]))
    return folder


def write_papers(folder: Path, *, rows: int = 8) -> Path:
    """Eight papers and `rows` pairs of them in each split."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    for index in range(8):
        (folder / "texts" / f"P{index}.txt").write_text(f"paper {index} " * (index + 3))
    lines = [
        f"{split}\t{i % 2}\tP{i % 8}\tP{(i + 3) % 8}"
        for split in ("train", "val", "test")
        for i in range(rows)
    ]
    (folder / "pairs.tsv").write_text("\n".join(["split\tlabel\tid1\tid2", *lines, ""]))
    return folder


def listops(folder: Path) -> list[str]:
    return ["task=listops", "length=32", "task.num_train=600", "task.num_val=100", "task.num_test=150"]


def text(folder: Path) -> list[str]:
    return ["task=text", "length=64", f"task.source={write_reviews(folder, rows=80)}"]


def retrieval(folder: Path) -> list[str]:
    return ["task=retrieval", "length=64", f"task.source={write_papers(folder, rows=16)}"]


def image(folder: Path) -> list[str]:
    return ["task=image", f"task.source={write_files(folder, python_batches())}"]


def pathfinder32(folder: Path) -> list[str]:
    return ["task=pathfinder32", "task.num_images=100"]


def pathx(folder: Path) -> list[str]:
    return ["task=pathx", "task.num_images=20"]


TASKS: dict[str, Callable[[Path], list[str]]] = {
    made.__name__: made for made in (listops, text, retrieval, image, pathfinder32, pathx)
}
"""Overrides of each task at its own length, all but ListOps and the texts; files go into the folder given."""
