"""`lra table` and `lra plot`: what they write, and what they refuse with one message."""

import pytest
from report_samples import write_failure, write_run

from lra.errors import UserError
from lra.report.cli import plot_main, table_main


@pytest.fixture
def few(tmp_path):
    write_run(tmp_path / "runs", "linear", 0, 0.3, tokens_per_s=1e6)
    write_failure(tmp_path / "runs", "reformer", 0, "diverged", "diverged at step 812")
    return tmp_path / "runs"


def test_table_prints_and_failed_runs_are_no_failure_of_it(few, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert table_main([str(few)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ListOps (2,000 tokens, regenerated)") and "diverged at step 812" in out


def test_default_is_the_folder_of_all_runs(few, capsys, monkeypatch):
    monkeypatch.setenv("LRA_RUNS", str(few))
    assert table_main(["--format", "md"]) == 0
    assert capsys.readouterr().out.startswith("### ListOps")


def test_printed_table_keeps_to_the_terminal(few, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table_main([str(few)])
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


@pytest.mark.parametrize(("name", "start"), [("t.md", "###"), ("t.csv", "kind,task"), ("t.txt", "ListOps")])
def test_output_suffix_decides_the_format(few, tmp_path, name, start):
    assert table_main([str(few), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "latex"], "unknown table format 'latex'.*csv, md, text"),
        (["--by", "mechanism"], "unknown way to arrange tables 'mechanism'.*length, task"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-o", "no/such/folder/t.md"], "cannot write.*existing folder"),
        (["nowhere"], "no runs at 'nowhere'.*lra train"),
    ],
)
def test_bad_arguments_are_user_errors(few, monkeypatch, arguments, message):
    monkeypatch.chdir(few.parent)
    with pytest.raises(UserError, match=message):
        table_main([str(few), *arguments])


def test_plot_writes_and_names_its_file(few, tmp_path, capsys):
    target = tmp_path / "figure.png"
    assert plot_main([str(few), "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target) and target.stat().st_size > 5000


def test_plot_without_runs_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no runs at"):
        plot_main([])
