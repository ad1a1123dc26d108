"""What a user installs: the wheel holds what it needs and nothing else, and runs from a folder with other
`models` and `conf`; a clone does too. The versions are those the README names.

The wheel's tests are `slow`: they build in isolation, for which hatchling comes from the package index.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import lra
from lra import registry

ROOT = Path(lra.__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(command: list, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; nothing of this process's PYTHONPATH reaches it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{command} exits {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def elsewhere(tmp_path):
    """A folder where `import models` and `conf/` would find something that is not ours."""
    folder = tmp_path / "elsewhere"
    for path, text in {
        "models/__init__.py": "raise RuntimeError('the models of another project were imported')\n",
        "models/softmax.py": "raise RuntimeError('the models of another project were imported')\n",
        "conf/config.yaml": "task: of another project\n",
        "conf/model/softmax.yaml": "name: of another project\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("only a git checkout knows which files belong to the project")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that comes of the sdist that comes of a clean copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--outdir", out, source], cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The scripts folder of a fresh environment with the wheel, and the dependencies of this interpreter.

    A .pth file names where they lie. Python reads no .pth file in there, so an editable lra is not found.
    """
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python.parent


@pytest.mark.slow
def test_the_wheel_holds_code_and_configuration_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    info = f"lra-{lra.__version__}.dist-info"
    code = {name for name in tracked_files() if name.split("/")[0] in ("lra", "models")}
    conf = {f"lra/{name}" for name in tracked_files() if name.startswith("conf/")}
    about = {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert held == code | conf | about
    assert {"lra/conf/config.yaml", "lra/report/published.csv", "models/softmax.py"} <= held
    assert {"lra/report/page.css", "lra/report/page.js"} <= held


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"lra-{lra.__version__}.dist-info"
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/entry_points.txt").decode().split("\n")[:2] == [
            "[console_scripts]",
            "lra = lra.cli:main",
        ]
    assert metadata["Name"] == "lra" and metadata["Version"] == lra.__version__
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(PYPROJECT["requires-python"])
    required = {Requirement(text) for text in metadata.get_all("Requires-Dist")}
    assert {Requirement(text) for text in PYPROJECT["dependencies"]} <= required


@pytest.mark.slow
def test_the_installed_lra_is_the_wheel_and_brings_its_own_models(environment, elsewhere):
    code = "import lra, models, lra.config; print(lra.__file__, models.__file__, lra.config.conf_dir())"
    for path in run([environment / "python", "-c", code], cwd=elsewhere).split():
        assert Path(path).is_relative_to(environment.parent), path


@pytest.fixture(params=["clone", pytest.param("wheel", marks=pytest.mark.slow)])
def lra_in(request, elsewhere, tmp_path):
    """Runs lra in the folder of another project: of the clone, and as the wheel installs it."""
    places = {"LRA_RUNS": str(tmp_path / "runs"), "LRA_DATA": os.environ["LRA_DATA"]}
    if request.param == "clone":  # `-m` puts the current folder first, before the clone
        prefix, places["PYTHONPATH"] = [sys.executable, "-m", "lra"], str(ROOT)
        module = prefix
    else:
        folder = request.getfixturevalue("environment")
        prefix, module = [folder / "lra"], [folder / "python", "-m", "lra"]

    def call(*arguments: str, as_module: bool = False) -> str:
        return run([*(module if as_module else prefix), *arguments], cwd=elsewhere, **places)

    return call


def test_version(lra_in):
    assert lra_in("--version").split() == ["lra", lra.__version__]


def test_models_are_ours_in_the_folder_of_another_project(lra_in):
    listed = {row["name"] for row in json.loads(lra_in("list", "models", "--json"))}
    assert listed == set(registry.names())


def test_lra_runs_as_a_module(lra_in):
    assert "listops" in lra_in("list", "tasks", as_module=True)


def test_configuration_is_ours_in_the_folder_of_another_project(lra_in):
    settings = yaml.safe_load(lra_in("train", "--config"))
    assert settings["task"]["name"] == "listops" and settings["model"]["name"] == "softmax"


@pytest.mark.slow
def test_a_run_ends_well(lra_in, tiny, tmp_path):
    lra_in("train", *tiny())
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")]
    assert record["status"] == "ok" and record["num_test"] == 150


@pytest.mark.slow
def test_worker_processes_find_our_models_too(lra_in, tiny, tmp_path):
    lra_in("train", "-m", *tiny("model=linear,identity"))
    records = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")]
    assert {(r["model"], r["status"]) for r in records} == {("linear", "ok"), ("identity", "ok")}


def supported_minors() -> list[int]:
    supported = SpecifierSet(PYPROJECT["requires-python"])
    return [minor for minor in range(40) if f"3.{minor}" in supported]


def test_python_versions_agree_everywhere():
    minors = supported_minors()
    assert minors == [11, 12, 13]
    named = re.findall(r"Python :: 3\.(\d+)$", "\n".join(PYPROJECT["classifiers"]), re.MULTILINE)
    assert [int(minor) for minor in named] == minors
    for file in ("README.md", "scripts/environment.sh"):
        ranges = set(re.findall(r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / file).read_text()))
        assert ranges == {(str(minors[0]), str(minors[-1]))}, file


def test_the_pinned_torch_is_one_that_is_allowed():
    (floor,) = [Requirement(text) for text in PYPROJECT["dependencies"] if text.startswith("torch")]
    assert floor.specifier == SpecifierSet(">=2.11")
    lines = (ROOT / "scripts" / "constraints-cpu.txt").read_text().splitlines()
    (pinned,) = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert pinned == Requirement("torch==2.13.0")
    (version,) = [specifier.version for specifier in pinned.specifier]
    assert version in floor.specifier
    for named in re.findall(r"(?:PyTorch|torch) ?(?:>= ?)?(2\.\d+)", (ROOT / "README.md").read_text()):
        assert named in floor.specifier


@pytest.mark.parametrize("minor", [m for m in supported_minors() if m <= sys.version_info.minor])
def test_every_file_is_in_the_language_of_each_version(minor):
    """A Python reads the grammar of older ones and its own, so the newest tests them all."""
    files = [
        file for folder in ("lra", "models", "scripts", "tests") for file in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 80
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, minor))
