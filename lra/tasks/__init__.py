"""The tasks by name. Importing them loads neither numba nor datasets; both wait until data are built."""

from lra.errors import unknown
from lra.tasks.base import Task
from lra.tasks.listops import ListOps
from lra.tasks.text import Text

_TASKS: dict[str, type[Task]] = {"listops": ListOps, "text": Text}


def names() -> list[str]:
    """All tasks, in the order of the benchmark."""
    return list(_TASKS)


def get(name: str) -> type[Task]:
    """The class of a task; UserError with close matches for a name that does not exist."""
    if name not in _TASKS:
        raise unknown("task", name, _TASKS)
    return _TASKS[name]
