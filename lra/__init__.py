"""`lra`: a benchmarking harness for the Long Range Arena."""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

# Waiting OpenMP threads spin for long by default; where anything else runs on the machine, small models then
# train ten times slower. This many turns cost nothing on a quiet one. Read when torch's OpenMP loads.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"

MODELS = Path(__file__).resolve().parent.parent / "models"


class _OurModels(importlib.abc.MetaPathFinder):
    """Finds the package `models` that lies beside `lra`, before any folder of that name where lra is run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "models":
            return None
        return importlib.util.spec_from_file_location(
            "models", MODELS / "__init__.py", submodule_search_locations=[str(MODELS)]
        )


sys.meta_path.insert(0, _OurModels())
