"""The command line as a user meets it: verbs, exit statuses, messages."""

import json

import pytest

from lra import records
from lra.cli import VERBS, main


def test_without_a_verb_the_usage_is_shown_and_the_status_is_2(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main(["--help"]) == 0 and main(["--version"]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) if verb != "data" else _nothing() as stop:
        assert main([verb, "--help"]) == 0
    if stop is not None:
        assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return False


BAD = [
    ["trian"],
    ["train", "task=lisops"],
    ["train", "model=nystom"],
    ["train", "model.depth=3"],
    ["train", "listops"],
    ["train", "--fast"],
    ["train", "seed=0,1"],
    ["measure", "length=many", "tokens=64"],
    ["train", "length=7"],
    ["train", "train.device=cuda:99"],
    ["train", "task=text", "task.source=/no/such/folder"],
    ["measure", "mode=dream"],
    ["measure", "tokens=0"],
    ["measure", "tokens=10", "length=64"],
    ["measure", "mode=train,train", "length=64"],
    ["list", "tasks", "--leaks"],
    ["measure", "tokens=1024", "batch_size=3"],
    ["data", "prepair", "listops"],
    ["data", "prepare", "lisops"],
    ["data", "show", "listops", "length=48"],
    ["data", "export", "listops"],
    ["list", "mechanisms"],
    ["table", "--by", "colour"],
    ["table", "--format", "docx"],
    ["table", "/no/such/runs"],
    ["plot", "/no/such/runs"],
    ["check-model", "nystom"],
    ["check-model", "no.such:Thing"],
]


@pytest.mark.parametrize("argv", BAD, ids=" ".join)
def test_bad_input_exits_2_with_one_message_and_no_traceback(argv, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("lra: ") and "Traceback" not in err and err.count("\n") == 0, err


def test_train_prints_a_table_and_exits_0(tiny, capsys):
    assert main(["train", *tiny()]) == 0
    out = capsys.readouterr().out
    assert "softmax" in out and "majority" in out and "step ms" in out


def test_a_diverged_run_exits_1_and_the_table_says_why(tiny, capsys):
    settings = tiny("train.lr=1e30", "train.schedule=constant", "train.log_every=1")
    assert main(["train", *settings]) == 1
    assert "diverged" in capsys.readouterr().out


def test_a_sweep_then_table_and_plot_from_its_records(tiny, tmp_path, capsys):
    assert main(["train", "-m", *tiny("model=identity,linear", "seed=0,1")]) == 0
    capsys.readouterr()
    assert main(["table", "--format", "csv"]) == 0
    header, *rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 2 and "mechanism" in header
    assert main(["table", "--format", "md", "-o", str(tmp_path / "t.md")]) == 0
    assert (tmp_path / "t.md").read_text().count("|") > 20
    assert main(["plot", "-o", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_config_prints_the_resolved_settings_without_running(tiny, capsys):
    assert main(["train", "--config", *tiny("paper=nystromformer2021", "model=nystrom")]) == 0
    out = capsys.readouterr().out
    assert "num_landmarks: 64" in out and "onecycle" in out
    assert not records.runs_root().exists()


@pytest.mark.parametrize("what", ["models", "tasks", "papers"])
def test_list_gives_names_to_people_and_to_programs(what, capsys):
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["name"] and row["about"] for row in rows)
    assert main(["list", what]) == 0
    assert rows[0]["name"] in capsys.readouterr().out


def test_list_shows_every_trait_exception_with_its_reason(capsys):
    assert main(["list", "models", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert all(reason for reason in row["exceptions"].values()), row


def test_measure_needs_no_data_and_is_read_again_the_second_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "nothing"))
    argv = [
        "measure",
        "model=linear,identity",
        "length=64",
        "batch_size=2",
        "model.d_model=16",
        "mode=train,infer",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "identity" in out and "infer" in out
    made = {path: path.stat().st_mtime_ns for path in (records.runs_root() / "measure").rglob("record.json")}
    assert len(made) == 4 and not (tmp_path / "nothing").exists()
    for record in (records.read(path.parent) for path in made):
        method = record.extra["peak_mem_method"]
        assert ("gradients" in method) == (record.extra["mode"] == "train") != ("forward pass" in method)
    assert main(argv) == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_out_of_memory_is_a_cell_of_the_measure_table(monkeypatch, capsys):
    from lra import measuring

    def fail(cell):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(measuring, "_measure", fail)
    assert main(["measure", "model=identity", "length=64"]) == 1
    assert "oom" in capsys.readouterr().out


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "shapeless.py").write_text(
        "from models import Mixer\n"
        "class Bad(Mixer):\n"
        "    def forward(self, x, mask=None):\n"
        "        return x[..., :1] @ x\n"
        "class Fine(Mixer):\n"
        "    def forward(self, x, mask=None):\n"
        "        return x\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = ["measure", "model=custom", "model.target=shapeless.py:Bad,shapeless.py:Fine", "length=64"]
    assert main([*argv, "batch_size=2", "model.d_model=16"]) == 1
    out = capsys.readouterr().out
    assert "failed" in out and "Fine" in out


def test_flops_count_attention_of_either_kernel_alike(capsys):
    argv = [
        "measure",
        "model=softmax",
        "model.kernel=math,fused",
        "length=64",
        "batch_size=2",
        "model.d_model=16",
    ]
    assert main(argv) == 0
    flops = {r.flops_per_step for r in map(records.read, (records.runs_root() / "measure").iterdir())}
    assert len(flops) == 1
