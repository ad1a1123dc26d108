"""A variant is built once, completely or not at all, whatever happens to the build."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from synthetic_tasks import Synthetic

from lra.data import prepare as module
from lra.data import writer
from lra.data.prepare import prepare
from lra.data.store import open_store, store_path
from lra.errors import UserError

SLOW_BUILD = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {here!r})
from synthetic_tasks import Synthetic
from lra.data.prepare import prepare

@dataclass(frozen=True)
class Slow(Synthetic):
    def build(self, writer, **rest):
        super().build(writer, **rest)
        with open({log!r}, "a") as log:
            log.write("built\\n")
        time.sleep({seconds})

print(prepare(Slow(), 50).data_hash)
"""


@dataclass(frozen=True)
class Failing(Synthetic):
    """Fails in the middle of its build."""

    def build(self, writer, *, length, workers=None, progress=None):
        super().build(writer, length=length)
        raise self.error

    error = RuntimeError("half way")


def start(root, seconds):
    code = SLOW_BUILD.format(here=str(Path(__file__).parent), log=str(root) + ".log", seconds=seconds)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def folders(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_variant_that_is_there_is_not_built_again(monkeypatch):
    first = prepare(Synthetic(), 50)
    monkeypatch.setattr(Synthetic, "build", lambda *_, **__: pytest.fail("built again"))
    assert prepare(Synthetic(), 50).data_hash == first.data_hash


def test_force_replaces_what_is_there_even_if_it_is_damaged(root):
    path = prepare(Synthetic(), 50).path
    (path / "train.tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match="--force"):
        prepare(Synthetic(), 50)
    prepare(Synthetic(), 50, force=True)
    assert len(open_store(Synthetic(), 50).split("train")) == 30
    assert folders(root) == [path.name]


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(root, monkeypatch, error):
    monkeypatch.setattr(Failing, "error", error)
    with pytest.raises(type(error)):
        prepare(Failing(), 50)
    assert folders(root) == []


def test_a_forced_build_that_fails_keeps_what_was_there(root):
    path = prepare(Synthetic(), 50).path
    with pytest.raises(RuntimeError):
        prepare(Failing(), 50, force=True)
    assert folders(root) == [path.name]
    assert len(open_store(Synthetic(), 50).split("train")) == 30


def test_a_killed_build_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(root):
    process = start(root, 60)
    wait_for(Path(str(root) + ".log"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = folders(root)
    assert leftover.startswith(".") and leftover.endswith(".partial")
    with pytest.raises(UserError, match="are not in"):
        open_store(Synthetic(), 50)
    store = prepare(Synthetic(), 50)
    assert folders(root) == [store.path.name]


def test_of_two_processes_one_builds_and_the_other_waits_for_it(root):
    processes = [start(root, 0.5) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] == f"{open_store(Synthetic(), 50).data_hash}\n"
    assert Path(str(root) + ".log").read_text() == "built\n"


def test_a_full_disk_is_a_message_and_leaves_nothing(root, monkeypatch):
    def write(self, numbers):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer._HashedFile, "write", write)
    with pytest.raises(UserError, match="is full; nothing of this data set was kept.*LRA_DATA"):
        prepare(Synthetic(), 50)
    assert folders(root) == []


def test_a_disk_that_is_too_small_is_refused_before_the_build(root, monkeypatch):
    usage = module.shutil.disk_usage(root.parent)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="needs about .* MiB.*LRA_DATA"):
        prepare(Synthetic(), 50)
    assert folders(root) == []


def test_a_root_that_is_no_folder_is_a_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to .*set LRA_DATA"):
        prepare(Synthetic(), 50)


def test_data_of_another_source_are_not_passed_off_as_those_asked_for(tmp_path):
    prepare(Synthetic(), 50)
    with pytest.raises(UserError, match="was made from made here, not from elsewhere.*--force"):
        prepare(Synthetic(source="elsewhere"), 50)


def test_the_final_folder_holds_only_the_files_of_the_manifest(root):
    path = store_path(Synthetic(), 50)
    store = prepare(Synthetic(), 50)
    assert {file.name for file in path.iterdir()} == {"manifest.json", *store.manifest["files"]}
