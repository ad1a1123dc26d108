"""The tasks by name. Importing one loads neither numba nor datasets; both wait until data are built."""

import importlib

from lra.errors import unknown
from lra.tasks.base import Task

_TASKS = {
    "listops": "listops:ListOps",
    "text": "text:Text",
    "retrieval": "retrieval:Retrieval",
    "image": "image:Image",
    "pathfinder32": "pathfinder:Pathfinder32",
    "pathx": "pathfinder:PathX",
    "pathfinder64": "pathfinder:Pathfinder64",
    "pathfinder128": "pathfinder:Pathfinder128",
    "pathfinder256": "pathfinder:Pathfinder256",
}
BENCHMARK = ("listops", "text", "retrieval", "image", "pathfinder32", "pathx")
"""The six tasks that results are reported for; "all" means these."""


def names() -> list[str]:
    """All tasks, those of the benchmark first, in its order."""
    return list(_TASKS)


def get(name: str) -> type[Task]:
    """The class of a task; UserError with close matches for a name that does not exist."""
    if name not in _TASKS:
        raise unknown("task", name, _TASKS)
    module, _, task = _TASKS[name].partition(":")
    return getattr(importlib.import_module(f"lra.tasks.{module}"), task)
