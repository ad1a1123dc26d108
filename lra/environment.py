"""Where a run took place: device, versions, revision. What is unknown is None."""

import logging
import os
import platform
import random
import shlex
import socket
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from lra.errors import UserError

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """`auto` is the current GPU if there is one, else the CPU; UserError for a device that is not there."""
    if name == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device '{name}' is not here: PyTorch {torch.__version__} sees no GPU; use train.device=cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}' is not here: there are {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's model and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [
            x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")
        ]
        model = lines[0] if lines else model
    threads = torch.get_num_threads()
    return f"CPU: {model}, {threads} thread" + "s" * (threads != 1)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_precision(precision: str, *, deterministic: bool) -> None:
    """Process-wide switches: tf32 products only where the run asks for them, deterministic kernels if asked.

    In bf16 and fp16 what a mechanism computes in float32 is float32 in full.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs
    torch.use_deterministic_algorithms(deterministic)


def out_of_memory(error: BaseException) -> bool:
    """Whether it, or what it was raised after, says that memory ran out.

    PyTorch raises its own error on a GPU and a plain RuntimeError on the CPU; the end of a failed capture
    raises another one after it.
    """
    seen: BaseException | None = error
    while seen is not None:
        ours = isinstance(seen, torch.OutOfMemoryError | MemoryError)
        if ours or "can't allocate memory" in str(seen) or "CUDA out of memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache
def git_revision() -> str | None:
    """What LRA_GIT_REVISION says (for a job on a copy of the tree), else the commit of the tree lra runs
    from, with "-dirty" if it was changed; None where neither is known.
    """
    if said := os.environ.get("LRA_GIT_REVISION"):
        return said
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not (root / ".git").exists():  # an installed wheel may lie inside somebody else's repository
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in ("lra", "torch", "numpy", "numba", "datasets", "hydra-core", "triton", "fla-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def host() -> str:
    return socket.gethostname()


def command() -> str:
    """The command line as a shell takes it, with the program's name alone."""
    return shlex.join(["lra", *sys.argv[1:]])
