"""`lra data`: what each command prints and writes, its exit status, and its messages."""

import json

import numpy as np
import pytest
from PIL import Image

from lra.data import cli
from lra.data.selection import resolve
from lra.data.store import open_store
from lra.errors import UserError
from lra.tasks.base import Plan
from lra.tasks.listops import ListOps, evaluate
from lra.tasks.text import Text

SMALL = ["task.num_train=50", "task.num_val=10", "task.num_test=10"]
LISTOPS = ["listops", "length=32", *SMALL]
PATHFINDERS = ("pathfinder32-hard", "pathfinder128-hard")
TASK = ListOps(num_train=50, num_val=10, num_test=10)


@pytest.fixture
def reviews(root):
    place = root / "sources" / "imdb"
    place.mkdir(parents=True)
    lines = [f"{'great' if i % 2 else 'dull'} film {i},{i % 2}" for i in range(40)]
    for part in ("train", "test"):
        (place / f"{part}.csv").write_text("\n".join(["text,label", *(f"{part} {line}" for line in lines)]))


@pytest.fixture
def papers(root):
    place = root / "sources" / "aan"
    (place / "texts").mkdir(parents=True)
    for name in ("A1", "B2"):
        (place / "texts" / f"{name}.txt").write_text(f"paper {name}")
    rows = [f"{split}\t{label}\tA1\tB2" for split in ("train", "eval", "test") for label in (0, 1)]
    (place / "pairs.tsv").write_text("\n".join(["split\tlabel\tid1\tid2", *rows, ""]))


@pytest.fixture
def photographs(root):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(10):
            folder = root / "sources" / "cifar10" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def test_prepare_prints_its_plan_and_what_it_made(run):
    status, out, err = run("prepare", *LISTOPS)
    plan, _, made = out.partition("\n\n")
    assert status == 0 and err == ""
    assert "listops-32 (scaled, not the LRA setting" in plan and "generated here" in plan and "70" in plan
    store = open_store(TASK, 32)
    assert store.data_hash in made and "regenerated" in made and str(store.path) in made


def test_a_list_of_lengths_prepares_each(run):
    status, out, _ = run("prepare", "listops", "length=32,64", *SMALL, "--json")
    made = json.loads(out)
    assert status == 0 and [entry["length"] for entry in made] == [32, 64]
    assert all((entry["train"], entry["val"], entry["test"]) == (50, 10, 10) for entry in made)


def test_what_is_there_is_said_to_be_there_and_force_builds_it_again(run):
    run("prepare", *LISTOPS)
    made = open_store(TASK, 32).path / "manifest.json"
    written = made.stat().st_mtime_ns
    assert "already there" in run("prepare", *LISTOPS)[1] and made.stat().st_mtime_ns == written
    assert "already there" not in run("prepare", *LISTOPS, "--force", "--workers", "1")[1]
    assert made.stat().st_mtime_ns > written


def test_overrides_and_flags_mix_in_any_order(run):
    assert run("prepare", "--json", "listops", SMALL[0], "--workers", "1", "length=32", *SMALL[1:])[0] == 0
    assert len(open_store(TASK, 32).split("train")) == 50


def test_prepare_all_does_the_six_tasks_of_the_benchmark(run, reviews, papers, photographs):
    status, out, err = run("prepare", "all", *SMALL, "task.num_images=20")
    assert status == 0 and "lra:" not in err  # progress may be, while code is compiled
    plan, _, made = out.partition("\n\n")
    for name in ("listops-2000", "imdb-bytes", "aan-bytes", "cifar10-gray", *PATHFINDERS):
        assert name in plan and name in made
    assert plan.splitlines()[-1].startswith("in all") and "pathfinder64" not in out
    assert run("verify", "pathfinder32", "task.num_images=20")[0] == 0
    again = run("prepare", "all", *SMALL, "task.num_images=20")[1]
    assert again.count("already there") == 6


def test_prepare_all_does_what_it_can_and_names_what_is_missing(run, root, photographs):
    (root / "sources" / "imdb").mkdir(parents=True)
    status, out, err = run("prepare", "all", *SMALL, "task.num_images=20")
    assert status == 1
    assert all(name in out for name in ("listops-2000", "cifar10-gray", *PATHFINDERS))
    text, retrieval = (line for line in err.splitlines() if line.startswith("lra:"))
    assert text.startswith("lra: text: ") and "imdb_train.parquet" in text and "task.source=DIR" in text
    assert retrieval.startswith("lra: retrieval: ") and "new_aan_pairs.train.tsv" in retrieval
    assert str(root / "sources" / "aan") in retrieval


def test_a_task_that_cannot_be_prepared_is_one_message_and_status_2(run, root):
    (root / "sources" / "imdb").mkdir(parents=True)
    status, _, err = run("prepare", "text")
    assert status == 2 and err.count("\n") == 1 and "holds no IMDb" in err


