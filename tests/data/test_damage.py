"""Damaged stores, places without permission, and tasks that fail beside others end in one message each."""

import json
import os
import re

import numpy as np
import pytest
from synthetic_tasks import Pixels, Synthetic
from test_writer import LongPixels, interrupted

from lra import cli as program
from lra.data import cli
from lra.data import prepare as module
from lra.data.export import export
from lra.data.prepare import prepare
from lra.data.store import open_store, store_path
from lra.data.verify import verify
from lra.errors import UserError
from lra.tasks.base import Plan
from lra.tasks.listops import ListOps

SMALL = ["length=32", "task.num_train=50", "task.num_val=10", "task.num_test=10"]
TASK = ListOps(num_train=50, num_val=10, num_test=10)


def change(path, place, value):
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)


@pytest.mark.parametrize("key", ["sha256", "size"])
def test_a_manifest_that_lacks_a_part_of_an_entry_is_a_finding(key, run):
    path = prepare(Synthetic(), 50).path / "manifest.json"
    path.write_text(path.read_text().replace(f'"{key}"', '"other"', 1))
    (finding,) = verify(Synthetic(), 50)
    assert not finding.ok and "is damaged; build it again" in finding.detail
    with pytest.raises(UserError, match="is damaged"):
        open_store(Synthetic(), 50)


@pytest.mark.parametrize(
    "key, value", [("splits", []), ("vocab_size", "20"), ("vocabulary", [1]), ("files", [])]
)
def test_a_manifest_of_other_types_is_refused(key, value):
    path = prepare(Synthetic(), 50).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match="is damaged"):
        open_store(Synthetic(), 50)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("train.offsets.bin", 43, 1, "train is damaged"),
        ("train.offsets.bin", 0, 8, "train is damaged .offsets run from 8"),
        ("train.labels.bin", 3, 77, "train is damaged .label 77 of 10 classes"),
        ("train.tokens.bin", 3, 200, "train has the id 200, the vocabulary has 16 symbols"),
    ],
)
@pytest.mark.parametrize("command", ["show", "stats"])
def test_damaged_rows_are_a_message_and_never_reach_compiled_code(command, name, place, value, message, run):
    run("prepare", "listops", *SMALL)
    change(open_store(TASK, 32).path / name, place, value)
    status, _, err = run(command, "listops", *SMALL)
    assert status == 2 and err.count("\n") == 1 and re.search(message, err), err


def test_a_killed_build_is_continued_on_a_disk_that_just_holds_it(monkeypatch):
    partial = interrupted(LongPixels, monkeypatch, 37)
    held = sum(file.stat().st_size for file in partial.glob("*"))
    plan = Plan("made here", 90, held / 2**20, 1)
    monkeypatch.setattr(LongPixels, "plan", lambda self, length: plan, raising=False)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: _Full)
    prepare(LongPixels(), 40)
    assert LongPixels.drawn == list(range(30, 90))


class _Full:
    free = 0


def test_the_old_data_survive_a_kill_between_the_two_renames():
    path = prepare(Synthetic(), 50).path
    before = open_store(Synthetic(), 50).data_hash
    path.rename(path.with_name(f".{path.name}.replaced"))

    class Failing(Synthetic):
        def build(self, writer, **rest):
            raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        prepare(Failing(), 50)
    assert open_store(Synthetic(), 50).data_hash == before


def test_with_all_what_is_missing_does_not_stop_the_rest(run, root):
    run("prepare", "listops", *SMALL[1:])
    run("prepare", "pathfinder32", "task.num_images=20")
    for command in ("verify", "show", "stats"):
        status, out, err = run(command, "all", *SMALL[1:], "task.num_images=20")
        assert status == 1 and "listops-2000" in out and "pathfinder32-hard" in out
        assert [line.split(":")[1].strip() for line in err.splitlines()] == [
            "text",
            "retrieval",
            "image",
            "pathx",
        ]
        report = json.loads(run(command, "all", *SMALL[1:], "task.num_images=20", "--json")[1])
        assert sum("error" in entry for entry in report) == 4 and len(report) == 6


def test_with_all_a_setting_that_a_task_refuses_stops_that_task_only(run, root):
    for name in ("imdb", "cifar10"):
        (root / "sources" / name).mkdir(parents=True)
    status, _, err = run("prepare", "all", "task.val=test")
    assert status == 1 and len(err.splitlines()) == 6
    assert "listops has a validation split of its own" in err and "holds no IMDb" in err


def test_one_of_several_variants_that_fails_does_not_hide_the_others(run, root):
    (root / "sources" / "imdb").mkdir(parents=True)
    lines = [f"{'great' if i % 2 else 'dull'} film {i},{i % 2}" for i in range(40)]
    for part in ("train", "test"):
        (root / "sources" / "imdb" / f"{part}.csv").write_text("\n".join(["text,label", *lines]))
    status, out, err = run("prepare", "text", "task.unit=char", "task.min_freq=9,99999")
    assert status == 1 and "imdb-chars-4000 (min_freq=9)" in out and "no character occurs 99999 times" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_a_message(run, root):
    run("prepare", "pathfinder32", "task.num_images=20")
    root.chmod(0o555)
    status, _, err = run("show", "pathfinder32", "task.num_images=20")
    root.chmod(0o755)
    assert status == 2 and "name a place with --out FILE" in err


def test_errors_of_the_system_are_one_line(run, monkeypatch):
    def refuse(*args, **rest):
        raise PermissionError(13, "Permission denied", "/some/place")

    monkeypatch.setattr(cli, "prepare", refuse)
    status, _, err = run("prepare", "listops", *SMALL)
    assert status == 2
    assert (
        err
        == "lra: /some/place: Permission denied; check that the place is right and can be read and written\n"
    )


def test_pictures_that_have_no_folder_to_go_to_ask_for_another(run, root):
    run("prepare", "listops", *SMALL)
    (root / "pictures").write_text("in the way")
    status, out, err = run("stats", "listops", *SMALL)
    assert status == 2 and "[train]" in out and "name a place with --out FILE" in err


def test_an_export_of_several_parts_holds_every_row(tmp_path, monkeypatch):
    store = prepare(Pixels(rows=50), 64)
    monkeypatch.setattr("lra.data.store.CHUNK_BYTES", 700)
    for limit in (None, 23):
        rows = export(store, "val", tmp_path / "rows.npz", limit)
        with np.load(tmp_path / "rows.npz", allow_pickle=False) as file:
            split = store.split("val")
            assert rows == len(file["labels"]) == (limit or 50)
            assert file["tokens"].tolist() == split.tokens[: split.offsets[rows]].tolist()
            assert file["offsets"].tolist() == split.offsets[: rows + 1].tolist()


def test_a_stopped_data_command_promises_nothing_that_is_not_kept(monkeypatch, capsys):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_run", stop)
    assert program.main(["data", "prepare", "listops"]) == 130
    assert capsys.readouterr().err == "lra: interrupted\n"
    assert store_path(TASK, 32).exists() is False
