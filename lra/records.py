"""Run records: one strict JSON object per run, written atomically and read back into pandas.

A run folder holds `record.json` (only once the run has ended), `predictions.npy` and `labels.npy` (one byte
per test example, in test order), and `lock` while a process works in it. A retry moves the old attempt's
record and predictions to `attempts/<n>/`.
"""

import json
import math
import os
import typing
from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.errors import UserError
from lra.locks import Busy, lock, locked, writing  # noqa: F401  (callers use `records.lock`, `records.Busy`)

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
STATUSES = ("ok", "oom", "diverged", "failed", "interrupted", "unsupported")
KINDS = ("train", "measure")
CHOICES = {"kind": KINDS, "status": STATUSES}
INT64_MAX = 2**63 - 1
RECORD, PREDICTIONS, LABELS, ATTEMPTS = "record.json", "predictions.npy", "labels.npy", "attempts"
REQUIRED = ("kind", "run_id", "status", "task", "model")


@dataclass(kw_only=True)
class Record:
    """What one run found and under which conditions; None means not known. Accuracies are fractions.

    `unknown` takes the keys of a newer schema, so that a record which is read and written again loses
    nothing.
    """

    schema: int = SCHEMA
    kind: str
    run_id: str
    status: str
    reason: str | None = None
    task: str
    model: str
    paper: str | None = None
    recipe_version: Any = None
    deviations: Any = None
    length: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    d_model: int | None = None
    num_layers: int | None = None
    num_params: int | None = None
    state_size: float | None = None
    test_accuracy: float | None = None
    val_accuracy: float | None = None
    num_test: int | None = None
    majority_accuracy: float | None = None
    accuracy_by_length: Any = None
    best_step: int | None = None
    num_steps: int | None = None
    selection: str | None = None
    examples_per_s: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    padded_tokens_per_s: float | None = None
    peak_mem_mib: float | None = None
    reserved_mib: float | None = None
    flops_per_step: float | None = None
    wall_s: float | None = None
    train_s: float | None = None
    eval_s: float | None = None
    data_s: float | None = None
    compile_s: float | None = None
    device: str | None = None
    num_devices: int | None = None
    host: str | None = None
    precision: str | None = None
    step_mode: str | None = None
    layout: str | None = None
    torch: str | None = None
    versions: Any = None
    git_revision: str | None = None
    command: Any = None
    config_hash: str | None = None
    data_hash: str | None = None
    data_origin: str | None = None
    data_variant: str | None = None
    sweep: Any = None
    extra: Any = None
    unknown: InitVar[dict | None] = None

    def __post_init__(self, unknown: dict | None) -> None:
        self.unknown = dict(unknown or {})

    def to_dict(self) -> dict:
        """Every field in schema order, then unknown keys, as values that strict JSON can hold."""
        return strict({name: getattr(self, name) for name in FIELDS} | self.unknown)

    @classmethod
    def from_dict(cls, values: Any) -> "Record":
        """A record from parsed JSON; ValueError says which key is missing or holds what no run can find."""
        if not isinstance(values, dict):
            raise ValueError(f"a record is a JSON object, not a {type(values).__name__}")
        missing = [key for key in REQUIRED if not isinstance(values.get(key), str)]
        if missing:
            raise ValueError(f"no text under {', '.join(missing)}")
        known = {name: values[name] for name in FIELDS if values.get(name) is not None}
        for name, value in known.items():
            if not _fits(value, FIELDS[name]):
                raise ValueError(f"{name} should be {FIELDS[name].__name__}, not {value!r:.60}")
            if (wanted := _misfit(name, value)) is not None:
                raise ValueError(f"{name} should be {wanted}, not {value!r:.60}")
            if FIELDS[name] is int:
                known[name] = int(value)
        return cls(**known, unknown={key: value for key, value in values.items() if key not in FIELDS})


def _base_type(annotation: Any) -> Any:
    args = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    return args[0] if args else annotation


FIELDS: dict[str, Any] = {f.name: _base_type(f.type) for f in fields(Record)}  # name -> int, str, Any


