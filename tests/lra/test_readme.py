"""Every command the README shows is one that lra takes, and every file it names is there.

Cheap commands run, on their own data and runs; those that train or measure for long are composed in full and
stop there. A comment at the end of a line, as `# needs a GPU`, says what it needs beyond the quick start.
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lra
from lra import cli, config, environment, measure, registry, search
from lra.data.selection import resolve
from lra.launch import sweep

ROOT = Path(lra.__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS = (
    "needs a GPU",
    "needs two GPUs",
    "needs IMDb",
    "needs CIFAR-10",
    "needs CIFAR-10, IMDb and LRA's paper pairs",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("lra ")]


def words(line: str) -> list[str]:
    """The arguments of a command line, without `lra` and the comment."""
    return shlex.split(line, comments=True)[1:]


def of(*verbs: str) -> list[str]:
    return [line for line in COMMANDS if words(line)[0] in verbs]


def is_marked(line: str) -> bool:
    """Whether the line says that it needs what not everybody has."""
    return "#" in line and line.partition("#")[2].strip() in NEEDS


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """An empty folder, but for the files that the README tells its reader to write."""
    folder = tmp_path / "reader"
    folder.mkdir()
    written = []
    for block in blocks("python"):
        if named := re.match(r"# (\w+)\.py\n", block):
            written.append(named[1])
            (folder / f"{named[1]}.py").write_text(block)
    monkeypatch.chdir(folder)
    yield folder
    for name in written:
        sys.modules.pop(name, None)


def test_the_two_commands_to_start_with_are_there():
    assert {"bash scripts/quickstart.sh", "bash scripts/test.sh"} <= set(LINES)


def test_shell_blocks_are_shell_and_call_scripts_that_exist():
    for block in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for line in LINES:
        if line.startswith("bash "):
            assert (ROOT / words(line)[0]).is_file(), line


def test_every_comment_says_what_a_command_needs():
    assert [line for line in COMMANDS if "#" in line and not is_marked(line)] == []


def test_every_verb_is_shown_and_exists():
    assert {words(line)[0] for line in COMMANDS} == set(cli.VERBS)


@pytest.mark.parametrize("line", of("train"))
def test_train_commands_compose(line, readers_folder, monkeypatch):
    seen = []

    def compose(overrides, *, multirun, force):
        seen.extend(config.compose(one) for one in (config.expand(overrides) if multirun else [overrides]))
        return []

    monkeypatch.setattr(sweep, "train", compose)
    monkeypatch.setattr(cli, "_print_table", lambda records: None)
    assert cli.main(words(line)) == 0
    assert seen or "--config" in line


@pytest.mark.parametrize("line", of("search"))
def test_search_commands_compose(line, readers_folder, monkeypatch):
    seen = []

    def compose(overrides, **options):
        seen.extend(config.compose(search.searching(one)) for one in config.expand(overrides))
        return []

    monkeypatch.setattr(search, "search", compose)
    monkeypatch.setattr(cli, "_print_table", lambda records: None)
    assert cli.main(words(line)) == 0
    assert [run.model.name for run in seen] == ["search"]


@pytest.mark.parametrize("line", of("measure"))
def test_measure_commands_compose(line, readers_folder, monkeypatch):
    seen = []

    def compose(overrides, **options):
        seen.extend(measure.cells(overrides))
        return []

    if is_marked(line):
        monkeypatch.setattr(environment, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(measure, "measure", compose)
    monkeypatch.setattr(cli, "_print_table", lambda records, folder: None)
    assert cli.main(words(line)) == 0
    assert seen


def test_data_commands_run_one_after_the_other(readers_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "data"))
    for line in of("data"):
        if is_marked(line):
            assert words(line)[2:] == ["all"] or resolve(words(line)[2], words(line)[3:])
        else:
            assert cli.main(words(line)) == 0, line


def test_commands_that_read_records_run(readers_folder, tiny, capsys):
    assert cli.main(["train", *tiny()]) == 0
    for line in of("list", "table", "plot", "report"):
        capsys.readouterr()
        assert cli.main(words(line)) == 0, line
        assert capsys.readouterr().out.strip(), line


@pytest.mark.parametrize("line", of("check-model"))
def test_check_model_commands_pass_with_as_many_checks_as_said(line, readers_folder, capsys):
    assert cli.main(words(line)) == 0, capsys.readouterr().out
    (made,) = set(re.findall(r"(\d+) checks", capsys.readouterr().out))
    assert set(re.findall(r"(\d+) checks", README)) <= {made}


def test_every_mechanism_stands_in_one_family():
    section = README.split("## Mechanisms")[1].split("\n\n")[1]
    named = re.findall(r"`(\w+)`", section)
    assert sorted(named) == registry.names()


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    missing = [link for link in links if ":" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert missing == []


def test_paths_in_the_text_exist():
    folders = "lra|models|conf|scripts|tests|results"
    named = re.findall(rf"`((?:{folders})/[a-z0-9_./-]*)`", README)  # NAME stands for one of the reader's
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_what_the_network_gets_right_is_what_was_measured():
    measured = [
        json.loads(line) for line in (ROOT / "results/pathfinder/solve.jsonl").read_text().splitlines()
    ]
    shares = {(r["task"], r["shuffled_labels"]): 100 * r["test_accuracy"] for r in measured}
    for task in ("pathfinder32", "pathx"):
        row = f"| `{task}` | 160,000 | {shares[task, False]:.1f} % | {shares[task, True]:.1f} % |"
        assert row in README


def test_what_the_quarter_of_an_hour_gave_is_what_was_measured():
    lines = (ROOT / "results/quarter_hour/records.jsonl").read_text().splitlines()
    measured = {r["model"]: r for r in map(json.loads, lines)}
    names, shares = re.search(
        r"^\| \| (lru .*) \|\n.*\n\| test accuracy \| (.*) \|$", README, re.MULTILINE
    ).groups()
    said = dict(zip(names.split(" | "), shares.split(" | "), strict=True))
    assert said == {name: f"{100 * run['test_accuracy']:.1f} %" for name, run in measured.items()}
    assert all(run["wall_s"] < 300 and run["test_accuracy"] >= 0.8 for run in measured.values())


def measured_steps(name: str) -> dict[tuple[str, str], dict[str, float]]:
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for line in (ROOT / "results" / "step" / name).read_text().splitlines():
        row = json.loads(line)
        cells.setdefault((row["task"], row["model"]), {})[row["rung"]] = row["step_ms"]
    return cells


def test_the_ladder_of_a_step_is_what_was_measured():
    cells = measured_steps("ladder.jsonl")
    shown = re.findall(r"^\| (\w+), `(\w+)` \| (.*) \|$", README, re.MULTILINE)
    assert len(shown) == 6
    for task, model, numbers in shown:
        steps = cells[task, model]
        wanted = [*(f"{ms:.2f}" for ms in steps.values()), f"{steps['plain'] / steps['packed']:.1f}"]
        assert numbers.split(" | ") == wanted
    mean = statistics.geometric_mean(steps["plain"] / steps["packed"] for steps in cells.values())
    assert f"{mean:.1f} times in the geometric mean" in README
    (here,) = measured_steps("cpu.jsonl").values()
    assert f"ListOps is {here['plain'] / here['packed']:.1f} times as fast" in README


def test_the_costs_by_length_are_what_was_measured():
    section = README[README.index("## Measure cost") : README.index("## How a step is made fast")]
    shown = re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE)
    made = (ROOT / "results" / "measure" / "lengths.md").read_text().split("### ")
    parts = {part.split(" · ", 1)[0]: part for part in made}
    titles = ["Cheaper than fused softmax from", "Growth with length", "Step time (ms) by length, train"]
    crossing, growth, times = (
        {
            line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
            for line in parts[t].splitlines()
        }
        for t in titles
    )
    assert len(shown) == 11
    for name, numbers in shown:
        train, infer, exponent, milliseconds = (cell.strip() for cell in numbers.split(" | "))
        crossings = crossing.get(name, ["", "", ""])
        assert [train, infer] == [crossings[0], crossings[2]]
        assert exponent == growth[name][0]
        assert milliseconds.split(", ") == [cell.strip() for cell in times[name]]


def test_other_commands_name_scripts_that_exist_and_runs_that_compose():
    others = [line for line in LINES if line.startswith(("python ", "torchrun "))]
    for line in others:
        given = words(line)
        if line.startswith("python "):
            assert (ROOT / given[0]).is_file(), line
        else:
            config.compose(given[given.index("train") + 1 :])
    assert len(others) == 2
