"""What a person sees while runs go on: bars in a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # without a terminal, how often a running run says where it is


class Display:
    """Hears of events (start, progress, end) and shows them; a context manager."""

    def __init__(self, num_runs: int, *, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.num_runs, self.num_done = num_runs, 0
        self.started = time.monotonic()
        self.last_line: dict[str, float] = {}
        self.bars: dict[str, TaskID] = {}
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            if num_runs > 1:
                self.total = self.progress.add_task("runs", total=num_runs, news="")

    def __enter__(self) -> "Display":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        getattr(self, f"_{event['kind']}")(event)

    def _start(self, event: dict[str, Any]) -> None:
        run_id = event["run_id"]
        if self.progress:
            self.bars[run_id] = self.progress.add_task(run_id, total=None, news="")
        else:
            where = f" on GPU {event['device']}" if event.get("device") else ""
            self._line(f"[{self.num_done + 1}/{self.num_runs}] {run_id} started{where}")
        self.last_line[run_id] = time.monotonic()

    def _progress(self, event: dict[str, Any]) -> None:
        run_id = event["run_id"]
        news = f"loss {event['loss']:.3f}" if "loss" in event else f"val {event['val_accuracy']:.1%}"
        if self.progress:
            self.progress.update(
                self.bars[run_id], completed=event["step"], total=event["num_steps"], news=news
            )
        elif time.monotonic() - self.last_line[run_id] > LINE_EVERY_S:
            self.last_line[run_id] = time.monotonic()
            self._line(f"    {run_id} step {event['step']}/{event['num_steps']} {news}")

    def _end(self, event: dict[str, Any]) -> None:
        record = event["record"]
        self.num_done += 1
        if self.progress:
            if record.run_id in self.bars:
                self.progress.remove_task(self.bars.pop(record.run_id))
            if self.num_runs > 1:
                self.progress.update(self.total, completed=self.num_done)
        self._line(f"[{self.num_done}/{self.num_runs}] {record.run_id} {summary(record)}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def summary(record: Any) -> str:
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
