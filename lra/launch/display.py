"""What a person sees while runs go on: a table that fills in, in a terminal; plain lines elsewhere."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from lra.launch.board import Board, clock, draw

if TYPE_CHECKING:
    from lra.launch.local import Job
    from lra.records import Record

LINE_EVERY_S = 10.0  # without a terminal, how often a running run says where it is
REDRAWS_PER_S = 2.0


class Display:
    """Hears of events (start, progress, end) of the runs in `jobs` and shows them; a context manager."""

    def __init__(self, jobs: Sequence["Job"], *, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.board = Board(jobs)
        self.last_line: dict[str, float] = {}
        self.lock = threading.Lock()  # the table is drawn by a thread of its own
        self.live = (
            Live(self, console=self.console, refresh_per_second=REDRAWS_PER_S, transient=True)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.lock:
            yield from draw(self.board, width=options.max_width, height=console.height)

    def __call__(self, event: dict[str, Any]) -> None:
        with self.lock:
            self.board.hear(event)
        getattr(self, f"_{event['kind']}")(event)

    def _start(self, event: dict[str, Any]) -> None:
        if self.live is None:
            where = f" on GPU {event['device']}" if event.get("device") else ""
            self._line(f"[{self.board.num_begun}/{self.board.num_runs}] {event['run_id']} started{where}")
        self.last_line[event["run_id"]] = time.monotonic()

    def _progress(self, event: dict[str, Any]) -> None:
        run_id = event["run_id"]
        if self.live is not None or time.monotonic() - self.last_line[run_id] <= LINE_EVERY_S:
            return
        self.last_line[run_id] = time.monotonic()
        going = self.board.running[run_id]
        self._line(
            f"    {run_id} step {event['step']}/{event['num_steps']} {going.news}, "
            f"{clock(going.left_s())} left"
        )

    def _end(self, event: dict[str, Any]) -> None:
        record, board = event["record"], self.board
        left = f"; {clock(board.left_s())} left" if 0 < board.num_ended < board.num_runs else ""
        self._line(f"[{board.num_ended}/{board.num_runs}] {record.run_id} {summary(record)}{left}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def summary(record: "Record") -> str:
    """A record in a few words."""
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    parts = [f"test {record.test_accuracy:.1%}"]
    if record.step_ms:
        parts.append(f"{record.step_ms:.1f} ms a step")
    if record.peak_mem_mib:
        parts.append(f"{record.peak_mem_mib:.0f} MiB")
    parts.append(f"{record.wall_s:.0f} s")
    return ", ".join(parts)