def test_verify_prints_every_check(run):
    run("prepare", *LISTOPS)
    status, out, err = run("verify", *LISTOPS)
    assert status == 0 and "40 checks, 0 faults" in out and "FAULT" not in out and err == ""


def test_verify_ends_with_status_2_and_the_remedy_where_there_is_a_fault(run):
    run("prepare", *LISTOPS)
    path = open_store(TASK, 32).path / "val.tokens.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    status, out, err = run("verify", *LISTOPS)
    assert status == 2 and "FAULT  file val.tokens.bin" in out
    assert "lra data prepare listops length=32 task.num_train=50" in err and "--force" in err
    findings = json.loads(run("verify", *LISTOPS, "--json")[1])[0]["findings"]
    assert {"what": "file val.tokens.bin", "ok": False}.items() <= next(
        f for f in findings if not f["ok"]
    ).items()


def test_show_prints_expressions_with_their_values(run):
    run("prepare", *LISTOPS)
    status, out, _ = run("show", *LISTOPS, "--split", "val", "--limit", "2")
    split = open_store(TASK, 32).split("val")
    assert status == 0 and out.count("label") == 2
    assert f"val 0   label {split.labels[0]}   length {split.lengths[0]}" in out
    first = out.split("\n\n")[1].splitlines()[1]
    assert first.endswith(f"]={split.labels[0]}")
    assert evaluate([symbol.split("=")[0] for symbol in first.split()]) == split.labels[0]


def test_show_prints_reviews(run, reviews):
    run("prepare", "text")
    status, out, _ = run("show", "text", "--split", "test", "--limit", "1", "--json")
    (shown,) = json.loads(out)
    assert status == 0 and shown["examples"] == [
        {
            "split": "test",
            "row": 0,
            "label": 0,
            "class": "negative",
            "lengths": [16],
            "documents": ["test dull film 0"],
        }
    ]


def test_show_prints_both_papers_of_a_pair(run, papers):
    run("prepare", "retrieval")
    _, out, _ = run("show", "retrieval", "--limit", "1")
    assert (
        "train 0   label 0 (unrelated)   length 11 and 11" in out
        and "b'paper A1'" in out
        and "b'paper B2'" in out
    )


def test_show_draws_images_and_says_where(run, root, photographs, tmp_path):
    run("prepare", "image")
    status, out, _ = run("show", "image", "--split", "test", "--limit", "1")
    (picture,) = (root / "pictures").glob("cifar10-gray-*-test.png")
    assert status == 0 and f"pictures: {picture}" in out and Image.open(picture).size[1] > 1000
    chosen = str(tmp_path / "mine.png")
    assert json.loads(run("show", "image", "--out", chosen, "--json")[1])[0]["picture"] == chosen
    assert Image.open(chosen).size[1] > 1000


def test_solve_says_how_many_images_a_network_gets_right(run):
    small = ["pathfinder32", "task.num_images=400"]
    run("prepare", *small)
    status, out, err = run("solve", *small, "--epochs", "1", "--width", "4", "--limit", "256")
    assert status == 0 and " % of 40 test images" in out and "256 images, 1.0 epochs" in out
    assert "epoch 1 of 1: mean loss" in err
    (result,) = json.loads(run("solve", *small, "--epochs", "1", "--width", "4", "--shuffled", "--json")[1])
    assert result["shuffled_labels"] and result["train_images"] == 320 and 0 <= result["test_accuracy"] <= 1


def test_stats_count_lengths_labels_and_symbols(run):
    run("prepare", *LISTOPS)
    status, out, _ = run("stats", *LISTOPS, "--json")
    (counted,) = json.loads(out)
    split = open_store(TASK, 32).split("train")
    train = counted["splits"]["train"]
    assert status == 0 and set(counted["splits"]) == {"train", "val", "test"}
    assert train["rows"] == 50 and train["length"]["max"] == split.lengths.max()
    assert train["labels"]["3"] == (split.labels == 3).mean()
    assert sum(train["symbols"].values()) == pytest.approx(1) and "<pad>" not in train["symbols"]
    assert train["symbols"]["]"] == pytest.approx((split.tokens == 15).mean())
    assert 0.03 < counted["draws accepted"] < 0.06
    assert Image.open(counted["picture"]).size[0] > 1000


def test_stats_for_people_name_each_quantity(run, reviews):
    run("prepare", *LISTOPS), run("prepare", "text")
    out = run("stats", *LISTOPS, "--split", "train")[1]
    for part in (
        "[train]",
        "rows: 50",
        "majority:",
        "length: mean",
        "root arguments:",
        "wrong labels: 0",
        "draws accepted",
    ):
        assert part in out
    run("prepare", "pathfinder32", "task.num_images=20")
    assert "length: 1,024 in every document\n" in run("stats", "pathfinder32", "task.num_images=20")[1]
    out = run("stats", "text")[1]
    assert "[val]" in out and "in all)" in out and "draws" not in out


