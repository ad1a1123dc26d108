"""Which variants a command line names, and what becomes of those that fail."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lra import tasks
from lra.data import store as stores
from lra.errors import UserError, unknown
from lra.tasks.base import Task


def message(error: Exception) -> str:
    """One line for the user; an error of the system with the place where it happened."""
    if isinstance(error, UserError):
        return str(error)
    place = f"{error.filename}: " if getattr(error, "filename", None) else ""
    return f"{place}{error.strerror or error}; check that the place is right and can be read and written"


class Failures:
    """What fails does not stop the rest where several data sets are asked for; it is told at the end."""

    def __init__(self, several: bool) -> None:
        self.several, self.found = several, []

    @contextmanager
    def of(self, task: str, variant: str = "") -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            if not self.several:
                raise
            self.found.append({"task": task, "variant": variant, "error": message(error)})

    def status(self) -> int:
        """1 if anything failed, after saying what."""
        for failure in self.found:
            print(f"lra: {failure['task']}: {failure['error']}", file=sys.stderr)
        return 1 if self.found else 0


def resolve(task_name: str, overrides: Sequence[str]) -> list[tuple[Task, int]]:
    """The task with its settings, once for each value of every comma list; UserError for what has no meaning
    here.
    """
    from lra.config import compose, expand

    known = ["length", "paper", *(f"task.{name}" for name in _settings(task_name))]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if key not in known:
            raise unknown("setting", key, known)
        if not equals:
            raise UserError(f"'{override}' has no value; write {key}=VALUE")
    configs = [compose(one) for one in expand([f"task={task_name}", *overrides])]
    return [(config.task, config.length) for config in configs]


def _settings(task_name: str) -> list[str]:
    """The fields that decide what lies on the disk."""
    return [
        f.name for f in dataclasses.fields(tasks.get(task_name)) if f.name not in ("name", "padded_length")
    ]


def selected(task_name: str, overrides: Sequence[str]) -> tuple[list[tuple[Task, int]], Failures]:
    """What a task's name and overrides select, and where failures go; with `all` each setting goes to the
    tasks that have it.
    """
    if task_name != "all":
        pairs = resolve(task_name, overrides)
        return _distinct(pairs), Failures(len(pairs) > 1)
    for key, meaning in (("task.source", "the place of one task's data"), ("length", "one task's length")):
        if any(override.startswith(f"{key}=") for override in overrides):
            raise UserError(f"{key}= is {meaning}; name the task instead of 'all'")
    keys = {
        name: {f"task.{field}" for field in _settings(name) if field != "source"} for name in tasks.BENCHMARK
    }
    for key in (override.partition("=")[0] for override in overrides):
        if not any(key in known for known in keys.values()):
            raise unknown("setting", key, set().union(*keys.values()))
    pairs, failures = [], Failures(True)
    for name in tasks.BENCHMARK:
        with failures.of(name):
            pairs += resolve(name, [o for o in overrides if o.partition("=")[0] in keys[name]])
    return _distinct(pairs), failures


def _distinct(pairs: list[tuple[Task, int]]) -> list[tuple[Task, int]]:
    """Each variant once; UserError where two sources are named for one."""
    found: dict[Path, tuple[Task, int]] = {}
    for task, length in pairs:
        other, _ = found.setdefault(stores.store_path(task, length), (task, length))
        if other.source != task.source:
            raise UserError(
                f"task.source={other.source} and task.source={task.source} would fill "
                "the same folder; name one"
            )
    return list(found.values())
