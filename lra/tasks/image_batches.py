"""CIFAR-10's pickled batches, opened without running anything that they name.

A pickle is a program. The few functions and classes that a batch needs are replaced by stand-ins that only
keep what they are given, and any other name is refused.
"""

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from lra.errors import UserError

_ROW = 3072


def unpickled(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n 3072] uint8 (all red, all green, all blue) and labels [n] int64 of one batch."""
    try:
        _check_memo(content)
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {_text(key): value for key, value in batch.items()}
        pixels, labels = _array(fields["data"]), _array(fields["labels"])
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} cannot be read as a batch ({error}); get it anew") from error
    except KeyError as error:
        raise UserError(f"{where} has no {error}; a batch has data and labels. Get it anew") from error
    except (ValueError, TypeError, AttributeError, EOFError, IndexError, OverflowError) as error:
        # Which of them a damaged pickle raises depends on where it is damaged.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} cannot be read as a batch ({reason}); get it anew") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _ROW or not len(pixels):
        raise UserError(
            f"{where}: data is {pixels.dtype} {list(pixels.shape)}, not uint8 [rows, {_ROW}]; get it anew"
        )
    if labels.shape != pixels.shape[:1]:
        raise UserError(f"{where} has {len(pixels):,} images but {labels.size:,} labels; get it anew")
    return pixels, labels.astype(np.int64)


class _Array:
    """Stands for a numpy array: the state that it would be given."""

    shape: tuple = ()
    dtype: Any = None
    data: Any = b""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, column_major, self.data = state
        if column_major:
            raise pickle.UnpicklingError("an array stored by columns")


class _Dtype:
    """Stands for a numpy dtype: whole numbers only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code, self.order = _text(code), "="
        if not re.fullmatch("[iu][1248]", self.code):
            raise pickle.UnpicklingError(f"an array of {self.code[:20]!r}")

    def __setstate__(self, state: tuple) -> None:
        self.order = {"|": "=", "<": "<", ">": ">", "=": "="}[_text(state[1])]


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order != "C", data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """How bytes are written in pickles for Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no batch of CIFAR-10 needs and which is not run"
            )
        return _STAND_INS[module, name]


def _check_memo(content: bytes) -> None:
    """Refuses memo entries far beyond the pickle's own size, for which the unpickler would take memory."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise pickle.UnpicklingError(f"memo entry {argument:,}")


def _array(value: Any) -> np.ndarray:
    if isinstance(value, _Array):
        dtype = np.dtype(value.dtype.code).newbyteorder(value.dtype.order)
        return np.frombuffer(value.data, dtype).reshape(value.shape)
    if isinstance(value, list) and all(type(number) is int for number in value):
        return np.array(value, np.int64)
    raise pickle.UnpicklingError(f"{type(value).__name__} where an array of numbers is needed")


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value
