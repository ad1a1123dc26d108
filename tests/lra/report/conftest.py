"""A sweep on disk, shared by the tests of this folder."""

import pytest
from page_samples import write_page
from report_samples import write_sweep


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of runs of `report_samples.write_sweep`."""
    root = tmp_path_factory.mktemp("runs")
    write_sweep(root)
    return root


@pytest.fixture(scope="session")
def report(tmp_path_factory, runs):
    """The page of `page_samples.write_page`; its special runs lie in `special` beside it."""
    return write_page(tmp_path_factory.mktemp("page"), runs)
