"""Whether torchrun started this process as one of several; without torch, so that every verb can ask."""

import os

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each process


def launched() -> bool:
    """Whether all of torchrun's variables are here and speak of several processes; other launchers, which
    set some of them, start runs of one.
    """
    told = {name: os.environ.get(name, "") for name in TOLD}
    numbers = (value for name, value in told.items() if name != "MASTER_ADDR")
    return all(map(str.isdecimal, numbers)) and bool(told["MASTER_ADDR"]) and int(told["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not launched() or int(os.environ["RANK"]) == 0
