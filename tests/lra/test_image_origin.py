"""Only pictures whose pixels were kept can be CIFAR-10 itself."""

import io

import numpy as np
import pytest
from PIL import Image

from lra.tasks import image as module
from lra.tasks.image_files import located

LABELS = {part: np.repeat(np.arange(10), rows // 10) for part, rows in module.ROWS.items()}
KNOWN = set().union(*module._KNOWN.values())


@pytest.mark.parametrize(
    ("known", "jpegs", "in_order", "origin"),
    [
        (KNOWN, 0, False, "original"),
        (KNOWN, 1, False, "lossy_copy"),  # a copy that was mended with some exact pictures
        (set(list(KNOWN)[1:]), 0, False, "lossy_copy"),
        (set(), 60_000, True, "lossy_copy"),
        (set(), 0, True, "lossy_copy"),
        (set(), 0, False, "stand_in"),  # any 60,000 pictures in ten equal classes
    ],
)
def test_the_origin_follows_from_known_pictures_jpegs_and_the_order_of_labels(
    known, jpegs, in_order, origin, monkeypatch
):
    if in_order:
        sha256 = module.hashlib.sha256
        hashes = {part: sha256(each.astype(np.uint8)).hexdigest() for part, each in LABELS.items()}
        monkeypatch.setattr(module, "_LABELS", hashes)
    assert module._origin(LABELS, known, jpegs)[0] == origin


@pytest.mark.parametrize(("form", "suffix", "jpeg"), [("PNG", "png", False), ("JPEG", "jpg", True)])
def test_a_chunk_says_whether_it_came_as_jpeg(form, suffix, jpeg, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (9, 99, 199)).save(buffer, form)
        (tmp_path / part / "cat" / f"0.{suffix}").write_bytes(buffer.getvalue())
    assert [chunk.jpeg for chunk in located(str(tmp_path))[1]()] == [jpeg, jpeg]
