"""A record says whose kernels ran a recurrence, and counts no operations that it could not see."""

import logging

import pytest

from lra import environment, measure, records, run
from lra.config import compose
from models import fla_kernels, scan


@pytest.fixture
def fla(monkeypatch):
    """fla-core as if it ran on the CPU."""

    def decayed_attention(q, k, v, log_decay, *, scale=1.0):
        return scan.decayed_attention(q * scale, k, v, log_decay)

    monkeypatch.setattr(fla_kernels, "unavailable", lambda device: "")
    monkeypatch.setattr(fla_kernels, "decayed_attention", decayed_attention)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_record_says_that_fla_ran(tiny, fla, caplog, precision):
    caplog.set_level(logging.INFO, "lra")
    ran = precision == "bf16"
    for _ in range(1 + ran):  # the second run of a process says it too
        padded = ["train.layout=padded", "train.num_steps=2"]  # packed rows are torch's to compute
        config = compose(tiny("model=gla", f"train.precision={precision}", *padded))
        record = run.execute(config, force=True)
    assert record.status == "ok"
    assert record.extra.get("recurrence_kernel") == (fla_kernels.package() if ran else None)
    assert (record.flops_per_step is None) == ran
    log = (records.runs_root() / record.run_id / "log.txt").read_text()
    said = f"recurrences on cpu: {'the kernels of fla-core' if ran else 'torch, because it needs bfloat16'}"
    assert log.count(said) > ran


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_measurement_says_that_fla_ran(fla, precision):
    small = ["length=16", "batch_size=1", "model.d_model=16", "model.num_layers=1", "mode=infer"]
    (record,) = measure.measure([*small, "model=gla", f"train.precision={precision}"])
    assert record.status == "ok"
    expected = fla_kernels.package() if precision == "bf16" else None
    assert record.extra.get("recurrence_kernel") == expected


def test_versions_name_the_optional_kernels_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda package: f"{package} 1")
    found = environment.versions.__wrapped__()
    assert found["triton"] == "triton 1" and found["fla-core"] == "fla-core 1"
