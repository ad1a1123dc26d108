"""Building a variant: at most once, all or nothing.

A build writes into a hidden folder beside the final one, which appears by a rename when every byte is on the
disk. A lock file keeps two processes from building the same variant; the second waits and then finds it done.
The next build goes on from the last checkpoint of a killed one; without a checkpoint it removes what is left.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lra.data.store import Store, data_root, open_store, prepare_command, store_path, sync_folder
from lra.data.writer import PROGRESS, StoreWriter
from lra.errors import UserError
from lra.tasks.base import Progress, Task

log = logging.getLogger(__name__)


def prepare(
    task: Task,
    length: int,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Store:
    """The variant, built if it is not there yet (`force`: built again).

    UserError for a source that cannot be read, a full disk, a damaged variant that is already there, or one
    that was made from another source than `task.source` names.
    """
    task.check()
    task.check_length(length)
    path = store_path(task, length)
    if path.is_dir() and not force:
        return _existing(task, length)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if path.is_dir() and not force:
                return _existing(task, length)
            _build(task, length, path, workers, progress)
    except OSError as error:
        raise _user_error(error, task, length) from error
    return open_store(task, length)


def _existing(task: Task, length: int) -> Store:
    store = open_store(task, length)
    wanted, held = task.source_name(), store.manifest["source"]
    if wanted is not None and wanted != held:
        raise UserError(
            f"{store.path} was made from {held}, not from {wanted}; "
            f"to replace it: {prepare_command(task, length)} --force"
        )
    return store


def _build(task: Task, length: int, path: Path, workers: int | None, progress: Progress | None) -> None:
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    if replaced.exists() and not path.exists():
        replaced.rename(path)  # killed between the two renames below: the old data are still the data
    shutil.rmtree(replaced, ignore_errors=True)
    if not (partial / PROGRESS).is_file():
        shutil.rmtree(partial, ignore_errors=True)
    _require_space(task, length, partial)
    writer = StoreWriter(partial, task, length)
    try:
        task.build(writer, length=length, workers=workers, progress=progress)
        writer.finish(
            task=task.name,
            variant_name=task.variant_name(length),
            variant=task.variant(length),
            description=task.description,
        )
    except BaseException as error:
        writer.close()
        if writer.resumable and not isinstance(error, Exception):  # Ctrl-C, not a fault
            log.warning("the same command goes on from the last checkpoint in %s", partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, Exception):
                log.warning("nothing of %s was kept", path.name)
        raise
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the variant's lock file. The system frees it when the process ends, however it ends."""
    with open(path.with_name(f".{path.name}.lock"), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is preparing %s; waiting for it", path.name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _require_space(task: Task, length: int, partial: Path) -> None:
    """Raises UserError if what is still to be written has no room; `partial` is what a killed build left."""
    held = sum(file.stat().st_size for file in partial.glob("*")) if partial.is_dir() else 0
    needed = max(0.0, task.plan(length).mib - held / 2**20)
    free = shutil.disk_usage(data_root()).free / 2**20
    if free < needed:
        raise UserError(
            f"{task.variant_name(length)} needs about {needed:,.0f} MiB, {data_root()} has {free:,.0f} MiB "
            "free; free some space or set LRA_DATA to a larger disk"
        )


def _user_error(error: OSError, task: Task, length: int) -> OSError | UserError:
    """The message for a full or read-only disk; any other error as it is."""
    remedy = f"free some space or set LRA_DATA to a larger disk, then run: {prepare_command(task, length)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {data_root()} is full; nothing of this data set was kept. Next: {remedy}"
        )
    refused = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
    if refused and not (data_root().is_dir() and os.access(data_root(), os.W_OK)):
        return UserError(
            f"cannot write to {data_root()} ({error.strerror}); set LRA_DATA to a folder of yours"
        )
    return error
