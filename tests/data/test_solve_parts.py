"""The parts of the network's training: its clock, its turns, its rows, and what its score counts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from synthetic_tasks import Pixels

from lra.data import solve as module
from lra.data.prepare import prepare
from lra.data.solve import Clock, Setting, SmallCNN, solve, turned

CPU = torch.device("cpu")
QUICK = {"epochs": 3, "batch_size": 32, "width": 8, "blocks": 1, "test_rows": 200}


@dataclass(frozen=True)
class Shades(Pixels):
    """Dark and bright images, labelled in the test split the other way round; sorted by label."""

    name: str = "shades"
    rows: int = 300
    num_classes: ClassVar[int] = 2

    def rows_of(self, split, length):
        rng = np.random.default_rng(len(split))
        labels = np.sort(rng.integers(0, 2, self.rows))
        images = rng.integers(0, 100, (self.rows, length)) + 150 * labels[:, None]
        shown = 1 - labels if split == "test" else labels
        return [([image.astype(np.uint8)], int(label)) for image, label in zip(images, shown, strict=True)]


def learning_rates(monkeypatch, setting: Setting, pause: float = 0.0) -> list[float]:
    """The learning rate of every step of a training in which a step takes `pause` seconds by the clock."""
    seen, now = [], [0.0]
    plain = module._step

    def step(model, optimizer, *rest):
        seen.append(optimizer.param_groups[0]["lr"])
        now[0] += pause
        return plain(model, optimizer, *rest)

    monkeypatch.setattr(module, "_step", step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    solve(prepare(Shades(), 64), setting, CPU)
    return seen


@pytest.mark.parametrize("time_limit", [None, 50.0])
def test_the_learning_rate_rises_once_and_falls_to_nearly_zero(time_limit, monkeypatch):
    setting = Setting(**QUICK | {"epochs": 20}, time_limit=time_limit, lr=1.0)
    rates = learning_rates(monkeypatch, setting, pause=0.5)
    assert len(rates) == (180 if time_limit is None else 100)
    top = int(np.argmax(rates))
    assert rates[0] < 0.05 and rates[top] > 0.7 and rates[-1] < 0.3
    assert (np.diff(rates[: top + 1]) >= 0).all() and (np.diff(rates[top:]) <= 0).all()
    np.testing.assert_allclose(rates[:20], [(step + 1) / 36 for step in range(20)])  # a fifth of 180 steps


def test_a_clock_goes_by_steps_until_time_runs_out_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock = Clock(1000, 10.0)
    assert clock.rate(99, CPU) == pytest.approx(0.5) and clock.rate(600, CPU) == pytest.approx(0.5)
    now[0] = 8.0
    assert clock.rate(300, CPU) == pytest.approx(0.25) and clock.rate(310, CPU) == pytest.approx(0.25)
    now[0] = 10.0
    assert clock.rate(320, CPU) == 0
    untimed = Clock(1000, None)
    assert untimed.rate(200, CPU) == 1 and untimed.rate(999, CPU) > 0 == untimed.rate(1000, CPU)


def test_the_score_is_of_the_test_rows_and_not_of_the_training_rows():
    result = solve(prepare(Shades(), 64), Setting(**QUICK), CPU)
    assert result["test_accuracy"] < 0.1 and result["train_accuracy"] > 0.9


def test_rows_are_drawn_from_all_of_a_split_that_is_sorted_by_class():
    generator = np.random.default_rng(0)
    split = prepare(Shades(), 64).split("test")
    images, labels = module._images(split, 60, generator, CPU)
    assert images.shape == (60, 1, 8, 8) and 15 < int(labels.sum()) < 45
    bright = images.float().mean((1, 2, 3)) > 125
    assert (bright.long() == 1 - labels).all()  # each image still with its own label


def test_every_turn_of_an_image_occurs_and_nothing_else():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    generator = np.random.default_rng(0)
    found = {tuple(turned(image, generator).reshape(-1).tolist()) for _ in range(200)}
    square = image[0, 0]
    wanted = {
        tuple(torch.rot90(side, quarter).reshape(-1).tolist())
        for side in (square, square.flip(0))
        for quarter in range(4)
    }
    assert found == wanted


def test_an_images_class_does_not_depend_on_the_rest_of_its_batch():
    torch.manual_seed(0)
    model = SmallCNN(8, 2, width=8, blocks=1)
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    model.train()
    for start in range(0, 64, 16):
        model(module._values(images[start : start + 16]))  # so that batch and running statistics differ
    labels = torch.zeros(64, dtype=torch.long)
    assert module._right(model, images, labels, 64, CPU) == module._right(model, images, labels, 1, CPU)


def test_two_seeds_give_two_networks():
    first, second = (
        solve(prepare(Shades(), 64), Setting(**QUICK | {"epochs": 1}, seed=seed, lr=1e-9), CPU)
        for seed in (0, 1)
    )
    assert first["train_accuracy"] != second["train_accuracy"]


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    orders, plain = [], module._order
    monkeypatch.setattr(module, "_order", lambda *args: orders.append(plain(*args)) or orders[-1])
    solve(prepare(Shades(), 64), Setting(**QUICK), CPU)
    assert len(orders) == 3 and not torch.equal(orders[0], orders[1])
    assert all(torch.equal(order.sort().values, torch.arange(300)) for order in orders)


def test_rows_of_several_sizes_are_refused():
    split = prepare(Pixels(), 64).split("train")
    uneven = type(split)(
        "train", split.tokens, np.append(split.offsets[:-1], split.offsets[-1] + 1), split.labels, 1
    )
    with pytest.raises(module.UserError, match="not all square images of one size"):
        module._images(uneven, None, np.random.default_rng(0), CPU)
