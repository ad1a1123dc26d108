"""Short runs of every task follow the curves in golden/curves.json, so that a change of training shows.

To rewrite the file after a change that is meant:
  LRA_WRITE_GOLDEN=1 pytest -n 0 tests/lra/test_golden_curves.py
The tests then write what they found, and still compare it.

Batches must be the same to the bit. Losses may differ by 2e-4 of themselves, as other CPUs round otherwise,
and an accuracy by one row, whose two highest logits such rounding may swap. Where every curve differs, the
last test says whether it is torch that draws other random numbers.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from small_tasks import MODEL, TASKS

from lra.config import compose
from lra.data.prepare import prepare
from lra.train import Trainer

GOLDEN = Path(__file__).with_name("golden") / "curves.json"
TOLERANCE = 2e-4
RUN = [*MODEL, "batch_size=8", "train.log_every=1", "train.selection=last", "train.device=cpu"]
TWELVE_STEPS = ["train.num_steps=12", "train.eval_every=6", "train.lr=5e-3"]
SETTINGS = {
    "listops": [
        *TWELVE_STEPS,
        "model=softmax",
        "model.dropout=0.1",
        "model.attn_dropout=0.1",
        "train.schedule=onecycle",
        "train.warmup_steps=4",
        "train.cycle_momentum=true",
        "train.weight_decay=0.1",
    ],
    "text": [*TWELVE_STEPS, "model=linear", "model.dropout=0.2", "train.clip_norm=0.5"],
    "retrieval": [
        *TWELVE_STEPS,
        "model=luna",
        "train.optimizer=adam",
        "train.weight_decay=0.1",
        "train.micro_batch=3",
    ],
    "image": [*TWELVE_STEPS, "model=s4d", "task.input=continuous", "model.norm=batch", "model.dropout=0.1"],
    "pathfinder32": [*TWELVE_STEPS, "model=linear", "train.schedule=cosine", "train.layout=padded"],
    "pathx": ["train.num_steps=3", "train.eval_every=3", "batch_size=2", "model=linear", "model.d_ff=16"],
}


def golden(name: str, found: dict | str) -> dict | str:
    """The committed numbers of that name, or under LRA_WRITE_GOLDEN those found, which are committed now."""
    if os.environ.get("LRA_WRITE_GOLDEN"):
        kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(kept | {name: found}, indent=1, sort_keys=True) + "\n")
    return json.loads(GOLDEN.read_text())[name]


def digest_of_batches(trainer: Trainer) -> str:
    """12 hex digits of the inputs, the labels and the rows of all training batches."""
    digest = hashlib.sha256()
    for step in range(trainer.config.train.num_steps):
        for batch in trainer.batches["train"].train(step):
            for part in (batch.inputs.numpy(), batch.labels.numpy(), batch.rows):
                digest.update(part.tobytes())
    return digest.hexdigest()[:12]


@pytest.mark.parametrize("task", TASKS)
def test_a_short_run_follows_its_golden_curve(task, tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    config = compose([*TASKS[task](tmp_path / "source"), *RUN, *SETTINGS[task]])
    trainer = Trainer(config, prepare(config.task, config.length), tmp_path)
    measured = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {
        "batches": digest_of_batches(trainer),
        "losses": [line["loss"] for line in lines if "loss" in line],
        "val_losses": [line["val_loss"] for line in lines if "val_loss" in line],
        "val_accuracy": measured["val_accuracy"],
        "test_accuracy": measured["test_accuracy"],
    }
    wanted = golden(task, found)
    assert found["batches"] == wanted["batches"]
    for name in ("losses", "val_losses"):
        assert found[name] == pytest.approx(wanted[name], rel=TOLERANCE), name
    for split in ("val", "test"):
        name, one_row = f"{split}_accuracy", 1 / trainer.batches[split].num_rows
        assert found[name] == pytest.approx(wanted[name], rel=0, abs=1.01 * one_row), name


def test_torch_draws_the_random_numbers_of_the_golden_curves():
    torch.manual_seed(0)
    drawn = torch.stack([torch.dropout(torch.ones(4096), 0.1, True), torch.rand(4096)])
    found = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:12]
    assert found == golden("random", found)
