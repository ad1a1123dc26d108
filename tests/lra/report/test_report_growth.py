"""Growth and crossovers: made-up measurements whose exponents and crossings are known, and simulations."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from cost_samples import NO_SPREAD, write_costs

from lra import records
from lra.report.growth import ALWAYS, CROSSES, NEVER, UNKNOWN, Crossover, crossovers, growth, slope, where
from lra.report.series import IQR_OF_SD, settings

LENGTHS = (1024, 4096, 16384, 65536)


def one(found: list, **facts):
    """The only entry that has the given fields."""
    (match,) = [x for x in found if all(getattr(x, key) == value for key, value in facts.items())]
    return match


@pytest.mark.parametrize("rule", ["tokens", "batch"])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_is_that_of_one_sequence_under_either_batch_rule(rule, power, tmp_path):
    write_costs(tmp_path, "linear", lambda n: 1e-6 * n**power, rule=rule, lengths=LENGTHS)
    found = one(growth(records.load(tmp_path)), what="step_ms")
    assert found.exponent == pytest.approx(power, abs=1e-9)
    assert (found.first, found.last) == (4096, 65536), "the longest three"


def test_growth_of_memory_leaves_out_weights_and_optimizer_state(tmp_path):
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, memory=lambda n: 1e-3 * n**2, fixed=500.0)
    found = one(growth(records.load(tmp_path)), what="activations_mib")
    assert found.exponent == pytest.approx(2.0, abs=1e-9)


def test_growth_needs_two_lengths_and_says_so_of_its_error(tmp_path):
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, lengths=(1024,), spread=NO_SPREAD)
    assert growth(records.load(tmp_path)) == []
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, lengths=(4096,), spread=NO_SPREAD)
    assert one(growth(records.load(tmp_path)), what="step_ms").error is None


def test_the_standard_error_of_growth_covers():
    """Of 2,000 made-up mechanisms, about 95 % have their exponent within 1.96 errors, under noise of cells
    that is as large as the spread within a cell.
    """
    generator = np.random.default_rng(1)
    x, spread = np.log(LENGTHS[1:]), 0.05
    inside = 0
    for _ in range(2000):
        found, error = slope(x, 1.3 * x + spread * generator.standard_normal(3), np.full(3, spread))
        inside += abs(found - 1.3) <= 1.96 * error
    assert 0.94 <= inside / 2000 <= 0.995


def test_the_error_of_growth_is_that_of_a_regression_line():
    """y = 0, 1, 0 over x = 0, 1, 2: residual squares of 2/3, one degree of freedom, Sxx = 2."""
    found, error = slope(np.arange(3.0), np.array([0.0, 1.0, 0.0]), np.zeros(3))
    assert found == pytest.approx(0.0) and error == pytest.approx(math.sqrt(2 / 3 / 1 / 2))


def test_growth_of_memory_is_not_told_where_records_have_no_parts(tmp_path):
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, extra={"memory_mib": None})
    assert [found.what for found in growth(records.load(tmp_path))] == ["step_ms"]


def test_cells_of_different_batches_are_not_compared(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n)
    extra = {"tokens": 131072}  # as asked for, with half the rows it makes at two lengths
    write_costs(tmp_path, "linear", lambda n: 0.5 * n, lengths=(1024, 4096))
    write_costs(tmp_path, "linear", lambda n: 0.5 * n, lengths=(16384,), rule="batch", batch=4, extra=extra)
    assert one(crossovers(records.load(tmp_path)), what="step_ms").compared == (1024, 4096)


def test_a_repeated_cell_has_the_larger_of_the_spreads_within_and_between(tmp_path):
    for index, factor in enumerate((1.0, 1.5)):
        root = tmp_path / str(index)
        write_costs(root, "linear", lambda n, factor=factor: factor * n, lengths=(1024,), spread=0.02)
    ((series,),) = settings(records.load(tmp_path)).values()
    between = math.log(1.5) / math.sqrt(2)
    assert series.value(1024, "step_ms") == pytest.approx((128 * 1024 * math.sqrt(1.5), between))
    ((series,),) = settings(records.load(tmp_path / "0")).values()
    assert series.value(1024, "step_ms")[1] == pytest.approx(0.02)


def test_quartiles_of_a_normal_spread_give_back_its_standard_deviation():
    assert IQR_OF_SD == pytest.approx(2 * NormalDist().inv_cdf(0.75), rel=1e-3)


def test_only_falling_neighbours_bound_a_crossing():
    """The chord before the gap rises: continued it is zero left of the gap, which says nothing of the gap."""
    x = np.array([64.0, 128.0, 256.0, 512.0])
    found = where(x, np.array([0.1, 0.2, -0.2, -0.6]), np.zeros(4))
    assert found["low"] == pytest.approx(128 * 2**0.5) == found["high"]


@pytest.mark.parametrize("ratios", [(2.0, 0.5, -0.1, -0.3), (2.0, 1e-3, -0.9, -1.0), (0.2, 0.3, -0.002, 0.0)])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_interval_holds_its_point(ratios, spread):
    found = where(np.array([64.0, 128.0, 256.0, 512.0]), np.array(ratios[:3] + (-0.4,)), np.full(4, spread))
    assert found["low"] <= found["length"] <= found["high"]


def test_many_lengths_within_the_spread_are_unknown_even_if_all_are_a_little_cheaper():
    found = where(np.geomspace(64, 65536, 12), np.full(12, -1e-3), np.ones(12))
    assert found["state"] == UNKNOWN


def test_the_spread_counts_beside_a_gap_that_ends_out_of_memory():
    x = np.array([64.0, 128.0, 256.0])
    found = where(x, np.array([0.5, 0.01, -np.inf]), np.array([0.5, 0.5, 0.0]))
    assert found["low"] < 120 and found["high"] == pytest.approx(256)
    found = where(x, np.array([0.5, 0.4, -np.inf]), np.zeros(3))
    assert (found["low"], found["high"]) == pytest.approx((128, 256))


def test_a_crossing_of_two_power_laws_is_found_where_they_meet(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1e-3 * n**2, spread=NO_SPREAD)
    write_costs(tmp_path, "linear", lambda n: 5.0 * n, spread=NO_SPREAD)
    found = one(crossovers(records.load(tmp_path)), what="step_ms")
    assert (found.state, found.crossings) == (CROSSES, 1)
    assert found.length == pytest.approx(5000.0) and found.low == found.high == pytest.approx(5000.0)


def test_the_interval_of_a_crossing_grows_with_the_timing_spread(tmp_path):
    widths = []
    for index, spread in enumerate((0.01, 0.1)):
        root = tmp_path / str(index)
        write_costs(root, "softmax", lambda n: 1e-3 * n**2, spread=spread)
        write_costs(root, "linear", lambda n: 5.0 * n, spread=spread)
        found = one(crossovers(records.load(root)), what="step_ms")
        assert found.low < found.length < found.high
        widths.append(math.log(found.high / found.low))
    assert widths[1] > 5 * widths[0]


@pytest.mark.parametrize(("factor", "state"), [(0.5, ALWAYS), (1e4, NEVER)])
def test_without_a_crossing_the_whole_range_has_one_answer(factor, state, tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n**2)
    write_costs(tmp_path, "linear", lambda n: factor * n**2)
    found = one(crossovers(records.load(tmp_path)), what="step_ms")
    assert (found.state, found.length, found.low, found.high) == (state, None, None, None)


def test_equal_costs_are_not_cheaper(tmp_path):
    for model in ("softmax", "linear"):
        write_costs(tmp_path, model, lambda n: 1.0 * n, spread=NO_SPREAD)
    assert one(crossovers(records.load(tmp_path)), what="step_ms").state == NEVER


def test_timings_that_cannot_be_told_apart_are_unknown(tmp_path):
    for model, factor in (("softmax", 1.0), ("linear", 1.01)):
        write_costs(tmp_path, model, lambda n, factor=factor: factor * n, spread=0.3)
    assert one(crossovers(records.load(tmp_path)), what="step_ms").state == UNKNOWN


def test_of_several_crossings_the_last_one_counts_and_all_are_told():
    x = np.array([100.0, 200.0, 400.0, 800.0])
    found = where(x, np.array([0.1, -0.1, 0.1, -0.1]), np.zeros(4))
    assert found["state"] == CROSSES and 400 < found["length"] < 800 and found["crossings"] == 3


def test_of_two_lengths_alone_the_interval_is_all_between_them():
    found = where(np.array([100.0, 400.0]), np.array([0.1, -0.1]), np.zeros(2))
    assert found["length"] == pytest.approx(200.0)
    assert 100 <= found["low"] < 105 and 380 < found["high"] <= 400


def test_one_that_was_cheaper_and_is_not_at_the_end_is_never_cheaper_but_told_until_when():
    found = where(np.array([100.0, 400.0]), np.array([-0.1, 0.1]), np.zeros(2))
    assert found["state"] == NEVER and found["until"] == pytest.approx(200.0)


def test_softmax_out_of_memory_counts_as_dearer_in_memory_and_ends_the_range_in_time(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n, memory=lambda n: 1.0 * n, oom=(65536,))
    write_costs(tmp_path, "linear", lambda n: 2.0 * n, memory=lambda n: 2.0 * n)
    found = crossovers(records.load(tmp_path))
    memory, step = one(found, what="peak_mem_mib"), one(found, what="step_ms")
    assert (memory.state, memory.length, memory.low, memory.high) == (CROSSES, None, 16384.0, 65536.0)
    assert (step.state, step.compared, step.ended) == (NEVER, LENGTHS[:3], "softmax: oom")
    assert memory.ended == ""


def test_a_mechanism_out_of_memory_is_not_cheaper_there(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 2.0 * n)
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, oom=(65536,))
    found = one(crossovers(records.load(tmp_path)), what="step_ms")
    assert found.state == NEVER and found.until == pytest.approx(16384.0)


def test_fused_and_explicit_softmax_are_two_references(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1e-3 * n**2)
    write_costs(tmp_path, "softmax", lambda n: 1e-2 * n**2, own={"kernel": "math"})
    write_costs(tmp_path, "linear", lambda n: 50.0 * n, spread=NO_SPREAD)
    frame = records.load(tmp_path)
    fused = one(crossovers(frame), label="linear", what="step_ms")
    explicit = one(crossovers(frame, kernel="math"), label="linear", what="step_ms")
    assert fused.length == pytest.approx(50_000, rel=0.01) and explicit.length == pytest.approx(
        5000, rel=0.01
    )
    assert explicit.against == "softmax (kernel=math)"
    assert {found.label for found in crossovers(frame)} == {"linear", "softmax (kernel=math)"}


def test_nothing_is_compared_across_settings_modes_or_batch_sizes(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n)
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, mode="infer")
    write_costs(tmp_path, "nystrom", lambda n: 1.0 * n, extra={"setting": "compiled"})
    write_costs(tmp_path, "luna", lambda n: 1.0 * n, rule="batch")
    write_costs(tmp_path, "fnet", lambda n: 1.0 * n, precision="fp32")
    assert crossovers(records.load(tmp_path)) == []


def test_a_cell_that_fits_two_batch_rules_stands_with_the_lengths_of_its_mechanism(tmp_path):
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n)  # 32 rows at 4,096
    write_costs(tmp_path, "linear", lambda n: 1.0 * n, rule="batch", batch=32, lengths=(1000, 4000))
    found = {
        setting.rule: [s.lengths() for s in members]
        for setting, members in settings(records.load(tmp_path)).items()
    }
    assert found == {("tokens", 131072): [list(LENGTHS)], ("batch", 32): [[1000, 4000]]}


def test_padded_mechanisms_are_compared_with_packed_softmax(tmp_path):
    """Full rows have no padding, so that the layout is no reason to keep them apart."""
    write_costs(tmp_path, "softmax", lambda n: 1.0 * n)
    write_costs(tmp_path, "fnet", lambda n: 0.5 * n, layout="padded")
    assert isinstance(one(crossovers(records.load(tmp_path)), what="step_ms"), Crossover)


def test_the_interval_of_a_crossing_covers():
    """Softmax costs a n^2 + b n, the other c n + d: curves that bend on log-log axes, at lengths four times
    apart, with noise as large as the spread within a cell. Of 400 crossings inside the lengths, at least 93 %
    lie in their interval (the interval is made for 95 %; 400 draws scatter by one point).
    """
    generator = np.random.default_rng(2)
    lengths, inside, count = np.array(LENGTHS, dtype=float), 0, 0
    while count < 400:
        b, d, spread = generator.uniform(1, 20), generator.uniform(0, 3e4), generator.uniform(0.005, 0.05)
        c = b + 10 ** generator.uniform(0, 1.5)
        p = b - c  # n^2 * 1e-3 + (b - c) n - d = 0
        true = (-p + math.sqrt(p * p + 4e-3 * d)) / 2e-3
        if not 2000 < true < 50_000:
            continue
        count += 1
        ratios = np.log((c * lengths + d) / (1e-3 * lengths**2 + b * lengths))
        noise = spread * math.sqrt(2) * generator.standard_normal(4)
        found = where(lengths, ratios + noise, np.full(4, spread * math.sqrt(2)))
        inside += found["state"] == CROSSES and found["low"] <= true <= found["high"]
    assert inside / count >= 0.93, inside / count
