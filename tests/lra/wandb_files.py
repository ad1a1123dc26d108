"""Reads the file of an offline run of wandb: a log in LevelDB's format, after a header of seven bytes."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, kind
WHOLE, LAST = 1, 4
WAIT_S = 30.0


def entries(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    assert data[:4] in (b":W&B", b""), f"{path} is no file of wandb"
    at, entry = 7, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        if at + HEADER.size + length > len(data):
            return  # still being written
        entry += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (WHOLE, LAST):
            yield entry
            entry = b""


def read(folder: Path) -> dict[str, Any]:
    """The one run below `folder`: `run` (id, project, group, ...), config, history rows, summary, exit.

    It must have been finished; wandb's own process writes a little later, so this waits for the end.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + WAIT_S
    while (found := _parsed(path))["exit"] is None:
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.02)
    return found


def _parsed(path: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2 as protocol

    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "exit": None, "path": path}
    for entry in entries(path):
        record = protocol.Record()
        record.ParseFromString(entry)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= _values(record.run.config.update)
        elif kind == "history":
            found["history"].append(_values(record.history.item))
        elif kind == "summary":
            found["summary"] |= _values(record.summary.update)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _values(items: Any) -> dict[str, Any]:
    """Plain values by key; of nested ones the parts by their path."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
