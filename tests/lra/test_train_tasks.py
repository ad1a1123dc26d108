"""Every kind of input trains: pixels as tokens, pixels as values, pairs of documents, characters."""

import numpy as np
import pytest
import torch
from small_tasks import MODEL as TINY_MODEL
from small_tasks import write_papers, write_reviews

from lra import run
from lra.assembly import build_model, choose_layout
from lra.config import compose
from lra.data.batch import Batches, decoding
from lra.data.prepare import prepare
from lra.errors import UserError

MODEL = [*TINY_MODEL, "train.num_steps=4", "train.eval_every=4"]
PATHFINDER = ["task=pathfinder32", "task.num_images=100", "batch_size=8"]


@pytest.fixture
def papers(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return [f"task.source={write_papers(tmp_path / 'papers')}", "batch_size=4"]


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    return [f"task.source={write_reviews(tmp_path / 'reviews')}", "batch_size=8"]


@pytest.mark.parametrize("more", [[], ["task.input=continuous"], ["task.input=continuous", "layout=padded"]])
def test_pixels_train_as_tokens_and_as_values(more):
    more = [item.replace("layout", "train.layout") for item in more]
    record = run.execute(compose([*PATHFINDER, "model=linear", *MODEL, *more]))
    assert record.status == "ok" and record.num_test == 10
    assert record.data_origin == "regenerated" and record.length == 1024


def test_tokens_and_values_are_different_runs_on_the_same_data():
    tokens, values = (compose([*PATHFINDER, f"task.input={kind}"]) for kind in ("tokens", "continuous"))
    store = prepare(tokens.task, tokens.length)
    assert prepare(values.task, values.length).path == store.path
    assert tokens.run_id(store.data_hash) != values.run_id(store.data_hash)


@pytest.mark.parametrize("unit", ["byte", "char"])
@pytest.mark.parametrize(
    "model", ["linear", "luna"]
)  # a packed path of its own, and one that is padded around
def test_pairs_train(unit, model, papers):
    config = compose(["task=retrieval", "length=64", f"model={model}", f"task.unit={unit}", *papers, *MODEL])
    record = run.execute(config)
    assert record.status == "ok" and record.num_test == 8 and record.data_origin == "stand_in"


def test_characters_train_with_the_vocabulary_of_the_data(reviews):
    overrides = [
        "task=text",
        "length=64",
        "model=linear",
        "task.unit=char",
        "task.min_freq=2",
        *reviews,
        *MODEL,
    ]
    config = compose(overrides)
    store = prepare(config.task, config.length)
    assert store.vocab_size == len(store.vocab) != config.task.vocab_size
    assert run.execute(config).status == "ok"


def batch_of(overrides: list[str]) -> torch.Tensor:
    config = compose([*PATHFINDER, *overrides])
    split = prepare(config.task, config.length).split("train")
    batches = Batches(
        split, documents=1, length=1024, padded_length=1024, batch_size=8, device=torch.device("cpu"),
        **decoding(config.task),
    )  # fmt: skip
    return batches.gather(np.arange(2)).inputs, np.asarray(split.tokens[:2048])


def test_a_pixel_becomes_the_id_after_it_or_its_scaled_value():
    inputs, pixels = batch_of([])
    assert inputs.tolist() == (pixels.astype(int) + 1).tolist()
    inputs, _ = batch_of(["task.input=continuous", "task.mean=0.25", "task.std=0.5"])
    wanted = torch.from_numpy((pixels / 255 - 0.25) / 0.5).float().unsqueeze(-1)
    torch.testing.assert_close(inputs, wanted)


def test_black_pixels_as_padding_reach_no_logit():
    config = compose([*PATHFINDER, "model=softmax", *MODEL, "task.black=padding"])
    record = run.execute(config)
    assert record.status == "ok" and record.layout == "padded"
    assert record.run_id != run.execute(compose([*PATHFINDER, "model=softmax", *MODEL])).run_id
    store = prepare(config.task, config.length)
    batches = Batches(
        store.split("test"),
        documents=1,
        length=1024,
        padded_length=1024,
        batch_size=5,
        packed=False,
        device=torch.device("cpu"),
        **decoding(config.task),
    )
    batch = next(batches.in_order())
    torch.manual_seed(0)
    model = build_model(config, vocab_size=store.vocab_size).eval()
    before = model(batch.inputs, batch.layout)
    black = model.embedding.values.weight[1]
    with torch.no_grad():
        black += 5.0
    torch.testing.assert_close(model(batch.inputs, batch.layout), before, rtol=0, atol=1e-5)
    assert 0 < batch.num_tokens < 5 * 1024


def test_black_pixels_as_padding_need_tokens_and_the_padded_layout():
    with pytest.raises(UserError, match="black"):
        compose([*PATHFINDER, "model=softmax", "task.input=continuous", "task.black=padding"])
    with pytest.raises(UserError, match="needs padding"):
        choose_layout(compose([*PATHFINDER, "task.black=padding", "train.layout=packed"]))


def test_a_masked_first_pixel_is_not_pooled():
    with pytest.raises(UserError, match="pool=first"):
        choose_layout(compose([*PATHFINDER, "task.black=padding", "model.pool=first"]))


def test_a_mechanism_that_cannot_mask_single_pixels_is_unsupported(tmp_path, monkeypatch):
    (tmp_path / "prefix_only.py").write_text(PREFIX_ONLY)
    target = f"model.target={tmp_path / 'prefix_only.py'}:PrefixOnly"
    config = [*PATHFINDER, "model=custom", target, *MODEL, "task.black=padding"]
    record = run.execute(compose(config))
    assert record.status == "unsupported" and "single positions" in record.reason


PREFIX_ONLY = """
import dataclasses
from models import Mixer, Traits

class PrefixOnly(Mixer):
    traits = Traits(needs_prefix_mask=True, because={"needs_prefix_mask": "a test"})

    def attend(self, q, k, v, mask):
        return v
"""
