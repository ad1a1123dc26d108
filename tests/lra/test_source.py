"""Where batches find their tokens: on the device, in a window that is filled batch by batch, on disk."""

import numpy as np
import pytest
import torch

from lra import records, run
from lra.config import compose
from lra.data import source
from lra.data.batch import Batches
from lra.data.source import Resident, Streamed, choose_source
from lra.data.store import Split
from lra.train import Trainer

CPU = torch.device("cpu")
LENGTH = 10
STORED = [4, 9, 1, 7, 12, 3, 5, 10, 2, 11, 6, 8]  # tokens of each document; three are longer than LENGTH


def split(name: str = "train", *, documents: int = 1, dtype=np.uint8, lengths=STORED) -> Split:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    highest = np.iinfo(dtype).max
    tokens = np.random.default_rng(len(name)).integers(1, highest, offsets[-1]).astype(dtype)
    labels = np.arange(len(lengths) // documents, dtype=np.uint8) % 3
    return Split(name, tokens, offsets, labels, documents)


def batches(of: Split, its, **options) -> Batches:
    settings = {"length": LENGTH, "padded_length": LENGTH, "batch_size": 4, "seed": 3, **options}
    return Batches(of, documents=of.documents, device=CPU, source=its, **settings)


def window(of: Split, rows: int) -> Streamed:
    """Just large enough for the largest batch of so many rows."""
    per_row = np.minimum(of.lengths, LENGTH).reshape(-1, of.documents).sum(1)
    return Streamed(int(np.sort(per_row)[-rows:].sum()), of.tokens.dtype, CPU)


def assert_same(one, other) -> None:
    assert (one.rows == other.rows).all() and one.num_tokens == other.num_tokens
    real = int(one.layout.cu_seqlens[-1]) if hasattr(one.layout, "cu_seqlens") else None  # then filler
    assert torch.equal(one.inputs[:real], other.inputs[:real]) and torch.equal(one.labels, other.labels)
    for name in ("cu_seqlens", "real"):
        mine, others = (getattr(batch.layout, name, None) for batch in (one, other))
        assert mine is others is None or torch.equal(mine, others)


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("packed", [True, False])
def test_streamed_batches_are_those_of_the_data_kept_on_the_device(documents, dtype, packed):
    kept = split(documents=documents, dtype=dtype)
    before = split("val", documents=documents, dtype=dtype)  # the one that is looked at is not the first
    options = {"packed": packed, "token_sizes": (30, 60) if packed else ()}
    streamed = batches(kept, window(kept, rows=4), **options)
    resident = batches(kept, Resident([before, kept], CPU), **options)
    for step in range(7):
        for micro_batch in (None, 3):
            made = [b.train(step, micro_batch=micro_batch) for b in (streamed, resident)]
            assert len(made[0]) == (2 if micro_batch else 1)
            for one, other in zip(*made, strict=True):
                # The parts were gathered one after the other through one window, and are all still right.
                assert_same(one, other)
    for one, other in zip(streamed.in_order(), resident.in_order(), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("packed", [True, False])
def test_streamed_rows_of_equal_length_are_right_too(packed):
    kept = split(lengths=[LENGTH] * 8)
    streamed, resident = (batches(kept, its, packed=packed) for its in (window(kept, 4), None))
    assert streamed.full
    for one, other in zip(streamed.in_order(), resident.in_order(), strict=True):
        assert_same(one, other)


def test_the_window_stays_at_its_place_and_holds_the_largest_batch():
    kept = split()
    its = window(kept, rows=4)  # one byte a token
    made = batches(kept, its)
    assert its.device_bytes == 10 + 10 + 10 + 9
    place = its.tokens.data_ptr()
    largest = made.plan(np.argsort(kept.lengths)[-4:])
    assert (
        its.tokens_of(largest.stored).data_ptr()
        == place
        == its.tokens_of(made.plan(np.arange(2)).stored).data_ptr()
    )
    narrow = batches(kept, Streamed(its.device_bytes - 1, kept.tokens.dtype, CPU))
    with pytest.raises(RuntimeError):
        narrow.made(largest)


def test_on_a_cpu_the_memory_map_is_the_source_unless_streaming_is_asked_for():
    splits = [split(name) for name in ("train", "val")]
    for how in ("auto", "device"):
        assert choose_source(splits, CPU, how=how, largest_batch=9) == (None, "read from the memory map")
    made, why = choose_source(splits, CPU, how="stream", largest_batch=9)
    assert isinstance(made, Streamed) and made.tokens.shape == (9,) and made.tokens.dtype == torch.uint8
    assert "streamed" in why


@pytest.mark.parametrize(
    ("how", "free", "expected"),
    [
        ("auto", 2.5, "device"),
        ("auto", 2.4, "stream"),
        ("device", 0.1, "device"),
        ("stream", 100, "stream"),
    ],
)
def test_a_gpu_keeps_what_takes_at_most_four_tenths_of_its_free_memory(monkeypatch, how, free, expected):
    splits = [split(name, dtype=np.int16) for name in ("train", "val", "test")]
    size = sum(each.tokens.nbytes for each in splits)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size * free, size * 1000))
    monkeypatch.setattr(source, "Resident", lambda kept, device: ("device", len(kept), device))
    monkeypatch.setattr(source, "Streamed", lambda room, dtype, device: ("stream", room, dtype, device))
    gpu = torch.device("cuda", 0)
    made, why = choose_source(splits, gpu, how=how, largest_batch=77)
    assert made == {"device": ("device", 3, gpu), "stream": ("stream", 77, np.dtype("int16"), gpu)}[expected]
    assert ("streamed" in why) == (expected == "stream")


def test_the_window_of_a_run_holds_its_largest_evaluation_batch(tiny, tmp_path):
    settings = tiny("train.eval_batch_size=150", "train.device=cpu", "model=identity")

    def scored(how: str) -> list[int]:
        config = compose([*settings, f"train.data={how}"])
        made = Trainer(config, run.prepared(config), tmp_path)
        return made.evaluate("test")[2].tolist()

    assert scored("stream") == scored("auto")


def test_a_streamed_run_has_the_numbers_of_any_other(tiny, monkeypatch):
    monkeypatch.setattr(Trainer, "_measure_cost", lambda self: {})  # by a profiler, for a second
    settings = tiny("train.num_steps=6", "train.eval_every=3", "train.log_every=1")
    settings += ["train.micro_batch=5", "train.eval_batch_size=7", "train.device=cpu", "model=linear"]

    def result(*more: str) -> tuple:
        record = run.execute(compose([*settings, *more]), force=True)
        folder = records.runs_root() / record.run_id
        accuracies = record.test_accuracy, record.val_accuracy, record.accuracy_by_length
        predictions = records.load_predictions(folder)
        return record.status, accuracies, str(predictions), (folder / "metrics.jsonl").read_text()

    assert result("train.data=stream") == result()
