"""A sweep on disk, shared by the tests of this folder."""

import pytest
from report_samples import write_sweep


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of runs of `report_samples.write_sweep`."""
    root = tmp_path_factory.mktemp("runs")
    write_sweep(root)
    return root
