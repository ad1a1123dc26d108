"""Stopping a run between two steps, so that its checkpoint is whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


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

    A signal that the process ignores stays ignored.
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
