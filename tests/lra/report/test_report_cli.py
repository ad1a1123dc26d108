"""`lra table` and `lra plot`: what they write, and what they refuse with one message."""

from pathlib import Path

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


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("t.md", "###"),
        ("t.csv", "kind,task"),
        ("t.txt", "ListOps"),
        ("t.tex", "% \\usepackage{booktabs}"),
        ("t.html", "<!DOCTYPE html>"),
    ],
)
def test_output_suffix_decides_the_format(few, tmp_path, capsys, name, start):
    assert table_main([str(few), "-o", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / name}\n"
    assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--format", "htlm"],
            "unknown table format 'htlm'; did you mean 'html'.*csv, html, latex, md, text",
        ),
        (["-o", "t.pdf"], r"'t.pdf': no table format has the suffix '.pdf'.*\.md.*--format text, md, csv"),
        (["--by", "mechanism"], "unknown way to arrange tables 'mechanism'.*length, task"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-o", "no/such/folder/t.md"], "cannot write.*existing folder"),
        (["--by"], "expected one argument; lra table --help"),
        (["nowhere"], "no runs at 'nowhere'.*lra train"),
        (["empty"], "no records under .*'empty'.*lra train"),
        (["other.jsonl"], "no records in 'other.jsonl': its first line"),
        (["broken.jsonl"], "broken record in 'broken.jsonl', line 2: .*mend or delete that line"),
        (["binary.jsonl"], "cannot read 'binary.jsonl'"),
    ],
)
def test_bad_arguments_are_user_errors(few, monkeypatch, arguments, message):
    monkeypatch.chdir(few.parent)
    Path("empty").mkdir()
    Path("other.jsonl").write_text('{"model": "linear"}\n')
    record = (next(few.glob("*linear*")) / "record.json").read_text().replace("\n", " ")
    Path("broken.jsonl").write_text(f"{record}\n{record[:100]}\n")
    Path("binary.jsonl").write_bytes(b"\xff\xfe\x00")
    runs = [] if arguments == ["empty"] else [str(few)]
    with pytest.raises(UserError, match=message):
        table_main([*runs, *arguments])


def test_a_file_that_may_not_be_read_is_a_user_error(few, monkeypatch):
    file = few / "some.jsonl"
    file.write_text("{}\n")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match="cannot read '.*some.jsonl'.*Permission denied"):
        table_main([str(file)])


def test_a_format_by_name_goes_into_any_file(few, tmp_path):
    assert table_main([str(few), "--format", "csv", "-o", str(tmp_path / "t.dat")]) == 0
    assert (tmp_path / "t.dat").read_text().startswith("kind,task")


def test_pairs_are_printed_on_request(few, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    write_run(few, "softmax", 0, 0.4)
    assert table_main([str(few), "--pairs"]) == 0
    out = capsys.readouterr().out
    assert "\nPairs of rows   ListOps (2,000" in out and max(map(len, out.splitlines())) <= 100


def test_plot_writes_and_names_its_file(few, tmp_path, capsys):
    target = tmp_path / "figure.png"
    assert plot_main([str(few), "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target) and target.stat().st_size > 5000


def test_plot_without_runs_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no runs at"):
        plot_main([])


def test_plot_takes_the_kind_first_and_a_file_of_that_name_is_no_kind(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plot_main(["heat", str(few)]) == 0
    assert capsys.readouterr().out.strip() == "heat.png" and (tmp_path / "heat.png").is_file()
    few.rename(tmp_path / "heat")
    assert plot_main(["heat"]) == 0
    assert capsys.readouterr().out.strip() == "accuracy_speed.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["costs"],
            "unknown figure 'costs'; did you mean 'cost'.*available: cost, curves, heat, lengths, speed",
        ),
        (["nowhere"], "unknown figure 'nowhere'.*no file or folder has this name"),
        (["cost", "no/where"], "no runs at 'no/where'"),
        (["no/where"], "no runs at 'no/where'"),
        (["runs", "--models", "linear"], "figure 'speed' has none.*cost, curves, lengths"),
        (["lengths", "runs", "--models", "linaer"], "'linaer'; did you mean 'linear'"),
        (["cost", "runs"], "measured at two lengths or more.*lra measure"),
        (["curves", "runs"], "1 run without 'metrics.jsonl'.*name the folders of the runs"),
        (["lengths", "runs"], "no accuracy by length"),
    ],
)
def test_plot_says_what_is_wrong_and_what_to_do(few, monkeypatch, arguments, message):
    monkeypatch.chdir(few.parent)
    with pytest.raises(UserError, match=message):
        plot_main(arguments)
