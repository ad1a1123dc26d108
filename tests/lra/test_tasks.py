"""What holds for every task: names, settings, variants, and that asking costs nothing."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lra import tasks
from lra.data.store import prepare_command
from lra.errors import UserError

PINNED = {
    "retrieval": "aan-bytes-d3cbb8b0",
    "image": "cifar10-gray-a7b1f363",
    "pathfinder32": "pathfinder32-hard-d60e8605",
    "pathx": "pathfinder128-hard-900b3e0c",
    "pathfinder64": "pathfinder64-hard-3719249f",
    "pathfinder256": "pathfinder256-hard-94055f5d",
}
CONF = Path(__file__).parents[2] / "conf" / "task"


def test_an_unknown_task_gets_its_close_match_and_all_names():
    with pytest.raises(UserError, match="did you mean 'listops'.*text"):
        tasks.get("listop")


def test_importing_tasks_loads_no_heavy_library():
    code = (
        "import sys, lra.tasks, lra.data.store\n"
        "[lra.tasks.get(name) for name in lra.tasks.names()]\n"
        "print([m for m in ('numba', 'datasets', 'torch', 'pandas', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", tasks.names())
def test_the_yaml_values_are_the_defaults_of_the_dataclass(name):
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    defaults = {f.name: f.default for f in dataclasses.fields(tasks.get(name))}
    assert values["name"] == name
    assert values == {key: defaults[key] for key in values}


@pytest.mark.parametrize("name", tasks.names())
def test_every_field_is_in_the_yaml_or_is_a_recipes_business(name):
    values = OmegaConf.load(CONF / f"{name}.yaml")
    missing = {f.name for f in dataclasses.fields(tasks.get(name))} - set(values)
    assert missing <= {"padded_length", "val"}


@pytest.mark.parametrize("name", tasks.names())
def test_a_variant_is_plain_json_and_holds_no_place(name):
    task = tasks.get(name)(source="some/where")
    variant = task.variant(task.default_length)
    assert json.loads(json.dumps(variant)) == variant
    assert "some/where" not in json.dumps(variant)


@pytest.mark.parametrize("name", tasks.names())
def test_what_a_recipe_pads_to_does_not_rename_the_data(name):
    task = tasks.get(name)()
    padded = dataclasses.replace(task, padded_length=8192)
    assert padded.folder_name(task.default_length) == task.folder_name(task.default_length)


@pytest.mark.parametrize("name", tasks.names())
@pytest.mark.parametrize("length", [0, -1, 10**6])
def test_a_length_out_of_bounds_is_refused_with_the_bounds(name, length):
    allowed = "are length=[0-9]+" if tasks.get(name).stored == "pixels" else "from [0-9]+ to [0-9]+"
    with pytest.raises(UserError, match=f"length={length} .* {allowed}"):
        tasks.get(name)().check_length(length)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_is_no_63_bit_number_is_refused(seed):
    with pytest.raises(UserError, match="data_seed"):
        tasks.get("listops")(data_seed=seed).check()


def test_path_x_is_the_hard_pathfinder_of_128_pixels_and_shares_its_data():
    pathx, pathfinder = tasks.get("pathx")(), tasks.get("pathfinder128")()
    assert pathx.folder_name(16_384) == pathfinder.folder_name(16_384)
    easy = tasks.get("pathfinder128")(level="easy")
    assert easy.folder_name(16_384) != pathx.folder_name(16_384)


@pytest.mark.parametrize("name", [name for name in tasks.names() if hasattr(tasks.get(name), "mean")])
def test_a_continuous_input_is_scaled_as_its_settings_say(name):
    task = tasks.get(name)(input="continuous", mean=0.25, std=0.5)
    task.check()
    assert task.scaling == (63.75, 127.5)
    assert task.folder_name(task.default_length) == tasks.get(name)().folder_name(task.default_length)
    with pytest.raises(UserError, match="task.mean=0.25 would change nothing"):
        tasks.get(name)(mean=0.25).check()


@pytest.mark.parametrize("name", tasks.BENCHMARK)
def test_a_task_with_its_own_validation_split_refuses_the_test_split_for_it(name):
    task = tasks.get(name)(val="test")
    if name in ("text", "image"):
        task.check()
        assert task.folder_name(task.default_length) != tasks.get(name)().folder_name(task.default_length)
    else:
        with pytest.raises(UserError, match="val"):
            task.check()


def test_folder_names_are_pinned():
    listops, text = tasks.get("listops"), tasks.get("text")
    for name, folder in PINNED.items():
        task = tasks.get(name)()
        assert task.folder_name(task.default_length) == folder
    assert listops().folder_name(2000) == "listops-2000-3f3b9b75"
    assert text().folder_name(4000) == text().folder_name(1000) == "imdb-bytes-44739474"
    assert text(val="test").folder_name(4000) == "imdb-bytes-val-test-8a82c057"


@pytest.mark.parametrize(
    ("task", "length", "name"),
    [
        (tasks.get("listops")(), 2000, "listops-2000"),
        (tasks.get("listops")(), 64, "listops-64 (scaled, not the LRA setting)"),
        (tasks.get("listops")(num_train=10), 2000, "listops-2000 (not the LRA setting; num_train=10)"),
        (tasks.get("listops")(max_depth=10), 2000, "listops-2000"),
        (tasks.get("listops")(data_seed=3), 2000, "listops-2000-seed3"),
        (tasks.get("text")(), 4000, "imdb-bytes"),
    ],
)
def test_the_name_of_a_variant_says_how_it_differs_from_lra(task, length, name):
    assert task.variant_name(length) == name


def test_the_command_names_what_differs_from_the_defaults():
    task = tasks.get("listops")(num_train=10, max_depth=None, source="my folder")
    assert prepare_command(task, 32) == (
        "lra data prepare listops length=32 " + shlex.quote("task.source='my folder'") + " task.num_train=10"
    )
