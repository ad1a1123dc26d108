"""Image: which of ten things does a photograph (CIFAR-10, Krizhevsky 2009) show? Read grey pixel by pixel.

A document is the 32 x 32 image as 1,024 raw grey values, row by row, without augmentation. As tokens the ids
are pixel + 1; as a continuous input the values are (pixel / 255 - mean) / std. Both read the same files.

Two rules of making colours grey are in use, and they differ by one level in about a quarter of all colours:

  pil  (19595 R + 38470 G + 7471 B + 32768) >> 16: Pillow's convert("L"), which torchvision's Grayscale calls
       (S4 and the code bases that follow it)
  tf   tf.image.rgb_to_grayscale on uint8 (Long Range Arena, Nystromformer, Skyformer). In TensorFlow's
       python/ops/image_ops_impl.py: cast to float32, times 1 / 255, tensordot with [0.2989, 0.5870, 0.1140],
       times 255.5, cast to uint8, which cuts off (convert_image_dtype with its default saturate=False; the
       largest possible value, 255.47, needs no saturation). The order in which tensordot adds three products
       is the library's: here from red to blue, each step rounded to float32. Other orders, or fused steps,
       change 31 to 61 of the 16,777,216 colours, by one level.

CIFAR-10 has no validation split. By default a tenth of train is held out by S4's rule: the training rows are
the first nine tenths of torch.randperm seeded with `data_seed`, the held-out ones its rest, and each split is
stored in that order. `split=stored` is Long Range Arena's rule, train[:90%] and train[90%:] in the order of
the source (TensorFlow Datasets, from which LRA took them, has an order of its own, so its rows are others).
`val=test` trains on all rows and takes the test split for validation.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lra.errors import UserError
from lra.schema import setting
from lra.tasks.base import Finding, Plan, Progress, Task
from lra.tasks.image_files import CLASSES, PARTS, SIDE, Chunk, Chunks, default, located

READER_VERSION = 1
LENGTH = SIDE * SIDE
ROWS = {"train": 50_000, "test": 10_000}
MEAN, STD = 122.6 / 255, 61.0 / 255
"""Of CIFAR-10's grey pixels, as S4 has them."""

REPORT_EVERY = 1000
"""Rows between two reports of progress."""

