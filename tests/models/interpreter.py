"""Scripts beside this that run kernels in Triton's interpreter, in a process of their own: it is chosen when
Triton is imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def interpreted(name: str) -> list[list[str]]:
    """The words of each line that NAME_interpreted.py prints; the test is skipped where Triton is missing."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    script, env = here / f"{name}_interpreted.py", {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
