"""Reading a whole data set back and comparing it with its manifest, with its task, and with itself."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from lra.data.store import (
    PARTS,
    Split,
    check_split,
    data_hash,
    disk_dtype,
    duplicates,
    file_name,
    manifest_hash,
    open_store,
    prepare_command,
    read_manifest,
    smallest_dtype,
    store_path,
    summary,
    vocabulary_hash,
)
from lra.errors import UserError
from lra.tasks.base import SPLITS, Finding, Task, row_digests


def verify(task: Task, length: int) -> list[Finding]:
    """All checks of one variant, each with its own finding; UserError only if the variant is not there at
    all.

    Files are hashed, and every count of the manifest is made anew from them. What a damaged file leaves
    readable is still looked at, so that a fault is named together with what it breaks.
    """
    path, remedy = store_path(task, length), prepare_command(task, length)
    if not path.is_dir():
        open_store(task, length)
    try:
        manifest = read_manifest(path, remedy)
    except UserError as error:
        return [Finding("manifest", False, str(error))]
    findings = _check_manifest(manifest, task, length)
    files = {}
    for name in (file_name(split, part) for split in SPLITS for part in PARTS):
        finding, sha256 = _check_file(path / name, manifest["files"].get(name))
        findings.append(finding)
        files[name] = {"sha256": sha256}
    findings.append(_equal("data hash", manifest["data_hash"], data_hash(files, manifest["vocabulary"])))
    digests = {}
    for name in SPLITS:
        try:
            split = _read_split(path, name, task, manifest["dtype"])
        except (OSError, ValueError) as error:
            findings.append(Finding(f"{name} rows", False, f"cannot be read: {error}"))
            continue
        found, digests[name] = _check_split(split, manifest, task)
        findings += found
        if name == "train" and task.vocabulary() is None:
            findings += task.check_vocabulary(manifest["vocabulary"], split)
        findings += task.check_rows(split, length)
    findings.append(_check_duplicates(digests, manifest["duplicates"], task))
    return findings


def _equal(what: str, recorded: Any, found: Any) -> Finding:
    return Finding(
        what, recorded == found, str(found) if recorded == found else f"manifest: {recorded}, found: {found}"
    )


def _check_manifest(manifest: dict[str, Any], task: Task, length: int) -> list[Finding]:
    intact = manifest_hash(manifest) == manifest["manifest_sha256"]
    held, expected = manifest["vocabulary"], task.vocabulary()
    fixed = expected is not None
    wrong = [
        f"{index}: {found!r}, not {wanted!r}"
        for index, (found, wanted) in enumerate(zip(held, expected or (), strict=False))
        if found != wanted
    ]
    if fixed and len(held) != len(expected):
        wrong.append(f"{len(held)} symbols, not {len(expected)}")
    if manifest["vocabulary_sha256"] != vocabulary_hash(held):
        wrong.append("its SHA-256 in the manifest is of another vocabulary")
    shape = ("input", "documents", "num_classes", "dtype", "vocab_size")
    dtype, vocab_size = (task.dtype, task.vocab_size) if fixed else (smallest_dtype(len(held)), len(held))
    expected_shape = (task.stored, task.documents, task.num_classes, dtype, vocab_size)
    return [
        Finding(
            "manifest",
            intact,
            "as it was written" if intact else "changed since it was written (SHA-256 differs)",
        ),
        _equal("variant", manifest["variant"], task.variant(length)),
        _equal("variant name", manifest["variant_name"], task.variant_name(length)),
        _equal("kind of numbers", [manifest[key] for key in shape], list(expected_shape)),
        Finding("vocabulary", not wrong, "; ".join(wrong) or f"{len(held)} entries"),
    ]


def _check_file(path: Path, entry: dict[str, Any] | None) -> tuple[Finding, str | None]:
    """The finding, and the file's SHA-256 where there is a file."""
    what = f"file {path.name}"
    if not path.is_file():
        return Finding(what, False, "missing"), None
    with open(path, "rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    size = path.stat().st_size
    if entry is None:
        return Finding(what, False, "not listed in the manifest"), sha256
    if size != entry["size"]:
        return Finding(what, False, f"{size:,} bytes, not {entry['size']:,}"), sha256
    same = sha256 == entry["sha256"]
    return Finding(what, same, f"{size:,} bytes" if same else "its bytes changed (SHA-256 differs)"), sha256


def _read_split(path: Path, name: str, task: Task, dtype: str) -> Split:
    """The split if its files fit together; ValueError or OSError says why they do not."""
    if dtype not in ("uint8", "int16"):
        raise ValueError(f"dtype {dtype} is none of uint8 and int16")
    tokens, offsets, labels = (
        np.memmap(path / file_name(name, part), disk_dtype(part, dtype), mode="r") for part in PARTS
    )
    split = Split(name, tokens, offsets, labels.astype(np.int64), task.documents)
    check_split(split)
    return split


def _check_split(split: Split, manifest: dict[str, Any], task: Task) -> tuple[list[Finding], list[bytes]]:
    """Findings, and the digests of the rows. The tokens are read once, a part after the other."""
    found = summary(split.lengths, split.labels, task.num_classes)
    recorded = manifest["splits"].get(split.name, {})
    pixels = task.stored == "pixels"
    low, high = (0, 255) if pixels else (1, manifest["vocab_size"] - 1)
    smallest, largest, digests = high, low, []
    for _, part in split.chunks():
        smallest, largest = min(smallest, int(part.tokens.min())), max(largest, int(part.tokens.max()))
        digests += row_digests(part.tokens, part.offsets, part.documents)
    top = int(split.labels.max())
    return [
        _equal(f"{split.name} rows", recorded.get("rows"), found["rows"]),
        _equal(f"{split.name} tokens", recorded.get("tokens"), found["tokens"]),
        _equal(f"{split.name} label counts", recorded.get("label_counts"), found["label_counts"]),
        _equal(f"{split.name} lengths", recorded.get("length"), found["length"]),
        Finding(f"{split.name} labels", top < task.num_classes, f"0 to {top} of {task.num_classes} classes"),
        Finding(
            f"{split.name} {'pixels' if pixels else 'ids'}",
            low <= smallest and largest <= high,
            f"{smallest} to {largest}, allowed {low} to {high}",
        ),
    ], digests


def _check_duplicates(digests: dict[str, list[bytes]], recorded: dict[str, Any], task: Task) -> Finding:
    unread = [name for name in SPLITS if name not in digests]
    if unread:
        return Finding("disjoint splits", False, f"not checked: {', '.join(unread)} cannot be read")
    found = duplicates(digests)
    shared = {pair: count for pair, count in found["between"].items() if count}
    detail = ", ".join(f"{pair.replace(' ', ' and ')} share {count:,}" for pair, count in shared.items())
    if found != recorded:
        return Finding("disjoint splits", False, f"manifest: {recorded}, found: {found}")
    repeated = sum(found["within"].values())
    detail = f"{detail or 'no row in two splits'}; {repeated:,} rows repeat one of their own split"
    if not task.disjoint:
        return Finding("disjoint splits", True, f"{detail} (the source's own repetitions)")
    return Finding("disjoint splits", not shared, detail)
