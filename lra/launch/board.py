"""What a sweep's runs are at: counts, time left, and the table of it, as high as the terminal at most."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lra.launch.local import Job
    from lra.records import Record

GROUPS = ("task", "model", "length", "seed")  # told by columns of their own
MOST_FAILURES = 5  # of the failed runs, the last ones are named
WIDE = 100  # columns from which on the table says more


@dataclass(frozen=True)
class Cell:
    """Runs that differ in nothing but the seed."""

    task: str
    model: str
    length: str
    settings: str = ""  # what the sweep varies besides

    @property
    def mechanism(self) -> str:
        return f"{self.model} {self.settings}".rstrip()


@dataclass
class Going:
    """A run under way."""

    cell: str
    seed: str
    started: float
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    val_accuracy: float | None = None
    first: tuple[float, int] | None = None  # time and step of the first news

    def hear(self, event: dict[str, Any]) -> None:
        self.step, self.num_steps = event["step"], event["num_steps"]
        self.loss = event.get("loss", self.loss)
        self.val_accuracy = event.get("val_accuracy", self.val_accuracy)
        self.first = self.first or (time.monotonic(), self.step)

    @property
    def steps_per_s(self) -> float | None:
        """Since the first news, so that compiling does not count."""
        if self.first is None or self.step == self.first[1]:
            return None
        return (self.step - self.first[1]) / max(time.monotonic() - self.first[0], 1e-9)

    def left_s(self) -> float | None:
        """Seconds of training to go; None before the second news."""
        speed = self.steps_per_s
        return None if speed is None else (self.num_steps - self.step) / speed

    @property
    def news(self) -> str:
        parts = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        return " ".join(parts + ([] if self.val_accuracy is None else [f"val {percent(self.val_accuracy)}"]))


@dataclass
class Done:
    """What the ended runs of a cell gave."""

    accuracies: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # each run took
    failures: list["Record"] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.accuracies) + len(self.failures)


class Board:
    """The state of a sweep: waiting, running and ended runs, by cell."""

    def __init__(self, jobs: Sequence["Job"]) -> None:
        self.cells = cells(jobs)
        self.wanted = Counter(job.cell for job in jobs)
        self.begun: Counter[str] = Counter()
        self.running: dict[str, Going] = {}
        self.done = {cell: Done() for cell in self.cells}
        self.failed: list[Record] = []
        self.num_runs, self.num_begun, self.num_ended = len(jobs), 0, 0
        self.at_once = 1  # runs that went on together
        self.started = time.monotonic()
        self.of = {job.run_id: (job.cell, _parts(job.run_id)["seed"]) for job in jobs}

    def hear(self, event: dict[str, Any]) -> None:
        if event["kind"] == "end":
            self._end(event["record"])
            return
        run_id = event["run_id"]
        if event["kind"] == "progress":
            self.running[run_id].hear(event)
            return
        cell, seed = self.of[run_id]
        self.running[run_id] = Going(cell, seed, time.monotonic())
        self.num_begun += 1
        self.begun[cell] += 1
        self.at_once = max(self.at_once, len(self.running))

    def _end(self, record: "Record") -> None:
        going = self.running.pop(record.run_id, None)
        done = self.done[self.of[record.run_id][0]]
        self.num_ended += 1
        if going is not None:
            done.seconds.append(record.wall_s or time.monotonic() - going.started)
        if record.status == "ok":
            done.accuracies.append(record.test_accuracy)
            done.step_ms += [record.step_ms] if record.step_ms else []
        else:
            done.failures.append(record)
            self.failed.append(record)

    @property
    def num_waiting(self) -> int:
        return self.num_runs - self.num_begun

    def left_s(self) -> float | None:
        """Seconds to the end of the sweep; None before a run has ended.

        A run that waits takes what those of its cell took, of a cell that has not been seen what the others
        took in the mean; a run under way at least what its steps do.
        """
        means = {cell: fmean(done.seconds) for cell, done in self.done.items() if done.seconds}
        if not means:
            return None
        usual = fmean(means.values())
        now = time.monotonic()
        going = []
        for run in self.running.values():
            left = run.left_s()
            going.append(max(0.0, means.get(run.cell, usual) - (now - run.started)) if left is None else left)
        waiting = sum(means.get(cell, usual) * (n - self.begun[cell]) for cell, n in self.wanted.items())
        return max([*going, (sum(going) + waiting) / min(self.at_once, self.num_runs)])

    def state(self, cell: str) -> str:
        """What a cell is at, in a few words; the reason of its last failure if it has one."""
        done, going = self.done[cell], [run for run in self.running.values() if run.cell == cell]
        parts = []
        if going:
            parts.append("running " + " ".join(f"s{run.seed}" for run in going))
        if done.failures:
            counts = Counter(record.status for record in done.failures)
            parts.append(", ".join(f"{n} {status}" for status, n in counts.items()))
        if not parts:
            parts.append("done" if done.count == self.wanted[cell] else "waiting")
        return ", ".join(parts)


def _parts(run_id: str) -> dict[str, str]:
    """What a run's id says; of one that is made otherwise all of it is the model."""
    parts = run_id.rsplit("-", 4)
    if len(parts) < 5:
        return {"task": "", "model": run_id, "length": "", "seed": ""}
    return {"task": parts[0], "model": parts[1], "length": parts[2], "seed": parts[3].removeprefix("s")}


