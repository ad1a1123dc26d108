"""What a person sees while cells are measured: a table that fills in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lra import registry
from lra.measure import Event, Watcher
from lra.measuring import Cell
from lra.records import Record
from lra.report.cells import number

FRAME = 6  # lines of the live table that are not cells
OTHERS = {"time limit": "left", "another process measures it": "elsewhere"}


class Display(Watcher):
    """Rows are mechanisms, columns lengths and modes, cells ms and MiB; a context manager.

    `left` counts the cells that the time limit left, `elsewhere` those that another process measures.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.cells: list[Cell] = []
        self.texts: dict[tuple[str, str], str] = {}
        self.running: Cell | None = None
        self.num_done = self.left = self.elsewhere = 0
        self.begun, self.spent = 0.0, []  # of the cells measured now, not of those only read
        self.live: Live | None = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def plan(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2)
            self.live.start()

    def __call__(self, event: Event) -> None:
        cell, where = event.cell, (row_of(event.cell), column_of(event.cell))
        if event.kind == "begin":
            self.running, self.begun = cell, time.monotonic()
            self.texts[where] = "..."
            return
        self.num_done += 1
        if event.record is not None:
            self.texts[where] = short(event.record)
            if self.running is cell:
                self.spent.append(time.monotonic() - self.begun)
            self._line(f"{row_of(cell)} {column_of(cell)}: {summary(event.record)}")
        else:
            self.texts[where] = OTHERS[event.reason]
            self.left += event.reason == "time limit"
            self.elsewhere += event.reason != "time limit"
        self.running = None

    def table(self) -> Group:
        """The table as it stands, of the rows around the running one as many as the terminal holds."""
        columns = list(dict.fromkeys(column_of(cell) for cell in self.cells))
        rows = list(dict.fromkeys(row_of(cell) for cell in self.cells))
        current = row_of(self.running) if self.running else rows[-1] if rows else ""
        room = max(1, self.console.height - FRAME)
        first = max(0, min(rows.index(current) - room // 2, len(rows) - room)) if rows else 0
        grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        grid.add_column("ms / MiB")
        for column in columns:
            grid.add_column(column, justify="right", no_wrap=True)
        for row in rows[first : first + room]:
            texts = [self.texts.get((row, column), "") for column in columns]
            grid.add_row(Text(row), *(Text(t, style="reverse" if t == "..." else "") for t in texts))
        return Group(grid, Text(self.progress()))

    def progress(self) -> str:
        """`12 of 48 cells, about 3 min left`."""
        text = f"{self.num_done} of {len(self.cells)} cells"
        if not self.spent:
            return text
        left = (len(self.cells) - self.num_done) * sum(self.spent) / len(self.spent)
        return f"{text}, about {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'} left"

    def _line(self, text: str) -> None:
        if not self.live:
            head = f"[{self.num_done}/{len(self.cells)}]"
            self.console.print(f"{head} {text}", highlight=False, soft_wrap=True, markup=False)


def row_of(cell: Cell) -> str:
    """A mechanism with what is not at its default, in a table of many."""
    own = ", ".join(f"{k}={v}" for k, v in registry.changed(cell.config.model).items())
    return f"{cell.config.model.label} ({own})" if own else cell.config.model.label


def column_of(cell: Cell) -> str:
    return f"{cell.config.length:,} {cell.mode}"


def short(record: Record) -> str:
    """A record in one cell: `12.3 / 456`, or what became of it."""
    if record.status != "ok":
        return record.status
    return f"{number(record.step_ms)} / {number(record.peak_mem_mib)}"


def summary(record: Record) -> str:
    """A record in a few words."""
    if record.status == "ok":
        return f"{number(record.step_ms)} ms, {number(record.peak_mem_mib)} MiB, {record.wall_s:.0f} s"
    found = (record.extra or {}).get("largest_length")
    fitting = f" (length {found:,} fits)" if found else ""
    return f"{record.status}: {record.reason}{fitting}"
