"""Who works in a run folder: one process at a time, known through a lock on the file `lock` in it."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from lra.errors import UserError

LOCK = "lock"


class Busy(UserError):
    """Another process works in the run folder; its own run there is not touched."""


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turns a disk that is full, read-only or gone into a UserError that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write in run folder '{folder}': {error.strerror or error}; free or mend that disk, or "
            "set LRA_RUNS to a folder on another one, and run the same command again"
        ) from error


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Holds a run folder for this process, creating it if need be; Busy if another process has it.

    The kernel releases the lock when the process dies, however it dies.
    """
    with writing(folder):
        file = _acquire(Path(folder))
    with file:
        try:
            yield
        finally:
            file.truncate(0)  # the file stays: deleting it would let two processes lock two files of one name


def _acquire(folder: Path) -> FileIO:
    """The locked file, which names this process."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+b", buffering=0)  # without a buffer, a full disk shows at once
    try:
        for attempt in range(5):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 4:
                    file.seek(0)
                    holder = file.read().decode(errors="replace").strip() or "another process"
                    raise Busy(
                        f"run folder '{folder}' is in use by {holder}; wait for it to end, or stop it"
                    ) from None
                time.sleep(0.05)  # `locked` in another process holds a lock for an instant
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        file.close()
        raise
    return file


def locked(folder: str | Path) -> bool:
    """Whether another process, or another place in this one, works in a run folder."""
    try:
        with open(Path(folder) / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
