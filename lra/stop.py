"""Stopping a run between two steps, so that its checkpoint is whole."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from lra.errors import one_line

log = logging.getLogger(__name__)


class Stop(BaseException):
    """A run ended early by a signal; like KeyboardInterrupt, no handler of ordinary errors may catch it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number


@dataclass
class StopRequest:
    signal: int | None = None


@contextlib.contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only set `signal`; a second one of either ends the process as usual.

    A signal that the process ignores stays ignored. An error that comes after a signal is raised as Stop: the
    signal may have caused it, as Ctrl-C reaches the child processes that compile too.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    except Exception as error:
        if request.signal is None:
            raise
        log.warning("after the signal to stop: %s", one_line(f"{type(error).__name__}: {error}"))
        raise Stop(request.signal) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminate_as_stop() -> Iterator[None]:
    """SIGTERM raises Stop wherever the process is; in a training loop it still stops between two steps."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