def test_export_writes_what_the_store_holds(run, tmp_path):
    run("prepare", *LISTOPS)
    status, out, _ = run("export", *LISTOPS, "--split", "test", "--out", str(tmp_path / "rows.npz"))
    split = open_store(TASK, 32).split("test")
    assert status == 0 and "10 rows of test" in out
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["labels", "offsets", "tokens", "vocab"]
        assert file["vocab"].tolist() == open_store(TASK, 32).vocab
        for name in ("tokens", "offsets", "labels"):
            np.testing.assert_array_equal(file[name], getattr(split, name))


def test_export_of_the_first_rows_cuts_tokens_offsets_and_labels(run, tmp_path):
    run("prepare", *LISTOPS)
    run("export", *LISTOPS, "--limit", "3", "--out", str(tmp_path / "rows.npz"))
    split = open_store(TASK, 32).split("train")
    with np.load(tmp_path / "rows.npz") as file:
        assert len(file["labels"]) == 3 and len(file["offsets"]) == 4
        assert file["tokens"].tolist() == np.concatenate([split.row(i)[0] for i in range(3)]).tolist()
    assert list(tmp_path.glob(".rows*")) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepar", "listops"], "did you mean 'prepare'"),
        (["prepare", "listop"], "did you mean 'listops'"),
        (["prepare"], "required: task"),
        (["prepare", "listops", "task.num_trian=3"], "did you mean 'task.num_train'"),
        (["prepare", "listops", "model=linear"], "unknown setting 'model'"),
        (["prepare", "listops", "length"], "'length' has no value; write length=VALUE"),
        (["prepare", "listops", "length=ten"], "length=ten is not allowed; give a whole number"),
        (["prepare", "listops", "length=8"], "give one from 32 to 32768"),
        (["prepare", "listops", "task.max_depth=deep"], "task.max_depth"),
        (["prepare", "listops", "task.num_train=0"], "task.num_train=0 is out of range"),
        (["prepare", "text", "task.val=tset"], "did you mean 'test'"),
        (["prepare", "all", "task.num_trian=3"], "did you mean 'task.num_train'"),
        (["prepare", "all", "task.source=here"], "name the task instead of 'all'"),
        (["prepare", "all", "length=64"], "length= is one task's length; name the task instead of 'all'"),
        (["prepare", "text", "task.source=a.csv,b.csv"], "would fill the same folder; name one"),
        (["prepare", "image", "length=2048"], "its 32 x 32 pixels are length=1024"),
        (["prepare", "pathx", "task.level=easy"], "unknown setting 'task.level'"),
        (["prepare", "pathfinder32", "task.level=medium"], "available: easy, hard, intermediate"),
        (["solve", "listops", "--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["solve", "pathfinder32", "--time-limit", "0"], "'0' is not a number of seconds above 0"),
        (["prepare", "listops", "--workers", "0"], "'0' is not a whole number of at least 1"),
        (["verify", "listops", "--force"], "unrecognized arguments: --force"),
        (["show", "listops", "--split", "dev"], "invalid choice: 'dev'"),
        (["verify", "listops"], "run: lra data prepare listops length=2000"),
        (["export", "listops"], "add --out FILE.npz"),
        (["export", "listops", "length=32,64", "--out", "x.npz"], "takes one variant, 2 are named"),
        (["stats", "listops", "length=32,64", "--out", "x.png"], "takes one variant, 2 are named"),
        (["show", "listops", "length=32,64", "--out", "x.png"], "takes one variant, 2 are named"),
    ],
)
def test_a_wrong_command_is_one_message_and_status_2(run, argv, message):
    status, out, err = run(*argv)
    assert status == 2 and out == "" and message in err
    assert err.startswith("lra: ") and err.count("\n") == 1


def test_export_to_a_place_that_is_not_there_is_a_message(run):
    run("prepare", *LISTOPS)
    status, _, err = run("export", *LISTOPS, "--out", "/nowhere/x.npz")
    assert status == 2 and "cannot write /nowhere/x.npz" in err


def test_help_lists_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0 and all(
        name in out for name in ("prepare", "verify", "show", "export", "stats", "solve", "listops", "pathx")
    )
    assert run()[0] == 2


def test_resolve_turns_overrides_into_typed_settings():
    (task, length), (_, other) = resolve(
        "listops", ["length=64,32", "task.max_depth=null", "task.source=null"]
    )
    assert (task, length, other) == (ListOps(), 64, 32)
    assert resolve("text", ["task.val=test"]) == [(Text(val="test"), 4000)]
    with pytest.raises(UserError):
        resolve("text", ["task.padded_length=4096"])


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    with cli._progress("listops-32") as progress:
        for done in range(10):
            progress(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 6 and lines[0].startswith("listops-32: ") and lines[0].endswith(" of 10 rows")


def test_a_plan_is_a_rough_guess_of_what_comes(run):
    plan = TASK.plan(32)
    assert isinstance(plan, Plan) and plan.rows == 70
    big = ListOps().plan(2000)
    assert 90 < big.mib < 130 and big.seconds < 20
