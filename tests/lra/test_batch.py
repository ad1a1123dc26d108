"""Order, truncation and packing of batches."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lra.data.batch import Batches, token_sizes


@dataclass
class FakeSplit:
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    name: str = "train"

    def __len__(self) -> int:
        return len(self.labels)


def split(lengths, documents: int = 1, dtype=np.uint8) -> FakeSplit:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (np.arange(offsets[-1]) % 250 + 1).astype(dtype)
    return FakeSplit(tokens, offsets, np.arange(len(lengths) // documents) % 3)


LENGTHS = [4, 9, 1, 7, 12, 3, 5, 10]


def batches(lengths=LENGTHS, *, documents=1, **options) -> Batches:
    settings = {"length": 10, "padded_length": 12, "batch_size": 3, "device": torch.device("cpu"), **options}
    return Batches(split(lengths, documents), documents=documents, **settings)


def documents_of(batch, packed: bool) -> list[list[int]]:
    if not packed:
        return [row[mask].tolist() for row, mask in zip(batch.inputs, batch.layout.mask, strict=True)]
    bounds = batch.layout.cu_seqlens.tolist()
    return [batch.inputs[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_come_out_as_stored_cut_after_the_first_length_tokens(packed):
    source = split(LENGTHS)
    expected = [
        source.tokens[a:b][:10].tolist() for a, b in zip(source.offsets[:-1], source.offsets[1:], strict=True)
    ]
    found = [row for batch in batches(packed=packed).in_order() for row in documents_of(batch, packed)]
    assert found == expected


def test_both_layouts_see_the_same_batches_in_the_same_order():
    packed, padded = batches(packed=True, seed=5), batches(packed=False, seed=5)
    for step in range(7):
        (one,), (other,) = packed.train(step), padded.train(step)
        assert documents_of(one, True) == documents_of(other, False)
        assert torch.equal(one.labels, other.labels) and one.num_tokens == other.num_tokens


def test_an_epoch_shows_each_row_at_most_once_and_epochs_differ():
    made = batches(seed=1)
    epochs = [np.concatenate([made.train_rows(2 * epoch + i) for i in range(2)]) for epoch in range(20)]
    assert all(len(set(rows)) == 6 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1
    assert set(np.concatenate(epochs)) == set(range(8))


def test_batch_number_n_does_not_depend_on_the_batches_before():
    straight, jumped = batches(seed=2), batches(seed=2)
    for step in range(9):
        straight.train_rows(step)
    assert (straight.train_rows(9) == jumped.train_rows(9)).all()


def test_the_seed_decides_the_order():
    assert any((batches(seed=0).train_rows(s) != batches(seed=1).train_rows(s)).any() for s in range(4))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_in_order_visits_each_row_once(batch_size):
    rows = np.concatenate([batch.rows for batch in batches(batch_size=batch_size).in_order()])
    assert rows.tolist() == list(range(8))


def test_packed_batches_are_filled_up_to_one_of_the_given_sizes():
    made = batches(token_sizes=(16, 24, 30))
    for batch in made.in_order():
        assert batch.layout.num_rows in (16, 24, 30) and batch.inputs.shape == (batch.layout.num_rows,)
        assert documents_of(batch, True) == documents_of(batches().gather(batch.rows), True)


def test_at_most_four_sizes_hold_every_possible_batch():
    lengths = np.random.default_rng(0).integers(500, 2000, 5000)
    sizes = token_sizes([lengths], [32], 1)
    assert len(sizes) <= 4 and sizes[-1] == np.sort(lengths)[-32:].sum()


def test_two_documents_of_a_row_stay_together():
    made = batches(LENGTHS, documents=2, batch_size=2)
    (batch,) = made.train(0)
    assert batch.layout.num_sequences == 4 and len(batch.labels) == 2
    everything = documents_of(batches(LENGTHS, documents=2, batch_size=4).gather(np.arange(4)), True)
    expected = [everything[2 * row + j] for row in batch.rows for j in (0, 1)]
    assert documents_of(batch, True) == expected


def test_padding_is_id_zero_whatever_the_split_begins_with():
    batch = next(batches(packed=False).in_order())
    assert not batch.inputs[~batch.layout.mask].any() and batch.inputs[batch.layout.mask].all()


@pytest.mark.parametrize("packed", [True, False])
def test_full_rows_need_no_mask(packed):
    made = batches([12] * 6, length=12, packed=packed)
    batch = next(made.in_order())
    assert made.full and batch.inputs.numel() == 36
    assert batch.layout.full if packed else batch.layout.mask is None


def test_pixels_become_scaled_values_or_shifted_ids():
    stored = split([12] * 4)
    values = next(batches([12] * 4, length=12, scaling=(128.0, 64.0)).in_order()).inputs
    assert values.shape == (36, 1) and values[5].item() == pytest.approx((float(stored.tokens[5]) - 128) / 64)
    ids = next(batches([12] * 4, length=12, id_offset=1).in_order()).inputs
    assert ids[5].item() == stored.tokens[5] + 1


def test_micro_batches_are_the_batch_in_parts():
    made = batches(batch_size=8)
    parts = made.train(0, micro_batch=3)
    assert [len(part.labels) for part in parts] == [3, 3, 2]
    whole = documents_of(made.train(0)[0], True)
    assert [d for part in parts for d in documents_of(part, True)] == whole


def test_sixteen_thousand_positions_of_one_byte_each_are_gathered_without_copying_the_split():
    made = batches([16_384] * 8, length=16_384, padded_length=16_384)
    assert made.source.device_bytes < 8 * 16_384 + 1000
    assert next(made.in_order()).inputs.shape == (3 * 16_384,)


def test_black_pixels_as_padding_are_masked_where_they_stand():
    stored = split([12] * 4)
    stored.tokens[[0, 5, 11, 30]] = 0  # rows 0 and 2
    options = {"documents": 1, "length": 12, "padded_length": 12, "batch_size": 4, "packed": False}
    made = Batches(stored, device=torch.device("cpu"), zero_is_padding=True, id_offset=1, **options)
    batch = next(made.in_order())
    expected = torch.ones(4, 12, dtype=torch.bool)
    expected[0, [0, 5, 11]] = expected[2, 6] = False
    assert torch.equal(batch.layout.mask, expected)
    assert batch.num_tokens == 44 and not made.full
    assert torch.equal(batch.inputs.flatten(), torch.from_numpy(stored.tokens).long() + 1)
