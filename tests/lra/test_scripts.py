"""The shell scripts without their downloads: which Python they take, when they install, what the quick start
asks of lra. Python, pip and lra are replaced by small programs that write down how they were called.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lra
from lra.config import RunConfig, compose, expand
from lra.data.selection import resolve

ROOT = Path(lra.__file__).resolve().parents[1]
BASH = shutil.which("bash")
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
TOOLS = ("bash", "dirname", "cat", "cksum", "date", "mkdir", "env")

# Answers -c and --version as some version of Python would; `-m venv DIR` makes a DIR whose python is `inner`.
PYTHON = """#!{bash}
case "$1 $2" in
  "--version "*) echo "Python 3.{minor}.0" ;;
  "-m venv") mkdir -p "$3/bin" && cat "{inner}" >"$3/bin/python" && {chmod} +x "$3/bin/python" ;;
  *) exec "{real}" -I -S -c 'import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])' "$2" ;;
esac
"""
RECORDER = """#!{bash}
[ "$1" = -c ] && exit 0  # the question whether its version is supported
printf '%s\\t' "$@" >>"{calls}"; echo >>"{calls}"
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of the scripts, and a PATH that holds the few tools they need and the Pythons of a test."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.calls_file = folder / "root", folder / "bin", folder / "calls"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy2(ROOT / "pyproject.toml", self.root)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.recorder = RECORDER.format(bash=BASH, calls=self.calls_file)
        self.inner = write_program(folder / "inner", self.recorder)

    def add_python(self, minor: int, name: str = "python3", folder: Path | None = None) -> Path:
        chmod, real = shutil.which("chmod"), sys.executable
        text = PYTHON.format(bash=BASH, minor=minor, inner=self.inner, chmod=chmod, real=real)
        return write_program((folder or self.bin) / name, text)

    def bash(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [BASH, *arguments],
            cwd=self.root,
            env={"PATH": str(self.bin)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def source(self, command: str, **environment: str) -> subprocess.CompletedProcess:
        return self.bash("-c", f"source scripts/environment.sh; {command}", **environment)

    def calls(self) -> list[list[str]]:
        """How the recorded programs were called since the last time this was asked."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        return [line.rstrip("\t").split("\t") for line in lines]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    done = subprocess.run([BASH, "-n", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_a_supported_python_is_taken(checkout, minor):
    python = checkout.add_python(minor)
    assert checkout.source("find_python").stdout.strip() == str(python)


@pytest.mark.parametrize("minor", [None, 9, 10, 14])
def test_no_supported_python_is_refused_with_what_to_do(checkout, minor):
    if minor:
        checkout.add_python(minor)
        checkout.add_python(minor, "python")
    done = checkout.source("set_up")
    assert done.returncode == 2 and not (checkout.root / ".venv").exists()
    assert "Python 3.11, 3.12 or 3.13" in done.stderr and "PYTHON=" in done.stderr


def test_an_unsupported_python3_is_passed_over_for_a_supported_one(checkout):
    checkout.add_python(14)
    python = checkout.add_python(12, "python3.12")
    assert checkout.source("find_python").stdout.strip() == str(python)


def test_a_python_that_is_named_comes_first(checkout, tmp_path):
    checkout.add_python(11)
    python = checkout.add_python(13, "mine", tmp_path / "own")
    assert checkout.source("find_python", PYTHON=str(python)).stdout.strip() == str(python)


def test_the_first_call_installs_the_checkout_under_the_constraints(checkout):
    checkout.add_python(12)
    assert checkout.source("set_up dev").returncode == 0
    (call,) = checkout.calls()
    assert call[:3] == ["-m", "pip", "install"]
    assert call[call.index("--constraint") + 1] == str(checkout.root / "scripts" / "constraints-cpu.txt")
    assert call[call.index("--editable") + 1] == f"{checkout.root}[dev]"


def test_nothing_is_installed_again_until_what_is_wanted_changes(checkout):
    checkout.add_python(12)
    for _ in range(2):
        assert checkout.source("set_up").returncode == 0
    assert len(checkout.calls()) == 1
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    assert checkout.source("set_up").returncode == 0
    assert len(checkout.calls()) == 1


def test_the_environment_of_the_tests_serves_the_quick_start_too(checkout):
    checkout.add_python(12)
    for extra, calls in (("", 1), ("dev", 1), ("", 0), ("dev", 0)):
        assert checkout.source(f"set_up {extra}").returncode == 0
        assert len(checkout.calls()) == calls, extra


def test_an_unsupported_python_that_is_named_is_refused(checkout, tmp_path):
    checkout.add_python(12)
    python = checkout.add_python(10, "mine", tmp_path / "own")
    done = checkout.source("set_up", PYTHON=str(python))
    assert done.returncode == 2 and str(python) in done.stderr


def test_an_environment_of_an_unsupported_python_is_refused(checkout):
    checkout.add_python(12)
    write_program(checkout.root / ".venv" / "bin" / "python", f"#!{BASH}\n[ $1 = --version ]")
    done = checkout.source("set_up")
    assert done.returncode == 2 and "delete it" in done.stderr and not checkout.calls()


def test_a_failed_installation_is_tried_again(checkout):
    checkout.add_python(12)
    checkout.inner.write_text(checkout.recorder + "exit 1\n")
    for _ in range(2):
        assert checkout.source("set_up").returncode == 2
        assert len(checkout.calls()) == 1


@pytest.fixture
def quickstart(checkout):
    """Runs the quick start with an lra that only writes down its arguments; returns them, one list a call."""
    checkout.add_python(12)
    assert checkout.source("set_up").returncode == 0
    checkout.calls()
    write_program(checkout.root / ".venv" / "bin" / "lra", checkout.recorder)
    done = checkout.bash("scripts/quickstart.sh")
    assert done.returncode == 0, done.stderr
    return checkout.calls()


@pytest.fixture
def runs(quickstart) -> list[RunConfig]:
    """The runs of the quick start's sweep."""
    (train,) = [call for call in quickstart if call[0] == "train"]
    assert train[1] == "-m"
    return [compose(one) for one in expand(train[2:])]


def test_quick_start_goes_from_data_to_table_and_figure_and_ends_with_the_page(quickstart):
    assert {call[0] for call in quickstart} == {"data", "train", "table", "plot", "report"}
    assert quickstart[0][:2] == ["data", "prepare"] and quickstart[1][0] == "train"
    (plot,) = [call for call in quickstart if call[0] == "plot"]
    (table,) = [call for call in quickstart if call[0] == "table"]
    folder = plot[1]
    assert table[1] == folder and plot[-1].endswith(".png") and table[-1].endswith(".md")
    assert quickstart[-1][:4] == ["report", folder, "-o", f"{folder}/report.html"]


def test_quick_start_compares_five_mechanisms_and_identity_at_two_lengths_and_seeds(runs):
    models, lengths = {run.model.name for run in runs}, {run.length for run in runs}
    seeds = {run.seed for run in runs}
    assert len(models - {"identity"}) >= 5 and "identity" in models
    assert len(lengths) == 2 and len(seeds) == 2
    assert len(runs) == len(models) * len(lengths) * len(seeds)


def test_quick_start_tests_on_enough_rows_to_tell_something(runs):
    assert min(run.task.num_test for run in runs) >= 2000


def test_quick_start_treats_every_mechanism_alike(runs):
    first = runs[0]
    for run in runs:
        assert (run.train, run.batch_size) == (first.train, first.batch_size)
        assert run.model.backbone == first.model.backbone


def test_quick_start_trains_on_the_data_it_prepared(quickstart, runs):
    prepared = {task.folder_name(length) for task, length in resolve(quickstart[0][2], quickstart[0][3:])}
    assert prepared == {run.task.folder_name(run.length) for run in runs}