_HELD_OUT = 0.1
_SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class Image(Task):
    """The length is fixed; how pixels become grey and which rows are held out decide the variant."""

    name: str = "image"
    data_seed: int = setting(42, low=0)
    split: str = setting("random", choices=("random", "stored"))
    gray: str = setting("pil", choices=("pil", "tf"))
    input: str = setting("tokens", choices=("tokens", "continuous"))
    black: str = setting("pixel", choices=("pixel", "padding"))
    mean: float = MEAN
    std: float = setting(STD, low=1e-6)

    description: ClassVar[str] = "class of a photograph, grey pixel by pixel (CIFAR-10)"
    num_classes: ClassVar[int] = len(CLASSES)
    default_length: ClassVar[int] = LENGTH
    vocab_size: ClassVar[int] = 257
    stored: ClassVar[str] = "pixels"
    disjoint: ClassVar[bool] = False  # rows are split by position, so what a source repeats may be in both

    @property
    def scaling(self) -> tuple[float, float]:
        return 255 * self.mean, 255 * self.std

    def check(self) -> None:
        super().check()
        idle = {}
        if self.input == "continuous":
            idle["black"] = "task.input=continuous"
        if self.input == "tokens":
            idle |= {"mean": "task.input=tokens", "std": "task.input=tokens"}
        if self.split == "stored":
            idle["data_seed"] = "task.split=stored"
        if self.val == "test":
            idle |= {"split": "task.val=test", "data_seed": "task.val=test"}
        for name, cause in idle.items():
            if getattr(self, name) != getattr(Image, name):
                raise UserError(
                    f"task.{name}={getattr(self, name)} would change nothing with {cause}; set "
                    f"task.{name}={getattr(Image, name)} (a recipe may have set another) or change "
                    f"{cause.split('=')[0]}"
                )

    def check_length(self, length: int) -> None:
        if length != LENGTH:
            raise UserError(
                f"length={length} is not allowed for image; its 32 x 32 pixels are length={LENGTH}"
            )

    def variant(self, length: int) -> dict[str, Any]:
        variant = {"task": "image", "reader": READER_VERSION, "gray": self.gray, "val": self.val}
        if self.val == "heldout":
            variant |= {"held_out": _HELD_OUT, "split": self.split}
            variant |= {"data_seed": self.data_seed} if self.split == "random" else {}
        return variant

    def variant_name(self, length: int) -> str:
        name = "cifar10-gray" + ("-tf" if self.gray == "tf" else "")
        if self.val == "test":
            return f"{name}-val-test (validation is the test split)"
        if self.split == "stored":
            return f"{name}-stored"
        return name + (f"-seed{self.data_seed}" if self.data_seed != Image.data_seed else "")

    def source_name(self) -> str | None:
        return None if self.source is None else located(self.source)[0]

    def plan(self, length: int) -> Plan:
        rows = sum(ROWS.values()) + (ROWS["test"] if self.val == "test" else 0)
        return Plan(self._open()[0], rows, rows * (LENGTH + 9) / 2**20, 20)

    def vocabulary(self) -> list[str]:
        return []

    def class_names(self) -> list[str]:
        return list(CLASSES)

    def decode(self, tokens: np.ndarray, vocab: list[str]) -> str:
        """The image in ten shades, two characters a pixel; white is `@`."""
        shades = np.asarray(tokens, np.int64).reshape(SIDE, SIDE) * len(_SHADES) // 256
        return "\n".join("".join(2 * _SHADES[shade] for shade in line) for line in shades)

    def build(
        self, writer, *, length: int, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        name, chunks = self._open()
        parts, origin, notes = _read(chunks, GRAY[self.gray], progress)
        pixels, labels = parts["train"]
        rows = {"train": np.arange(len(labels))}
        if self.val == "heldout":
            rows = held_out(len(labels), self.split, self.data_seed)
            if self.split == "stored" and (np.diff(labels) >= 0).all() and labels[0] != labels[-1]:
                raise UserError(
                    f"{name} has its rows class by class, so task.split=stored would hold out one class "
                    "only; use task.split=random, or a source in another order"
                )
        for split, chosen in rows.items():
            _add(writer, split, pixels[chosen], labels[chosen])
        for split in ("test",) if self.val == "heldout" else ("val", "test"):
            _add(writer, split, *parts["test"])
        writer.describe(source=name, data_origin=origin, generator=None, notes=notes)

    def check_rows(self, split, length: int) -> list[Finding]:
        other = int((split.lengths != LENGTH).sum())
        return [Finding(f"{split.name} image sizes", other == 0, f"32 x 32 pixels: {other} rows differ")]

    def statistics(self, split) -> dict[str, Any]:
        """Mean and standard deviation over all pixels, on the scale of 0 to 255."""
        from lra.data.show import symbol_counts

        counts = symbol_counts(split)
        levels = np.arange(len(counts))
        mean = float(counts @ levels / counts.sum())
        std = float(counts @ (levels - mean) ** 2 / counts.sum()) ** 0.5
        return {"pixel mean": round(mean, 3), "pixel std": round(std, 3)}

    def _open(self) -> tuple[str, Chunks]:
        return default() if self.source is None else located(self.source)


def gray_pil(rgb: np.ndarray) -> np.ndarray:
    """[... 3] uint8 -> [...] uint8, as Pillow's convert("L")."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def gray_tf(rgb: np.ndarray) -> np.ndarray:
    """[... 3] uint8 -> [...] uint8, as tf.image.rgb_to_grayscale; all arithmetic in float32."""
    red, green, blue = np.moveaxis(rgb.astype(np.float32) * np.float32(1 / 255), -1, 0)
    sum_ = red * np.float32(0.2989) + green * np.float32(0.5870) + blue * np.float32(0.1140)
    return (sum_ * np.float32(255.5)).astype(np.uint8)


GRAY = {"pil": gray_pil, "tf": gray_tf}


def held_out(count: int, split: str, seed: int) -> dict[str, np.ndarray]:
    """Rows of a source's train part for "train" and "val", in the order in which they are stored."""
    order = np.arange(count)
    if split == "random":
        import torch

        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    first = int(count * (1 - _HELD_OUT))
    return {"train": order[:first], "val": order[first:]}


def _add(writer, split: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    writer.add_rows(split, pixels.reshape(-1), np.arange(len(labels) + 1) * LENGTH, labels)


def _read(
    chunks: Chunks, gray, progress: Progress | None
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str, list[str]]:
    """Grey pixels [rows 1024] and labels [rows] of both parts, the data's origin, and notes on it."""
    read: dict[str, list[tuple]] = {part: [] for part in PARTS}
    done, known, jpegs = 0, set(), 0
    for chunk in chunks():
        read[chunk.part].append((chunk.place, gray(chunk.images).reshape(-1, LENGTH), chunk.labels))
        known |= _KNOWN[chunk.part] & set(_digests(chunk))
        jpegs += chunk.jpeg
        before, done = done, done + len(chunk.labels)
        if progress and done // REPORT_EVERY > before // REPORT_EVERY:
            progress(done, max(sum(ROWS.values()), done))
    parts = {}
    for part, pieces in read.items():
        pieces.sort(key=lambda piece: piece[0])
        parts[part] = tuple(np.concatenate([piece[i] for piece in pieces]) for i in (1, 2))
    return parts, *_origin({part: labels for part, (_, labels) in parts.items()}, known, jpegs)


def _digests(chunk: Chunk) -> list[str]:
    """For each row 16 hex digits of its label and its colours."""
    return [
        hashlib.blake2b(bytes([label]) + image.tobytes(), digest_size=8).hexdigest()
        for image, label in zip(chunk.images, chunk.labels, strict=True)
    ]


def _origin(labels: dict[str, np.ndarray], known: set[str], jpegs: int) -> tuple[str, list[str]]:
    """(data_origin, notes): "original" only with CIFAR-10's label counts, all known images bit by bit, and no
    JPEG among the pictures.
    """
    counts = {part: np.bincount(each, minlength=len(CLASSES)).tolist() for part, each in labels.items()}
    if any(counts[part] != [ROWS[part] // len(CLASSES)] * len(CLASSES) for part in PARTS):
        rows = {part: len(each) for part, each in labels.items()}
        return "stand_in", [
            f"rows {rows}, label counts {counts}: not CIFAR-10, which has {ROWS} in equal classes"
        ]
    wanted = sum(map(len, _KNOWN.values()))
    found = {part: hashlib.sha256(labels[part].astype(np.uint8)).hexdigest() for part in PARTS}
    order = (
        "the labels are in the order of CIFAR-10's batches 1 to 5 and test"
        if found == _LABELS
        else "the rows are in another order than in CIFAR-10's batches, so the held-out rows are others too"
    )
    if len(known) == wanted and not jpegs:
        note = f"CIFAR-10's label counts, and all of {wanted} known images bit by bit; others not compared"
        return "original", [note, order]
    note = f"CIFAR-10's label counts, but {len(known)} of {wanted} known images bit by bit, {jpegs:,} JPEGs"
    if not known and found != _LABELS:
        return "stand_in", [f"{note}: other pictures", order]
    return "lossy_copy", [f"{note}: a lossy copy", order]


_LABELS = {
    "train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
"""SHA-256 of the labels, a byte each, in CIFAR-10's own order."""

_KNOWN = {
    "train": set(
        """
        7cea60936a7475e0 a4ace8b1b929acf3 7374eb07ae64ecb6 8db886f88666538d 443c2fc223040e10
        15ffdaa069d23009 c5e0ddcfb59778c6 84ce928cf3e23350 7ae82c14b3e968bb 8cb496dd1a2c30c9
        4eccc53a9d05d7f0 7b6710ce75207f2a 83fd3a97689dbed4 2043822b7336eea1 2c8b9b005cd6da14
        f61ba55c206557d3 73da0726b1262415 5839215eb51b86b5 cd270226f75c6793 b6b0d394111684fb
        ce9c7f887113da12 d77c52e67c0a56f5 ac04186131ee8b41 78b1b60eb29906fd 251e7e90498752f6
        cdb710f814fb40f9 20d2a87a855474a3 20a0b076d19ec5d8 84e637555097861b 19e9b5ec180bc1c3
        520f06b69800fa81 61cfbe5c5de8f6b9 8974afa164c26ec4 7d4d1479d2fa8325 a83a3d19889ec92c
        0a11831247d01c83 81b1b87cf1a0bbad 531ceee7d2f4029e 44c49cf1e3263cdf 05ca085cf921aa5a
        6f71ee86f2de5521 45b35c6b725f8ff2 ae3f0cc7e6428ebd 92677ca9a13a9be7 a1ae4a604dc8ab31
        15a719eb1eb6c222 58000680254b87d5 f7e7d9170c936036
        """.split()
    ),
    "test": set(
        """
        67f31202fa35550f 783ee5f99b25f4bf 25409494ed75a60b 9556c1cfc4e76c3b 6ac88520f22c04ee
        0e2b75b3de12fe70 d794900e5fa1f0b6 f542667a38282a6f deeccecc9cea500f debd6dd0219255f7
        3d516144a9c960fe 680415a11876ae6d 0dad781c37f5fe42 2e5242eeb95c7d85 2c05eb6dcff320e4
        c0146192c5f49175
        """.split()
    ),
}
"""`_digests` of images spread over those parts of CIFAR-10 whose exact pixels are at hand."""
