"""A network that sees two dimensions can tell generated Pathfinder images apart, and only by their labels.

The GPU version, at level hard and with all images, is in results/pathfinder.
"""

import pytest
import torch

from lra.data.prepare import prepare
from lra.data.solve import Setting, solve
from lra.tasks.pathfinder import Pathfinder32

IMAGES = 25_000  # 20,000 of them train


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRA_DATA", str(tmp_path_factory.mktemp("data")))
        return prepare(Pathfinder32(level="easy", num_images=IMAGES), 1024)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 0.75, 1.0), (True, 0.47, 0.53)])
def test_a_small_network_learns_the_labels_and_no_shuffled_ones(shuffled, low, high, store):
    setting = Setting(rows=20_000, epochs=8, width=16, batch_size=64, lr=3e-3, shuffled=shuffled)
    result = solve(store, setting, torch.device("cpu"))
    assert result["train_images"] == 20_000 and result["test_images"] == 2000
    assert low < result["test_accuracy"] < high
