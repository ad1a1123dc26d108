"""Batches of CIFAR-10: hostile ones run nothing, damaged and missing ones are named."""

import pickle

import numpy as np
import pytest
from image_samples import binary_batches, python_batches, read, write_files

from lra.errors import UserError


class Runs:
    """A pickle of this calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_batch_that_names_other_functions_is_refused_without_running_them(protocol, tmp_path):
    target = tmp_path / "made"
    hostile = pickle.dumps({b"data": Runs(open, str(target), "w"), b"labels": []}, protocol)
    source = write_files(tmp_path / "s", python_batches(data_batch_3=hostile))
    with pytest.raises(UserError, match=r"data_batch_3 cannot be read as a batch \(it asks for _?io.open"):
        read(source)
    assert not target.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "numpy load", "numpy.core.multiarray scalar"])
def test_names_beyond_those_of_a_batch_are_refused(name, tmp_path):
    module, function = name.split()
    hostile = f"c{module}\n{function}\n(S'1'\ntR.".encode()
    with pytest.raises(UserError, match=f"asks for {module}.{function}, which"):
        read(write_files(tmp_path, python_batches(data_batch_1=hostile)))


def batch(data=None, labels=(1, 2, 3, 4)):
    data = np.zeros((4, 3072), np.uint8) if data is None else data
    return pickle.dumps(
        {b"data": data, b"labels": labels if isinstance(labels, np.ndarray) else list(labels)}, 3
    )


FAULTY_BATCHES = {
    "cut": (batch()[:5000], "cannot be read as a batch"),
    "empty": (b"", "cannot be read as a batch"),
    "no dict": (pickle.dumps([1], 2), "cannot be read as a batch"),
    "no data": (pickle.dumps({b"labels": [1]}, 2), "has no 'data'"),
    "objects": (batch(np.array([None] * 3072)), "an array of 'O8'"),
    "numbers as floats": (batch(np.zeros((4, 3072), np.float32)), "an array of 'f4'"),
    "wide": (batch(np.zeros((4, 3073), np.uint8)), r"data is uint8 \[4, 3073\], not uint8 \[rows, 3072\]"),
    "no rows": (batch(np.zeros((0, 3072), np.uint8), ()), r"data is uint8 \[0, 3072\]"),
    "int16": (batch(np.zeros((4, 3072), np.int16)), "data is int16"),
    "columns": (batch(np.zeros((3072, 4), np.uint8).T), "an array stored by columns"),
    "few labels": (batch(labels=(1, 2, 3)), "has 4 images but 3 labels"),
    "odd label": (batch(labels=(1, 2, 10, 4)), "row 3: label 10 is not allowed; labels are 0 to 9"),
    "negative label": (batch(labels=(-1, 2, 1, 4)), "row 1: label -1 is not allowed"),
    "text label": (batch(labels=(1, 2, "cat", 4)), "list where an array of numbers is needed"),
    "fewer rows": (batch(np.zeros((3, 3072), np.uint8), (1, 2, 3)), "equally many rows .*'data_batch_2': 3"),
    "memo bomb": (b"\x80\x02}r\xff\xff\xff\x7f.", "memo entry 2,147,483,647"),
}


@pytest.mark.parametrize("fault", FAULTY_BATCHES)
def test_a_faulty_python_batch_is_named(fault, tmp_path):
    content, message = FAULTY_BATCHES[fault]
    with pytest.raises(UserError, match=message) as caught:
        read(write_files(tmp_path, python_batches(data_batch_2=content)))
    assert "data_batch_2" in str(caught.value)


def test_labels_may_be_an_array_of_any_whole_numbers(tmp_path):
    for dtype in ("<i8", ">i4", "u1"):
        content = batch(labels=np.array([5, 6, 7, 9], dtype))
        labels = read(write_files(tmp_path / dtype[1:], python_batches(data_batch_1=content)))["train"][1]
        assert labels[:4].tolist() == [5, 6, 7, 9]


def test_damaged_batches_give_a_message_or_are_read(tmp_path):
    rng = np.random.default_rng(5)
    whole = batch(np.zeros((4, 3072), np.uint8))
    ends = [*range(200), *range(len(whole) - 100, len(whole))]  # the program, not the pixels
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.choice(ends, 3):
            content[place] = rng.integers(256)
        try:
            read(write_files(tmp_path, python_batches(data_batch_1=bytes(content))))
        except UserError as error:
            assert "data_batch_1" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(3073 * 4 - 1), "12,291 bytes, not a multiple of 3,073"),
        (b"", "0 bytes, not a multiple"),
        (bytes(3073 * 3), "batches must have equally many rows"),
        (b"\x0a" + bytes(3073 * 4 - 1), "row 1: label 10 is not allowed"),
    ],
)
def test_a_faulty_binary_batch_is_named(content, message, tmp_path):
    files = binary_batches() | {"cifar-10-batches-bin/data_batch_4.bin": content}
    with pytest.raises(UserError, match=message) as caught:
        read(write_files(tmp_path, files))
    assert "data_batch_4" in str(caught.value)


@pytest.mark.parametrize("make", [python_batches, binary_batches])
@pytest.mark.parametrize("gone", ["data_batch_5", "test_batch"])
def test_a_missing_batch_is_named(make, gone, tmp_path):
    files = {name: content for name, content in make().items() if gone not in name}
    with pytest.raises(UserError, match=f"lacks {gone}. Wanted"):
        read(write_files(tmp_path, files))
