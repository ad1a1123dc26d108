"""What every test starts from: one thread, a fixed seed, and no GPU test where there is no GPU."""

import logging
import os

import pytest
import torch

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # torch asks for it under deterministic algorithms
logging.getLogger("torch.__trace").addFilter(
    lambda _: False
)  # thousands of empty lines in a failed test's report
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
