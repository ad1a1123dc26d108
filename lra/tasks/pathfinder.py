"""Pathfinder: are two discs joined by one dashed path, or does each sit on a path of its own? Read pixel by
pixel.

Generated as the original generator does (Linsley et al. 2018, with the Long Range Arena's settings): two long
snakes of short paddles in every image, a disc on one end of one of them and a second disc on the far end of
the same snake (label 1) or of the other one (label 0), and shorter snakes as distractors. LRA set no seed, so
its files can be regenerated in distribution only. They can also be read, from `task.source`.

Path-X is Pathfinder with 128 x 128 pixels at level hard, and shares that variant's data.

A document is the whole image row by row, as raw grey values; each image has its full range, 0 to 255.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lra.errors import UserError
from lra.schema import setting
from lra.tasks.base import SPLITS, Finding, Plan, Progress, Task, available_cpus

GENERATOR_VERSION = 1
LRA_IMAGES = 200_000
"""Images of one size and level: 160,000, 20,000 and 20,000."""
BLOCK_BYTES = 1 << 20
"""About the pixels drawn in one go. Blocks are used in order, so the number of workers changes nothing."""
CHECKPOINT_SECONDS = 10.0
REDRAWN = 8
"""Images of a split that `verify` draws again."""

_MILLISECONDS = {32: 0.3, 64: 7.0, 128: 3.0, 256: 1.5}
"""About what one image of level hard takes on one processor."""
_SHADES = " .:*#@"


@dataclass(frozen=True)
class Pathfinder(Task):
    """What all sizes have in common. An image is never cut, so each size has just one length."""

    name: str = "pathfinder"
    input: str = setting("tokens", choices=("tokens", "continuous"))
    black: str = setting("pixel", choices=("pixel", "padding"))  # padding: as code that masks all ids <= 0
    mean: float = 0.5  # of input=continuous: (pixel / 255 - mean) / std
    std: float = setting(0.5, low=1e-6)
    num_images: int = setting(LRA_IMAGES, low=10)  # generated ones; 80, 10 and 10 % by index
    split: str = setting("random", choices=("random", "stored"))  # how LRA's files are split
    split_seed: int = setting(42, low=0)  # of split=random

    size: ClassVar[int]
    level: ClassVar[str] = "hard"
    description: ClassVar[str] = "are two discs joined by a dashed path? read pixel by pixel"
    num_classes: ClassVar[int] = 2
    vocab_size: ClassVar[int] = 257
    stored: ClassVar[str] = "pixels"

    @property
    def scaling(self) -> tuple[float, float]:
        return 255 * self.mean, 255 * self.std

    @property
    def disjoint(self) -> bool:
        return self.source is None

    def check(self) -> None:
        super().check()
        if self.val != "heldout":
            raise UserError(
                f"task.val={self.val}: {self.name} has a validation split of its own; leave task.val=heldout"
            )
        if self.split_seed >= 1 << 63:
            raise UserError(f"task.split_seed={self.split_seed} is out of range; it must be below 2^63")
        idle = {}
        if self.input == "continuous":
            idle["black"] = "task.input=continuous; for task.input=tokens it does"
        if self.input == "tokens":
            idle |= {key: "task.input=tokens; for task.input=continuous it does" for key in ("mean", "std")}
        if self.source is None:
            reason = "images that are generated; it is for LRA's files, named by task.source"
            idle |= {"split": reason, "split_seed": reason}
        else:
            reason = f"the images of task.source={self.source}"
            idle |= {"data_seed": reason, "num_images": reason}
            if self.split == "stored":
                idle["split_seed"] = "task.split=stored, which draws nothing"
        for key, reason in idle.items():
            if getattr(self, key) != getattr(type(self), key):
                raise UserError(
                    f"task.{key}={getattr(self, key)} would change nothing with {reason}. Leave one of the "
                    "two away"
                )

    def check_length(self, length: int) -> None:
        if length != self.size**2:
            raise UserError(
                f"length={length} is not allowed for {self.name}; its {self.size} x {self.size} pixels are "
                f"length={self.size**2}"
            )

    def class_names(self) -> list[str]:
        return ["apart", "joined"]

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Which generated images each split has: (first, one past the last)."""
        ends = [0, self.num_images * 8 // 10, self.num_images * 9 // 10, self.num_images]
        return {split: (ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)}

    def variant(self, length: int) -> dict[str, Any]:
        variant = {"task": f"pathfinder{self.size}", "level": self.level}
        if self.source is None:
            return variant | {
                "generator": GENERATOR_VERSION,
                "data_seed": self.data_seed,
                "num_images": self.num_images,
            }
        seed = {"split_seed": self.split_seed} if self.split == "random" else {}
        return variant | {"files": "lra png", "split": self.split} | seed

    def variant_name(self, length: int) -> str:
        name = f"pathfinder{self.size}-{self.level}"
        if self.source is not None:
            if self.split == "stored":
                return f"{name}-files-stored"
            return f"{name}-files" + (f"-split{self.split_seed}" if self.split_seed != 42 else "")
        name += f"-seed{self.data_seed}" if self.data_seed else ""
        if self.num_images == LRA_IMAGES:
            return name
        return f"{name} (not the LRA setting; {self.num_images:,} images, not {LRA_IMAGES:,})"

    def source_name(self) -> str | None:
        return None if self.source is None else f"{Path(self.source).expanduser().resolve()}"

    def plan(self, length: int) -> Plan:
        if self.source is None:
            mib = self.num_images * (length + 9) / 2**20
            seconds = self.num_images * _MILLISECONDS[self.size] / 1000 / available_cpus()
            return Plan("generated here", self.num_images, mib, 5 + seconds)
        from lra.tasks.pathfinder_files import locate

        locate(Path(self.source), self.size, self.level)
        mib = LRA_IMAGES * (2 * length + 9) / 2**20  # the images lie on the disk twice until they are sorted
        return Plan(self.source, LRA_IMAGES, mib, LRA_IMAGES * (1e-4 + 2e-8 * length))

    def vocabulary(self) -> list[str]:
        return []

    def build(
        self, writer, *, length: int, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        if self.source is None:
            self._generate(writer, workers or available_cpus(), progress)
            return
        from lra.tasks.pathfinder_files import read

        read(
            Path(self.source),
            writer,
            size=self.size,
            level=self.level,
            split_seed=self.split_seed if self.split == "random" else None,
            progress=progress,
        )

    def _generate(self, writer, workers: int, progress: Progress | None) -> None:
        """Rows go to the writer in the order of their index, from the first that is not there yet."""
        bounds = self.bounds()
        done = sum(writer.rows_done(split) for split in SPLITS)
        saved = time.monotonic()
        for pixels, labels in self._blocks(done, workers):
            for split, (first, end) in bounds.items():
                part = slice(max(0, first - done), max(0, min(len(labels), end - done)))
                rows = pixels[part].reshape(-1, self.size**2)
                writer.add_rows(
                    split, rows.reshape(-1), np.arange(len(rows) + 1) * self.size**2, labels[part]
                )
            done += len(labels)
            if progress:
                progress(done, self.num_images)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                writer.checkpoint()
                saved = time.monotonic()
        generator = {"name": "pathfinder", "version": GENERATOR_VERSION, "seed": self.data_seed}
        notes = [] if self.level == "hard" else ["LRA does not say how many shorter snakes this level has"]
        writer.describe(source="generated here", data_origin="regenerated", generator=generator, notes=notes)

    def _blocks(self, start: int, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(pixels [rows size size], labels [rows]) from image `start` on, a few blocks ahead of their use."""
        from lra.tasks.pathfinder_generator import draw_images

        rows = max(1, BLOCK_BYTES // self.size**2)

        def block(first: int) -> tuple[np.ndarray, np.ndarray]:
            count = min(rows, self.num_images - first)
            return draw_images(self.data_seed, self.size, self.level, first, count)[:2]

        with ThreadPoolExecutor(workers) as pool:
            ahead: deque = deque()
            try:
                for first in range(start, self.num_images, rows):
                    ahead.append(pool.submit(block, first))
                    if len(ahead) > 2 * workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def decode(self, tokens: np.ndarray, vocab: list[str]) -> str:
        """The image in six shades, at most 64 characters wide. A character is twice as high as wide; it shows
        the brightest pixel of its block, as paddles are thin.
        """
        wide = max(1, self.size // 64)
        blocks = np.asarray(tokens, np.int64).reshape(self.size // (2 * wide), 2 * wide, -1, wide)
        shades = blocks.max((1, 3)) * len(_SHADES) // 256
        return "\n".join("".join(_SHADES[shade] for shade in line) for line in shades)

    def check_rows(self, split, length: int) -> list[Finding]:
        other = int((split.lengths != length).sum())
        sizes = Finding(
            f"{split.name} image sizes", other == 0, f"{self.size} x {self.size} pixels: {other} rows differ"
        )
        if self.source is not None or other:
            return [sizes]
        narrow = 0
        for _, part in split.chunks():
            images = part.tokens.reshape(-1, length)
            narrow += int(((images.min(1) != 0) | (images.max(1) != 255)).sum())
        rows, ones = len(split), int(split.labels.sum())
        off = (ones - rows / 2) / (math.sqrt(rows) / 2)
        return [
            sizes,
            Finding(f"{split.name} grey levels", narrow == 0, f"{narrow} images are not from 0 to 255"),
            Finding(
                f"{split.name} label balance", abs(off) <= 4, f"{ones:,} of {rows:,} are 1, {off:+.1f} sd"
            ),
            self._drawn_again(split),
        ]

    def _drawn_again(self, split) -> Finding:
        """Whether a few images, spread over the split, are those that the generator draws."""
        from lra.tasks.pathfinder_generator import draw_images

        first, end = self.bounds()[split.name]
        if len(split) != end - first:
            return Finding(f"{split.name} drawn again", False, f"{len(split):,} rows, not {end - first:,}")
        chosen = np.unique(np.linspace(0, len(split) - 1, REDRAWN).astype(int)).tolist()
        wrong = []
        for row in chosen:
            pixels, labels, _ = draw_images(self.data_seed, self.size, self.level, first + row, 1)
            if labels[0] != split.labels[row] or not np.array_equal(split.row(row)[0], pixels[0].reshape(-1)):
                wrong.append(row)
        detail = f"{len(chosen)} images, {len(wrong)} differ"
        return Finding(
            f"{split.name} drawn again", not wrong, detail + (f", first row {wrong[0]}" if wrong else "")
        )

    def statistics(self, split) -> dict[str, Any]:
        """What `generator-statistics` lists of the pixels, as means over images."""
        sums = np.zeros(4)
        for _, part in split.chunks():
            images = part.tokens.reshape(len(part), -1)
            means = images.mean(1)
            squares = np.einsum("ij,ij->i", images, images, dtype=np.int64) / images.shape[1]
            sums += means.sum(), np.sqrt(squares - means**2).sum(), 0, 0
            sums[2:] += np.mean(images == 0, 1).sum(), np.mean(images == 255, 1).sum()
        mean, std, black, white = (sums / len(split)).tolist()
        return {
            "pixel mean": round(mean, 3),
            "pixel std of an image": round(std, 3),
            "pixels of an image": {"0": black, "255": white},
        }


@dataclass(frozen=True)
class _Levelled(Pathfinder):
    """The sizes of which every level is offered."""

    level: str = setting("hard", choices=("easy", "intermediate", "hard"))


@dataclass(frozen=True)
class Pathfinder32(_Levelled):
    """The benchmark's Pathfinder task."""

    name: str = "pathfinder32"

    size: ClassVar[int] = 32
    default_length: ClassVar[int] = 32**2


@dataclass(frozen=True)
class Pathfinder64(_Levelled):
    """In LRA's release, though not among its six tasks."""

    name: str = "pathfinder64"

    size: ClassVar[int] = 64
    default_length: ClassVar[int] = 64**2


@dataclass(frozen=True)
class Pathfinder128(_Levelled):
    """Path-X with a choice of levels."""

    name: str = "pathfinder128"

    size: ClassVar[int] = 128
    default_length: ClassVar[int] = 128**2


@dataclass(frozen=True)
class Pathfinder256(_Levelled):
    """In LRA's release, though not among its six tasks."""

    name: str = "pathfinder256"

    size: ClassVar[int] = 256
    default_length: ClassVar[int] = 256**2


@dataclass(frozen=True)
class PathX(Pathfinder):
    """The benchmark's Path-X task: 128 x 128 pixels, level hard."""

    name: str = "pathx"

    size: ClassVar[int] = 128
    default_length: ClassVar[int] = 128**2
