"""What the record of a measured cell holds, and the search for the largest length that fits."""

import pytest
import torch
from measure_samples import OUT_OF_MEMORY, SMALL, made_up

from lra import measure, measuring, measuring_rates, records
from lra.cli import main
from lra.measure import cells
from lra.measuring_largest import largest_that_fits, on_grid


@pytest.fixture
def quick(monkeypatch):
    """Three calls a cell, and rates of two calls, in place of a second each."""
    monkeypatch.setattr(measuring, "MIN_CALLS", 3)
    monkeypatch.setattr(measuring, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(measuring_rates, "SECONDS", 0.0)
    monkeypatch.setattr(measuring_rates, "SIDE", {"cpu": 64})
    monkeypatch.setattr(measuring_rates, "COPY_BYTES", {"cpu": 2**16})
    measuring_rates.rates.cache_clear()
    yield
    measuring_rates.rates.cache_clear()


# What a record holds.


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_peak_memory_is_the_sum_of_its_parts_and_data_are_apart(mode, quick):
    (record,) = measure.measure(["model=linear", "length=64", "batch_size=4", f"mode={mode}", *SMALL])
    parts = record.extra["memory_mib"]
    assert parts["weights"] + parts["optimizer"] + parts["activations"] == pytest.approx(record.peak_mem_mib)
    state = 3 * parts["weights"] if mode == "train" else 0  # gradients and two moments; nothing is a buffer
    assert parts["optimizer"] == pytest.approx(state, rel=1e-3)
    assert parts["data"] == 4 * 64 / 2**20, "a byte a token"
    assert parts["activations"] > 0


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_on_a_gpu_data_and_optimizer_state_that_inference_has_no_use_for_are_set_aside(mode, monkeypatch):
    (cell,) = cells(["model=linear", "length=64", "batch_size=4", f"mode={mode}", *SMALL])
    bench = measuring._bench(cell)
    allocated = 50.0  # MiB at the peak, everything included
    monkeypatch.setattr(
        measuring.cost, "cuda_peak_mib", lambda device, aside, step: allocated - aside / measuring.cost.MIB
    )
    peak, _, parts = measuring._memory(bench, mode, torch.device("cuda"))
    state = measuring.cost.optimizer_bytes(bench.step) / measuring.cost.MIB
    assert peak + parts["data"] + (0 if mode == "train" else state) == pytest.approx(allocated)
    assert parts["weights"] + parts["optimizer"] + parts["activations"] == pytest.approx(peak)


def test_a_forward_pass_has_flops_and_a_training_step_about_three_times_as_many(quick):
    both = ["length=64", "batch_size=4", "mode=train,infer", *SMALL]
    train, infer = measure.measure(["model=linear", *both])
    assert 2.5 < train.flops_per_step / infer.flops_per_step <= 3.0


def test_shares_are_those_of_rates_measured_in_the_same_process(quick):
    (record,) = measure.measure(["model=linear", "length=64", "batch_size=4", *SMALL])
    extra, seconds = record.extra, record.step_ms / 1e3
    assert extra["copy_bytes_per_s"] > 1e6 and extra["matrix_flops_per_s"] > 1e6
    assert extra["matrix_share"] == pytest.approx(
        record.flops_per_step / seconds / extra["matrix_flops_per_s"]
    )
    moved = extra["moved_bytes_at_least"]
    assert moved == pytest.approx(2 * record.peak_mem_mib * 2**20, rel=1e-3)
    assert extra["copy_share_at_least"] == pytest.approx(moved / seconds / extra["copy_bytes_per_s"])
    assert measuring_rates.rates(torch.device("cpu"), "fp32") is measuring_rates.rates(
        torch.device("cpu"), "fp32"
    )


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_bytes_that_must_move_leave_out_buffers_and_read_factors_once(mode):
    """S4D learns part of its weights at another rate; a fixed position table is a buffer that need not be
    read.
    """
    (cell,) = cells(["model=s4d", "model.positions=sinusoidal", "length=64", "batch_size=4", *SMALL])
    step = measuring._bench(cell).step
    optimizer, buffers = step.optimizer, sum(x.nbytes for x in step.model.buffers())
    assert optimizer.lr_scale is not None and optimizer.decay is not None and buffers
    size = optimizer.weights.nbytes  # with what aligns them, so that the weights alone are a little less
    least = 2 * 4 * size + size  # weights, gradients, two moments; lr_scale
    if mode == "infer":
        least = sum(p.nbytes for p in step.model.parameters())
        assert least <= size
    assert measuring.cost.moved_bytes_at_least(step, mode, 100.0) == least + 2 * 100.0


def test_quartiles_are_those_of_the_calls(quick, monkeypatch):
    monkeypatch.setattr(measuring, "_time", lambda call, device: [1.0, 2.0, 3.0, 4.0, 5.0])
    (record,) = measure.measure(["model=linear", "length=64", "batch_size=4", *SMALL])
    assert (record.step_ms, record.extra["step_ms_quartiles"]) == (3000.0, [2000.0, 4000.0])


def test_a_copy_reads_and_writes_and_a_product_multiplies_and_adds(quick, monkeypatch):
    monkeypatch.setattr(measuring_rates, "_seconds", lambda call, device: 1.0)
    found = measuring_rates.rates(torch.device("cpu"), "fp32")
    assert (found.copy_bytes_per_s, found.matrix_flops_per_s) == (2 * 2**16, 2 * 64**3)


def test_another_version_of_torch_measures_anew_and_train_settings_are_of_the_setting(monkeypatch):
    (cell,) = cells(["model=linear", "length=64", *SMALL])
    here = measuring._describe(cell)
    (other,) = cells(["model=linear", "length=64", "train.compile=true", *SMALL])
    assert measuring._describe(other).extra["setting"] != here.extra["setting"]
    monkeypatch.setattr(measuring.torch, "__version__", "99.0")
    assert measuring._describe(cell).config_hash != here.config_hash


def test_a_cpu_has_no_tf32():
    precisions = {}
    for precision in ("tf32", "fp32", "bf16"):
        (cell,) = cells(["model=linear", "length=64", f"train.precision={precision}", *SMALL])
        precisions[precision] = measuring._describe(cell).precision
    assert precisions == {"tf32": "fp32", "fp32": "fp32", "bf16": "bf16"}


def test_operations_that_do_not_fit_in_memory_are_not_counted_and_the_cell_goes_on(quick, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(measuring.cost.Trial, "flops", no_room)
    (record,) = measure.measure(["model=linear", "length=64", "batch_size=4", *SMALL])
    assert (record.status, record.flops_per_step, record.extra["matrix_share"]) == ("ok", None, None)


# The largest length that fits.


@pytest.mark.parametrize("limit", [16, 100, 1024, 3000, 5000, 50_000])
@pytest.mark.parametrize("low", [0, 16])
def test_the_search_ends_between_two_neighbours_of_the_grid(limit, low):
    tried = []

    def fits(length):
        tried.append(length)
        return length <= limit

    largest, shortest = largest_that_fits(fits, low, 65536, seconds=60)
    assert largest == on_grid(limit) and largest <= limit < shortest <= 1.125 * largest + 2
    assert len(tried) <= 14 and len(set(tried)) == len(tried)


def test_the_search_says_nothing_fits_and_keeps_to_its_time():
    assert largest_that_fits(lambda length: False, 0, 4096, seconds=60) == (None, 16)
    assert largest_that_fits(lambda length: pytest.fail("tried"), 1024, 4096, seconds=0) == (1024, 4096)


def test_out_of_memory_on_a_gpu_starts_the_search_between_what_is_known(monkeypatch):
    (cell,) = cells(["model=linear", "length=4096", "tokens=8192", *SMALL])
    tried = []

    def fits(other):
        tried.append((other.config.length, other.config.batch_size))
        return other.config.length <= 2000

    monkeypatch.setattr(measuring, "_fits", fits)
    monkeypatch.setattr(measuring.environment, "pick_device", lambda name: torch.device("cuda"))
    found = measuring._largest(cell, {512: "ok", 1024: "ok", 8192: "oom"}, 60.0)
    assert found == {"largest_length": 1920, "shortest_oom_length": 2048}
    assert all(1024 < length < 4096 and rows == 8192 // length for length, rows in tried)


def test_out_of_memory_on_a_cpu_tells_the_largest_length_measured(monkeypatch, capsys):
    def outcome(cell):
        if cell.config.length > 128:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return {}

    made_up(monkeypatch, outcome)
    assert main(["measure", "model=linear", "length=64,128,256", "batch_size=2", *SMALL]) == 1
    assert "(length 128 fits)" in capsys.readouterr().err
    (found,) = [
        r for r in map(records.read, (records.runs_root() / "measure").iterdir()) if r.status == "oom"
    ]
    assert found.extra["largest_length"] == 128


def test_a_trial_that_runs_out_of_memory_does_not_fit(quick, monkeypatch):
    (cell,) = cells(["model=linear", "length=64", "batch_size=2", *SMALL])
    assert measuring._fits(cell)

    def no_room(*_, **__):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(measuring.Step, "train", no_room)
    assert not measuring._fits(cell)
