"""Who works in a run folder: one process at a time, known through a lock on the file `lock` in it."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lra.errors import UserError

LOCK = "lock"


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Holds a run folder for this process, creating it if need be; UserError if another process has it.

    The kernel releases the lock when the process dies, however it dies.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        for attempt in range(5):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 4:
                    file.seek(0)
                    raise UserError(
                        f"run folder '{folder}' is in use by {file.read().strip() or 'another process'}; "
                        "wait for it to end, or stop it"
                    ) from None
                time.sleep(0.05)  # `locked` in another process holds a lock for an instant
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # the file stays: deleting it would let two processes lock two files of one name


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
