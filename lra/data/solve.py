"""Can the images of a task be told apart at all? A small convolutional network says so.

Copies of Pathfinder circulate whose labels do not belong to their images: a model then fits the training rows
and stays at chance on the others. Every copy, and every generator, is worth this test before a result on it
is believed. The network knows the picture's two dimensions, so its accuracy is no benchmark result.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lra import environment
from lra.data.store import Split, Store
from lra.errors import UserError

# b images, c channels, y x pixels


@dataclass(frozen=True)
class Setting:
    """How the network is trained."""

    rows: int | None = None  # training images; None: all
    test_rows: int = 2000
    epochs: int = 10
    batch_size: int = 256
    lr: float = 2e-3
    width: int = 64
    blocks: int = 2  # residual blocks a stage
    shuffled: bool = False  # labels in random order, train and test: no network may learn anything then
    seed: int = 0
    time_limit: float | None = None  # seconds


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; the first may halve the picture."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.shortcut = nn.Identity()
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:  # [b c y x] -> [b c' y' x']
        h = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(h + self.shortcut(x))


class SmallCNN(nn.Module):
    """Residual stages, each of half the resolution of the one before, down to 4 x 4 pixels; then the maximum
    and the mean over what is left.
    """

    def __init__(self, size: int, num_classes: int, *, width: int, blocks: int) -> None:
        """`width`: channels at 16 x 16 pixels; twice as many at half the side, down to half of it above."""
        super().__init__()
        sides = [size >> halvings for halvings in range(1, 16) if size >> halvings >= 4]
        channels = [min(max(16 * width // side, width // 2), 4 * width) for side in sides]
        inner = channels[0]
        self.stem = nn.Sequential(nn.Conv2d(1, inner, 3, 1, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        stages = []
        for outer in channels:
            stages.append(Residual(inner, outer, 2))
            stages += [Residual(outer, outer, 1) for _ in range(blocks - 1)]
            inner = outer
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(2 * inner, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [b 1 y x] -> [b num_classes]
        x = self.stages(self.stem(x))
        return self.head(torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1))


def solve(
    store: Store,
    setting: Setting,
    device: torch.device,
    *,
    report: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train on rows of `train` and count right answers on rows of `test`, both drawn with the seed.

    `report` gets (epoch, mean loss) after each epoch.
    """
    if store.manifest["input"] != "pixels":
        raise UserError(f"{store.data_variant} has no images; the network is for tasks made of pixels")
    generator = np.random.Generator(np.random.Philox(key=[setting.seed, 1]))
    train = _images(store.split("train"), setting.rows, generator, device)
    test = _images(store.split("test"), setting.test_rows, generator, device)
    if setting.shuffled:
        train, test = (
            (images, labels[_order(generator, len(labels), device)]) for images, labels in (train, test)
        )
    if len(train[1]) < setting.batch_size:
        raise UserError(f"{len(train[1])} training images are less than one batch of {setting.batch_size}")
    torch.manual_seed(setting.seed)
    size, num_classes = train[0].shape[-1], store.manifest["num_classes"]
    model = SmallCNN(size, num_classes, width=setting.width, blocks=setting.blocks).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.05)
    per_epoch = len(train[1]) // setting.batch_size
    clock = Clock(setting.epochs * per_epoch, setting.time_limit)
    step, started = 0, time.perf_counter()
    model.train()
    for epoch in range(setting.epochs):
        order, losses = _order(generator, len(train[1]), device), torch.zeros((), device=device)
        for index in range(per_epoch):
            rate = clock.rate(step, device)
            if rate == 0:
                break
            optimizer.param_groups[0]["lr"] = setting.lr * rate
            rows = order[index * setting.batch_size : (index + 1) * setting.batch_size]
            losses += _step(model, optimizer, turned(train[0][rows], generator), train[1][rows], device)
            step += 1
        if report and step > epoch * per_epoch:
            report(epoch + 1, float(losses) / (step - epoch * per_epoch))
    environment.synchronize(device)
    trained, seen = time.perf_counter(), [part[: setting.test_rows] for part in train]
    return {
        "variant": store.data_variant,
        "data_hash": store.data_hash,
        "data_origin": store.data_origin,
        "shuffled_labels": setting.shuffled,
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "test_accuracy": _right(model, *test, setting.batch_size, device) / len(test[1]),
        "train_accuracy": _right(model, *seen, setting.batch_size, device) / len(seen[1]),
        "epochs": round(step / per_epoch, 2),
        "train_s": round(trained - started, 1),
        "num_params": sum(p.numel() for p in model.parameters()),
        "setting": dataclasses.asdict(setting),
        "device": environment.device_name(device),
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "versions": environment.versions(),
        "git_revision": environment.git_revision(),
    }


class Clock:
    """How far training is, and the learning rate that follows from it.

    Training ends after its steps, or at its time limit where that comes first. The rate rises over the first
    fifth of the steps, however little time there is: on large images nothing is learned if it rises too fast.
    It falls to zero with what is left of steps or time. Time is read every 20 steps.
    """

    def __init__(self, num_steps: int, time_limit: float | None) -> None:
        self.num_steps, self.time_limit = num_steps, time_limit
        self.started, self.late = time.perf_counter(), 0.0

    def rate(self, step: int, device: torch.device) -> float:
        """The share of the highest learning rate for step `step`; 0 after the last one."""
        if self.time_limit is not None and step % 20 == 0:
            environment.synchronize(device)
            self.late = (time.perf_counter() - self.started) / self.time_limit
        done = step / self.num_steps
        return max(0.0, min((done + 1 / self.num_steps) / 0.2, (1 - max(done, self.late)) / 0.8, 1.0))


def _images(
    split: Split, limit: int | None, generator: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`limit` images [b 1 y x] uint8 and labels [b], drawn at random: a split may be sorted by class."""
    length = int(split.lengths[0])
    size = round(length**0.5)
    if not (split.lengths == size * size).all():
        raise UserError(f"the rows of {split.name} are not all square images of one size")
    if limit is None or limit >= len(split):
        tokens, labels = split.part(0, len(split)).tokens, split.labels
    else:
        rows = np.sort(generator.permutation(len(split))[:limit])
        tokens, labels = split.tokens.reshape(-1, length)[rows], split.labels[rows]
    images = torch.from_numpy(np.asarray(tokens)).to(device).view(-1, 1, size, size)
    return images, torch.from_numpy(np.asarray(labels)).to(device)


def _order(generator: np.random.Generator, rows: int, device: torch.device) -> Tensor:
    return torch.from_numpy(generator.permutation(rows)).to(device)


def turned(images: Tensor, generator: np.random.Generator) -> Tensor:
    """A batch mirrored and transposed at random, all of it in the same way."""
    down, across, transposed = generator.integers(0, 2, 3)
    dims = [2] * int(down) + [3] * int(across)
    images = images.flip(dims) if dims else images
    return images.transpose(2, 3) if transposed else images


def _values(images: Tensor) -> Tensor:
    return ((images.float() - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, device: torch.device
) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = F.cross_entropy(model(_values(images)).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> int:
    """How many images get their own label."""
    model.eval()
    right = 0
    for start in range(0, len(labels), batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(_values(images[start : start + batch_size]))
        right += int((logits.float().argmax(1) == labels[start : start + batch_size]).sum())
    return right
