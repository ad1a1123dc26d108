"""The command of one run out of the one that made a sweep: it must compose to just that run."""

import pytest

from lra.config import compose
from lra.records import Record
from lra.report.page_command import _fits, repeat


def run(command: str | None, kind: str = "train", **fields) -> dict:
    known = dict(task="listops", model="linear", length=64, seed=1, batch_size=32, run_id="r", status="ok")
    return Record(kind=kind, command=command, **(known | fields)).to_dict() | {"path": "nowhere"}


@pytest.mark.parametrize(
    ("command", "fields", "expected"),
    [
        (
            "lra train -m task=listops length=32,64 model=softmax,linear train=quick seed=0,1 --force",
            {},
            "lra train task=listops length=64 model=linear train=quick seed=1",
        ),
        ("lra train task=listops model=linear", {}, "lra train task=listops model=linear"),
        (
            "lra train -m task=listops model=nystrom model.num_landmarks=16,32 seed=range(3)",
            {"model": "nystrom", "extra": {"own": {"num_landmarks": 16}}},
            "lra train task=listops model=nystrom model.num_landmarks=16 seed=1",
        ),
        (
            "lra train 'model.head_widths=[8,8]' model=linear task=listops",
            {},
            "lra train 'model.head_widths=[8,8]' model=linear task=listops",
        ),
        (
            "lra train -m task=listops model=linear seed=1,2",
            {"num_devices": 2},
            "torchrun --nproc-per-node 2 -m lra train task=listops model=linear seed=1",
        ),
        (
            "lra train -m task=listops model=linear paper=none,nystromformer2021",
            {},
            "lra train task=listops model=linear paper=none",
        ),
        (
            "lra train -m task=listops model=linear paper=none,nystromformer2021",
            {"paper": "nystromformer2021"},
            "lra train task=listops model=linear paper=nystromformer2021",
        ),
    ],
)
def test_a_training_run_is_singled_out(command, fields, expected):
    assert repeat(run(command, **fields)) == (expected, "")


@pytest.mark.parametrize(
    ("own", "kernel"), [({}, "fused"), ({"kernel": "math"}, "math")], ids=["default", "own"]
)
def test_a_measured_cell_is_singled_out_by_defaults_that_records_leave_out(own, kernel):
    command = "lra measure model=softmax model.kernel=math,fused length=64,128 mode=train,infer --shard 1/2"
    cell = run(command, "measure", model="softmax", extra={"mode": "infer", "own": own})
    expected = f"lra measure model=softmax model.kernel={kernel} length=64 mode=infer"
    assert repeat(cell) == (expected, "")


def test_what_was_left_to_defaults_of_the_measuring_verb_is_said():
    cell = run("lra measure model=all tokens=4096", "measure", length=1024, extra={"mode": "train"})
    assert repeat(cell) == ("lra measure model=linear tokens=4096 length=1024 mode=train", "")


def test_a_cell_of_a_preset_is_spelt_out():
    explicit = run(
        "lra measure preset=lengths --time-limit 540",
        "measure",
        task="text", model="softmax", length=4096, extra={"mode": "infer", "own": {"kernel": "math"}},
    )  # fmt: skip
    command, note = repeat(explicit)
    assert note == "" and "preset" not in command
    given = dict(word.split("=", 1) for word in command.split()[2:])
    assert given.pop("mode") == "infer" and given.pop("tokens") == "131072"
    composed = compose([f"{key}={value}" for key, value in given.items()], any_length=True)
    assert (composed.model.name, composed.model.own["kernel"], composed.length) == ("softmax", "math", 4096)


def test_the_config_tells_apart_what_the_record_does_not():
    command = "lra train -m task=listops model=linear train.lr=0.1,0.001 seed=1"
    assert repeat(run(command), "train:\n  lr: 0.001\n")[0].split()[-2] == "train.lr=0.001"
    vast = "lra train -m task=listops model=linear train.lr=0.1,1e30"
    assert repeat(run(vast), "train:\n  lr: 1.0e+30\n")[0].endswith("train.lr=1e+30")
    assert repeat(run(command), "train: [broken")[0] == command


@pytest.mark.parametrize(
    "command",
    [
        "lra train -m task=listops model=linear train.lr=0.1,0.2",
        "lra train -m task=listops model=softmax,local",
        "lra search task=listops model.candidates=[identity,softmax]",
        "lra train 'unclosed",
        "lra train -m seed=range( model=linear",
    ],
)
def test_what_cannot_be_told_is_given_whole_and_says_so(command):
    whole, note = repeat(run(command))
    assert whole == command and "other" in note


def test_no_command_is_made_up():
    assert repeat(run(None)) == repeat(run("lra")) == ("", "")


def test_a_key_that_the_record_does_not_tell_speaks_against_no_run():
    assert _fits({"tokens": "1024"}, {"model": "linear"}, {"tokens"})
    assert not _fits({"tokens": "1024", "seed": "1"}, {"model": "linear", "seed": 2}, {"tokens", "seed"})