def cells(jobs: Sequence["Job"]) -> dict[str, Cell]:
    """The cells of a sweep in its order; settings that vary between them are told with the mechanism."""
    given = [dict(one.split("=", 1) for one in job.overrides) for job in jobs]
    values: dict[str, set[str]] = {}
    for one in given:
        for key, value in one.items():
            values.setdefault(key, set()).add(value)
    varied = [key for key, found in values.items() if len(found) > 1 and key not in GROUPS]
    made: dict[str, Cell] = {}
    for job, one in zip(jobs, given, strict=True):
        about = _parts(job.run_id)
        settings = " ".join(f"{key.rpartition('.')[2]}={one[key]}" for key in varied if key in one)
        made.setdefault(job.cell, Cell(about["task"], about["model"], about["length"], settings))
    return made


def clock(seconds: float | None) -> str:
    """3:25 or 1:02:07; '-' if not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


# The table, from top to bottom: runs under way, cells, failures, the sweep.


def draw(board: Board, *, width: int, height: int) -> Iterator[RenderableType]:
    """The board in at most `height - 1` lines, of which the last is the sweep's."""
    if board.num_runs == 1:
        if board.running:
            yield _running(board, len(board.running), width)
        return
    room = height - 2  # the sweep's line, and the one that the cursor stands in
    failures = _failures(board, min(MOST_FAILURES, max(1, room // 5)), width) if board.failed else []
    room -= len(failures)
    at_once = len(board.running)
    shown = min(at_once, max(1, room // 2 - 2))
    if shown:
        yield _running(board, shown, width)
        room -= shown + 1
        if shown < at_once:
            yield Text(f" and {at_once - shown} more", style="dim")
            room -= 1
    if len(board.cells) + 2 <= room:
        yield from _cells(board, width)
    elif room >= 4:
        yield from _grid(board, width, room)
    yield from failures
    yield _footer(board, width)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=True, header_style="dim")
    for name in columns:
        table.add_column(
            name, justify="right" if name in right else "left", no_wrap=True, overflow="ellipsis"
        )
    return table


def _running(board: Board, shown: int, width: int) -> Table:
    numbers = ("step", "loss", "val", "steps/s", "left")
    names = ("running", "", *numbers) if width >= WIDE else ("running", "", "loss", "val", "left")
    table = _table(*names, right=numbers)
    for run in list(board.running.values())[:shown]:
        cell = board.cells[run.cell]
        bar = ProgressBar(total=run.num_steps or 1, completed=run.step, width=24 if width >= WIDE else 12)
        speed = run.steps_per_s
        values = {
            "step": f"{run.step}/{run.num_steps}" if run.num_steps else "starting",
            "loss": "-" if run.loss is None else f"{run.loss:.3f}",
            "val": "-" if run.val_accuracy is None else percent(run.val_accuracy),
            "steps/s": "-" if speed is None else f"{speed:.3g}" if speed < 100 else f"{speed:.0f}",
            "left": clock(run.left_s()),
        }
        name = Text(f"{cell.mechanism}  {cell.task} {cell.length}  s{run.seed}")
        table.add_row(name, bar, *(values[column] for column in names[2:]))
    return table


def _cells(board: Board, width: int) -> Iterator[RenderableType]:
    """A row per cell, which fills in."""
    names = ["mechanism", "task", "length", "runs", "accuracy", "step ms", "time", "state"]
    names = names if width >= WIDE else [name for name in names if name not in ("step ms", "time")]
    table = _table(*names, right=("length", "runs", "accuracy", "step ms", "time"))
    for key, cell in board.cells.items():
        done = board.done[key]
        values = {
            "mechanism": Text(cell.mechanism),
            "task": cell.task,
            "length": cell.length,
            "runs": f"{done.count}/{board.wanted[key]}",
            "accuracy": percent(fmean(done.accuracies)) if done.accuracies else "-",
            "step ms": f"{fmean(done.step_ms):.1f}" if done.step_ms else "-",
            "time": clock(fmean(done.seconds) if done.seconds else None),
            "state": Text(board.state(key), style="red" if done.failures else ""),
        }
        table.add_row(*(values[name] for name in names))
    yield table
    yield Text("")


def _grid(board: Board, width: int, room: int) -> Iterator[RenderableType]:
    """Mechanisms by tasks: ended of wanted runs in each place, and the failed ones."""
    columns = list(dict.fromkeys(f"{cell.task} {cell.length}" for cell in board.cells.values()))
    rows = list(dict.fromkeys(cell.mechanism for cell in board.cells.values()))
    if len(rows) > room - 3:  # settings that vary share the row of their mechanism
        rows = list(dict.fromkeys(cell.model for cell in board.cells.values()))
    places: dict[tuple[str, str], list[int]] = {}
    for key, cell in board.cells.items():
        row = cell.mechanism if cell.mechanism in rows else cell.model
        place = places.setdefault((row, f"{cell.task} {cell.length}"), [0, 0, 0, 0])
        done = board.done[key]
        counts = (done.count, board.wanted[key], len(done.failures), board.begun[key] - done.count)
        place[:] = [a + b for a, b in zip(place, counts, strict=True)]
    shown = rows if len(rows) <= room - 3 else _newest(rows, places)[: room - 3]
    title = "ended of all runs"
    widths = [
        2 + max([len(column), *(len(_place(places.get((row, column)))) for row in shown)])
        for column in columns
    ]
    rest = width - 2 - max(map(len, [title, *shown]))
    fitting = max(1, sum(used <= rest for used in accumulate(widths)))
    table = _table(title, *columns[:fitting], right=tuple(columns))
    for row in shown:
        table.add_row(Text(row), *(_place(places.get((row, column))) for column in columns[:fitting]))
    yield table
    hidden = [f"{n} more {what}" for n, what in (
        (len(rows) - len(shown), "mechanisms"), (len(columns) - fitting, "tasks or lengths"),
    ) if n > 0]  # fmt: skip
    yield Text(" and " + ", ".join(hidden) if hidden else "", style="dim")


def _newest(rows: list[str], places: dict[tuple[str, str], list[int]]) -> list[str]:
    """Rows with runs under way first, then those that wait for some, then those that have ended."""

    def rank(row: str) -> tuple[bool, bool]:
        of_row = [place for (name, _), place in places.items() if name == row]
        return all(not going for *_, going in of_row), all(ended == n for ended, n, *_ in of_row)

    return sorted(rows, key=rank)


def _place(counts: list[int] | None) -> Text:
    if counts is None:
        return Text("")
    ended, wanted, failed, going = counts
    text = f"{ended}/{wanted}" + (f" {failed} failed" if failed else "")
    return Text(text, style="red" if failed else "bold" if going else "dim" if ended == wanted else "")


def _failures(board: Board, most: int, width: int) -> list[Text]:
    lines = []
    for record in board.failed[-most:]:
        cell, seed = board.of[record.run_id]
        about = board.cells[cell]
        reason = f" {about.mechanism}  {about.task} {about.length}  s{seed}  {record.status}: {record.reason}"
        lines.append(Text(reason, style="red", no_wrap=True, overflow="ellipsis"))
    return lines


def _footer(board: Board, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=board.num_runs, completed=board.num_ended, width=24 if width >= WIDE else 10)
    counts = (
        f"{len(board.running)} running, {board.num_ended - len(board.failed)} done, "
        f"{len(board.failed)} failed, {board.num_waiting} waiting"
    )
    so_far = f"; so far {clock(time.monotonic() - board.started)}" if width >= WIDE else ""
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row("", bar, f"time left {clock(board.left_s())}; {counts}{so_far}")
    return table