def _fits(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    if expected is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and (expected is float or value == int(value))
    except OverflowError:  # a whole number beyond every float
        return False


def _misfit(name: str, value: Any) -> str | None:
    """What a value of the right type should have been; None if it is one that tables can work with."""
    if name in CHOICES:
        return None if value in CHOICES[name] else f"one of {', '.join(CHOICES[name])}"
    if name == "deviations":
        return None if isinstance(value, list) else "a list"
    if name.endswith("_accuracy"):
        return None if 0 <= value <= 1 else "a fraction from 0 to 1"
    if name == "seed":  # the one number that is no amount
        return None if -INT64_MAX <= value <= INT64_MAX else "a whole number of at most 64 bits"
    if FIELDS[name] is int:
        return None if 0 <= value <= INT64_MAX else f"from 0 to {INT64_MAX}"
    return None if FIELDS[name] is not float or value >= 0 else "0 or more"


def _parse(text: str) -> Any:
    """JSON, with the NaN and Infinity of lax writers read as not known."""
    return json.loads(text, parse_constant=lambda _: None)


def strict(value: Any) -> Any:
    """`value` as strict JSON holds it: NaN and infinities become None, arrays lists, anything else text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((strict(item) for item in value), key=str)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return strict(value.tolist())
    return str(value)


def runs_root() -> Path:
    """Where runs are kept: $LRA_RUNS, else ./runs."""
    return Path(os.environ.get("LRA_RUNS") or "runs")


def write(record: Record, folder: str | Path) -> Path:
    """Writes `record.json` whole or not at all; what an earlier attempt left moves to `attempts/` first."""
    assert record.kind in KINDS and record.status in STATUSES, (record.kind, record.status)
    folder = Path(folder)
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    archive(folder)
    with writing(folder):
        _replace(folder / RECORD, text.encode())
    return folder / RECORD


def archive(folder: str | Path) -> Path | None:
    """Moves an ended attempt's record and predictions to `attempts/<n>/`; None if none has ended here."""
    folder = Path(folder)
    with writing(folder):
        if not (folder / RECORD).exists():
            return None
        attempts = folder / ATTEMPTS
        taken = [int(p.name) for p in attempts.iterdir() if p.name.isdigit()] if attempts.is_dir() else []
        target = attempts / str(max(taken, default=0) + 1)
        target.mkdir(parents=True)
        # The record goes last: a process killed in between leaves an attempt that still counts as ended.
        for name in (PREDICTIONS, LABELS, RECORD):
            if (folder / name).exists():
                os.replace(folder / name, target / name)
    return target


def read(folder: str | Path) -> Record:
    """The record of a run folder (or of a record file); UserError if there is none or it is broken."""
    path = Path(folder)
    path = path / RECORD if path.is_dir() else path
    try:
        return Record.from_dict(_parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"no record at '{path}'; a run writes it when it ends: start or resume the run"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"broken record '{path}': {error}; delete the file and run that cell again"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    """Makes `path` hold `data` in one step that survives a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Predictions: what makes a paired comparison possible.


def save_predictions(folder: str | Path, predictions: Any, labels: Any = None) -> None:
    """Keeps the predicted class of each test example, in test order, one byte each; `labels` likewise.

    Tables need both to tell which rows are tied. A record that lies here belongs to an earlier attempt and
    moves to `attempts/` together with that attempt's predictions.
    """
    arrays = {PREDICTIONS: predictions} | ({} if labels is None else {LABELS: labels})
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        whole = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
        assert whole and (array.size == 0 or (array.min() >= 0 and array.max() <= 255)), (name, array.dtype)
        assert array.size == arrays[PREDICTIONS].size, "one label per prediction"
    archive(folder)
    with writing(folder):
        for name in (PREDICTIONS, LABELS):
            (Path(folder) / name).unlink(missing_ok=True)
        for name, array in arrays.items():
            _replace(Path(folder) / name, _npy_bytes(array.astype(np.uint8)))


def _npy_bytes(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_predictions(folder: str | Path) -> np.ndarray:
    """Predicted class per test example, uint8 [num_test]; UserError if the run kept none."""
    return _load_bytes(Path(folder) / PREDICTIONS)


def load_correct(folder: str | Path) -> np.ndarray | None:
    """Which test examples a run got right, bool [num_test]; None unless it kept predictions and labels."""
    folder = Path(folder)
    if not (folder / PREDICTIONS).is_file() or not (folder / LABELS).is_file():
        return None
    predictions, labels = load_predictions(folder), _load_bytes(folder / LABELS)
    if predictions.shape != labels.shape:
        raise UserError(
            f"'{folder}' holds {predictions.size} predictions but {labels.size} labels; run it again"
        )
    return predictions == labels


def _load_bytes(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f"no '{path.name}' in '{path.parent}'; only a finished training run keeps one"
        ) from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"broken file '{path}': {error}; run that cell again") from error
    if array.dtype != np.uint8 or array.ndim != 1:
        raise UserError(
            f"'{path}' should hold one byte per test example, not {array.dtype}{list(array.shape)}"
        )
    return array


# Many records at once, and none yet.


def run_state(folder: str | Path) -> str:
    """`done` once an ended run's record is there; else `running` if locked, `interrupted` or `absent`."""
    folder = Path(folder)
    if not folder.is_dir():
        return "absent"
    if (folder / RECORD).exists() and read(folder).status != "interrupted":
        return "done"
    return "running" if locked(folder) else "interrupted"


def load(paths: str | Path | Iterable[str | Path] | None = None) -> "pd.DataFrame":
    """One row per record below `paths` (default: all runs), with every field and a `path` column.

    A path is a run folder, a parent of run folders (searched to any depth, `attempts/` left out), a record
    file or a `.jsonl` file with one record per line. `path` is the run folder, or `file.jsonl:line`. The
    same record met twice counts once. Fields without a simple type stay objects, what is not known is NA.
    UserError if a path is missing, holds no records, or holds a broken one. For example the accuracy of each
    mechanism: `load("results/x.jsonl").groupby(["task", "model"]).test_accuracy.agg(["mean", "std"])`.
    """
    if paths is None:
        paths = [runs_root()]
    paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    found: dict[str, tuple[Record, str]] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"no runs at '{path}': no such file or folder; {_NEXT}")
        for record, where in _find(path):
            found.setdefault(json.dumps(record.to_dict(), sort_keys=True), (record, where))
    if not found:
        raise UserError(f"no records under {', '.join(repr(str(p)) for p in paths)}; {_NEXT}")
    return _frame(list(found.values()))


_NEXT = (
    "name a run folder, a folder of runs, a record.json or a .jsonl file, or make a run first, "
    "for example: lra train task=listops model=linear"
)


def _find(path: Path) -> Iterator[tuple[Record, str]]:
    if path.is_file():
        yield from _read_lines(path) if path.suffix == ".jsonl" else [(read(path), str(path.parent))]
        return
    for parent, folders, files in os.walk(path):
        if RECORD in files:
            yield read(parent), parent
        elif "config.yaml" not in files:  # the metrics.jsonl of a run that has not ended is not a record
            for name in sorted(files):
                if name.endswith(".jsonl") and _holds_records(Path(parent, name)):
                    yield from _read_lines(Path(parent, name))
        folders[:] = sorted(f for f in folders if f not in (ATTEMPTS, "checkpoint") and not f.startswith("."))


def _holds_records(path: Path) -> bool:
    """Whether the first line is a record, so that other logs in a tree of runs are passed over."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline()
    return '"run_id"' in first and '"status"' in first


def _read_lines(path: Path) -> Iterator[tuple[Record, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read '{path}': {error}; mend it or name another file") from error
    if lines and not _holds_records(path):
        raise UserError(f"no records in '{path}': its first line has no run_id and status; {_NEXT}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Record.from_dict(_parse(line)), f"{path}:{number}"
        except ValueError as error:
            raise UserError(
                f"broken record in '{path}', line {number}: {error}; mend or delete that line"
            ) from error


def _frame(found: list[tuple[Record, str]]) -> "pd.DataFrame":
    import pandas as pd

    rows = [record.to_dict() for record, _ in found]
    columns = [*FIELDS, *sorted({key for row in rows for key in row} - set(FIELDS) - {"path"})]
    dtypes = {int: "Int64", float: "float64"}
    data = {
        c: pd.Series([row.get(c) for row in rows], dtype=dtypes.get(FIELDS.get(c), object)) for c in columns
    }
    return pd.DataFrame(data | {"path": pd.Series([where for _, where in found], dtype=object)})
