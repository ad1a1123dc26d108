"""The small network learns what an image says, and nothing where labels are shuffled."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from synthetic_tasks import Pixels, Synthetic

from lra.data.prepare import prepare
from lra.data.solve import Setting, SmallCNN, solve
from lra.errors import UserError

QUICK = {"test_rows": 200, "epochs": 3, "batch_size": 32, "width": 8, "blocks": 1}


@dataclass(frozen=True)
class Bars(Pixels):
    """Noise with a bright bar: lying (label 0) or standing (label 1)."""

    name: str = "bars"
    rows: int = 400
    num_classes: ClassVar[int] = 2

    def rows_of(self, split, length):
        rng = np.random.default_rng([self.data_seed, len(split)])
        size, rows = round(length**0.5), []
        for _ in range(self.rows):
            image, label = rng.integers(0, 100, (size, size)).astype(np.uint8), int(rng.integers(2))
            place = rng.integers(2, size - 2)
            # A mirrored or transposed lying bar must stay told apart: a bar of 3 pixels against one of 9.
            start, long = rng.integers(2, size - 10), 3 if label else 9
            image[place, start : start + long] = 255
            rows.append(([image.reshape(-1)], label))
        return rows


def test_it_learns_what_the_images_show():
    result = solve(prepare(Bars(), 256), Setting(**QUICK | {"epochs": 8}), torch.device("cpu"))
    assert result["test_accuracy"] > 0.9 and result["test_images"] == 200 and result["train_images"] == 400


def test_shuffled_labels_cannot_be_learned():
    result = solve(prepare(Bars(), 256), Setting(shuffled=True, **QUICK), torch.device("cpu"))
    assert 0.35 < result["test_accuracy"] < 0.65 and result["shuffled_labels"]


def test_the_same_seed_gives_the_same_answer():
    store = prepare(Bars(rows=100), 256)
    setting = Setting(**QUICK | {"epochs": 1, "test_rows": 100})
    first, second = (solve(store, setting, torch.device("cpu")) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "train_s"} == {
        k: v for k, v in second.items() if k != "train_s"
    }


def test_a_time_limit_ends_training_early():
    setting = Setting(**QUICK | {"epochs": 1000, "test_rows": 100}, time_limit=0.5)
    result = solve(prepare(Bars(rows=100), 256), setting, torch.device("cpu"))
    assert result["epochs"] < 500


def test_tasks_without_images_and_too_few_images_are_refused():
    with pytest.raises(UserError, match="has no images"):
        solve(prepare(Synthetic(), 50), Setting(), torch.device("cpu"))
    with pytest.raises(UserError, match="30 training images are less than one batch"):
        solve(prepare(Pixels(), 256), Setting(batch_size=64), torch.device("cpu"))
    with pytest.raises(UserError, match="not all square"):
        solve(prepare(Pixels(), 250), Setting(batch_size=8), torch.device("cpu"))


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_every_size_ends_at_4_by_4_pixels(size):
    model = SmallCNN(size, 2, width=8, blocks=1)
    stages = model.stages(model.stem(torch.zeros(1, 1, size, size)))
    assert stages.shape[-2:] == (4, 4) and model(torch.zeros(2, 1, size, size)).shape == (2, 2)
