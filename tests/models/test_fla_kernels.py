"""When fla-core's kernels are taken and what they are given; on a GPU, that they equal the torch forms."""

import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpreted

from models import Place, build, fla_kernels, scan
from models.delta_rule import delta_rule
from models.retnet import log_gammas

OPERATIONS = ("chunk_gla", "chunk_simple_gla", "chunk_delta_rule", "chunk_gated_delta_rule")


class Given(list):
    """Stands in for fla-core: calls with their names and arguments, outputs of twice the values."""

    def module(self, name):
        module = ModuleType(name)
        for operation in OPERATIONS:

            def run(operation=operation, **given):
                self.append((operation, given))
                return 2 * given["v"], None

            setattr(module, operation, run)
        return module


@pytest.fixture
def fla(monkeypatch):
    """A machine on which fla-core runs, CPU or not."""
    given = Given()
    for path in ("triton", "fla", "fla.utils", "fla.ops", *fla_kernels.OPERATIONS.values()):
        monkeypatch.setitem(sys.modules, path, given.module(path))
    monkeypatch.setattr(fla_kernels, "unavailable", lambda device: "")
    return given


def tensors(dtype=torch.bfloat16, width=4):
    return (
        torch.randn(2, 5, 3, width).to(dtype),
        torch.randn(2, 5, 3, width).to(dtype),
        torch.randn(2, 5, 3, 6).to(dtype),
    )


@pytest.mark.parametrize(("kernel", "taken"), [("auto", True), ("fla", True), ("torch", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fla_s_where_it_runs(fla, kernel, dtype, taken):
    assert fla_kernels.chosen(kernel, *tensors(dtype)) is taken


def test_autocast_counts_as_half_precision(fla):
    wide = tensors(torch.float32)
    assert not fla_kernels.chosen("auto", *wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert fla_kernels.chosen("auto", *wide)
        assert not fla_kernels.chosen("auto", *tensors(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_torch_s(fla, dtype):
    assert not fla_kernels.chosen("auto", *tensors(dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"needs bfloat16 or float16, .* and got {name}; use kernel=auto"):
        fla_kernels.chosen("fla", *tensors(dtype))


def test_one_double_tensor_among_half_ones_is_torch_s(fla):
    assert not fla_kernels.chosen("auto", *tensors(), torch.zeros(1).double())


def test_wide_heads_are_torch_s(fla):
    assert fla_kernels.chosen("auto", *tensors(width=256)) and not fla_kernels.chosen(
        "auto", *tensors(width=257)
    )


@pytest.mark.parametrize(("keys", "values"), [(5, 6), (4, 7), (1, 6), (5, 7)])
def test_odd_widths_are_torch_s(fla, keys, values):
    """Their gradients are refused by fla-core in half precision."""
    q, k, _ = tensors(width=keys)
    v = torch.randn(2, 5, 3, values).bfloat16()
    assert not fla_kernels.chosen("auto", q, k, v)
    message = f"needs heads of even widths, and got {keys} for keys and {values} for values"
    with pytest.raises(ValueError, match=message):
        fla_kernels.chosen("fla", q, k, v)


def test_mamba2_with_heads_of_33_is_torch_s(fla, monkeypatch):
    monkeypatch.setattr(fla_kernels, "without_gradients", lambda device: "")
    for width, calls in ((33, 0), (34, 1)):
        layer = build("mamba2", Place(d_model=width, num_heads=1, max_len=9), head_dim=width).bfloat16()
        layer(torch.randn(1, 5, width).bfloat16())
        assert len(fla) == calls


def test_a_deterministic_run_is_torch_s(fla, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not fla_kernels.chosen("auto", *tensors())
    with pytest.raises(RuntimeError, match="kernel=fla cannot run: deterministic algorithms are asked for"):
        fla_kernels.chosen("fla", *tensors())


def test_compilation_is_torch_s(fla, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fla_kernels.chosen("auto", *tensors())
    with pytest.raises(RuntimeError, match="kernel=fla cannot be compiled"):
        fla_kernels.chosen("fla", *tensors())


def test_an_unknown_kernel_is_refused(fla):
    with pytest.raises(ValueError, match="unknown kernel 'cuda' for gla; choose from: auto, torch, fla"):
        fla_kernels.checked("cuda", "gla")


def test_a_cpu_is_refused_and_left_to_torch():
    assert not fla_kernels.chosen("auto", *tensors())
    with pytest.raises(RuntimeError, match="kernel=fla cannot run: it needs a CUDA device, .* on 'cpu'"):
        fla_kernels.chosen("fla", *tensors())
    layer = build("gla", Place(d_model=16, num_heads=2, max_len=9), kernel="fla")
    with pytest.raises(RuntimeError, match="kernel=fla cannot run"):
        layer(torch.randn(1, 5, 16))


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("triton", "triton is not installed"), ("fla", "fla-core is not installed")],
)
def test_a_missing_package_is_named(monkeypatch, missing, reason):
    fla_kernels.unavailable.cache_clear()
    for path in ("triton", "fla"):
        monkeypatch.setitem(sys.modules, path, None if path == missing else ModuleType(path))
    assert reason in fla_kernels.unavailable(torch.device("cuda", 0))
    fla_kernels.unavailable.cache_clear()


def test_a_package_that_breaks_at_import_is_named(monkeypatch):
    def breaks(name):
        raise RuntimeError("0 active drivers")

    fla_kernels.unavailable.cache_clear()
    for path in ("triton", "fla"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    monkeypatch.setattr(fla_kernels, "operation", breaks)
    found = fla_kernels.unavailable(torch.device("cuda", 0))
    assert found == "fla-core does not import (RuntimeError: 0 active drivers)"
    fla_kernels.unavailable.cache_clear()


def test_packages_are_looked_for_once_per_device(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setattr(fla_kernels, "operation", asked.append)
    fla_kernels.unavailable.cache_clear()
    for _ in range(3):
        fla_kernels.unavailable(torch.device("cuda", 0))
    fla_kernels.unavailable.cache_clear()
    assert asked == list(OPERATIONS)


def test_the_choice_is_logged_once_with_its_reason_where_lra_collects_it(fla, caplog):
    with caplog.at_level(logging.INFO, "lra"), fla_kernels.choices():
        for _ in range(3):
            fla_kernels.chosen("auto", *tensors())
            fla_kernels.chosen("auto", *tensors(torch.float32))
    assert {record.name for record in caplog.records} == {"lra.models.fla_kernels"}
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"recurrences on cpu: the kernels of {fla_kernels.package()}"
    assert second.startswith("recurrences on cpu: torch, because it needs bfloat16 or float16")


def test_what_was_taken_is_kept_apart_for_each_run(fla, caplog):
    with caplog.at_level(logging.INFO, "lra"), fla_kernels.choices() as first:
        fla_kernels.chosen("auto", *tensors(torch.float32))
        assert fla_kernels.taken(first) is None
        with fla_kernels.choices() as inner:
            fla_kernels.chosen("fla", *tensors())
        assert fla_kernels.taken(first) is None
        assert fla_kernels.taken(inner) == fla_kernels.package() and "fla-core" in fla_kernels.package()
    with caplog.at_level(logging.INFO, "lra"), fla_kernels.choices() as second:
        fla_kernels.chosen("auto", *tensors())
    assert fla_kernels.taken(first) is None and fla_kernels.taken(second) == fla_kernels.package()
    assert len(caplog.records) == 3  # the second run's log says it again


def test_choices_end_with_the_run_that_fails(fla):
    with pytest.raises(KeyError), fla_kernels.choices() as made:
        raise KeyError
    fla_kernels.chosen("auto", *tensors())
    assert not made


@pytest.mark.parametrize(("width", "operation"), [(4, "chunk_gla"), (1, "chunk_simple_gla")])
def test_decayed_attention_gives_fla_what_it_wants(fla, width, operation):
    q, k, v = tensors()
    log_decay = -torch.rand(2, 5, 3, width)
    out = fla_kernels.decayed_attention(q, k, v, log_decay, scale=0.25)
    ((name, given),) = fla
    assert name == operation and set(given) == {"q", "k", "v", "g", "scale"} and given["scale"] == 0.25
    assert torch.equal(given["q"], q) and torch.equal(given["k"], k) and torch.equal(given["v"], v)
    assert given["g"].dtype == torch.float32
    assert torch.equal(given["g"], log_decay if width > 1 else log_decay[..., 0])
    assert torch.equal(out, 2 * v) and out.dtype == v.dtype


def test_one_log_decay_for_all_tokens_is_given_by_head(fla):
    q, k, v = tensors()
    log_gamma = -torch.rand(3)
    fla_kernels.decayed_attention(q, k, v, log_gamma)
    ((name, given),) = fla
    assert name == "chunk_simple_gla" and set(given) == {"q", "k", "v", "g_gamma", "scale"}
    assert torch.equal(given["g_gamma"], log_gamma)


@pytest.mark.parametrize(
    ("hopper", "above_3_4_0", "above_3_7_1", "refused"),
    [
        (True, True, False, True),
        (True, True, True, False),
        (True, False, False, False),
        (False, True, False, False),
    ],
)
def test_gradients_that_fla_refuses_are_torch_s(fla, monkeypatch, hopper, above_3_4_0, above_3_7_1, refused):
    utils = ModuleType("fla.utils")
    utils.IS_NVIDIA_HOPPER = hopper
    utils.TRITON_ABOVE_3_4_0, utils.TRITON_ABOVE_3_7_1 = above_3_4_0, above_3_7_1
    monkeypatch.setitem(sys.modules, "fla.utils", utils)
    fla_kernels.without_gradients.cache_clear()
    assert fla_kernels.chosen("auto", *tensors(), one_decay=True) is not refused
    assert fla_kernels.chosen("auto", *tensors())
    if refused:
        with pytest.raises(RuntimeError, match="no gradients of one decay a head"):
            fla_kernels.chosen("fla", *tensors(), one_decay=True)
    fla_kernels.without_gradients.cache_clear()


def test_products_are_in_the_precision_of_autocast_and_outputs_in_that_of_the_values(fla):
    q, k, v = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fla_kernels.decayed_attention(q, k, v, -torch.rand(2, 5, 3, 1))
    assert all(fla[0][1][name].dtype == torch.bfloat16 for name in "qkv") and out.dtype == torch.float32


@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_delta_rules_give_fla_what_it_wants(fla, gated, trailing):
    q, k, v = tensors()
    beta, log_decay = torch.rand(2, 5, 3), -torch.rand(2, 5, 3)
    more = [x[..., None] if trailing else x for x in ((beta, log_decay) if gated else (beta,))]
    out = fla_kernels.delta_rule(q, k, v, *more, scale=0.5)
    ((name, given),) = fla
    assert name == ("chunk_gated_delta_rule" if gated else "chunk_delta_rule") and given["scale"] == 0.5
    assert set(given) == {"q", "k", "v", "beta", "scale"} | ({"g"} if gated else set())
    assert torch.equal(given["beta"], beta.bfloat16()) and torch.equal(out, 2 * v)
    assert not gated or (torch.equal(given["g"], log_decay) and given["g"].dtype == torch.float32)


def test_gla_asks_for_its_scale_and_both_directions_as_one_batch(fla):
    layer = build("gla", Place(d_model=16, num_heads=2, max_len=9), kernel="fla").bfloat16()
    layer(torch.randn(3, 7, 16).bfloat16())
    ((name, given),) = fla
    assert name == "chunk_gla" and given["scale"] == 0.5 and given["q"].shape == (6, 7, 2, 4)


@pytest.mark.parametrize("directions", ["tied", "forward"])
def test_retnet_asks_for_its_scale_and_rates(fla, directions):
    place = Place(d_model=16, num_heads=2, max_len=9)
    layer = build("retnet", place, kernel="fla", directions=directions).bfloat16()
    layer(torch.randn(3, 7, 16).bfloat16())
    ((name, given),) = fla
    assert name == "chunk_simple_gla" and given["scale"] == 8**-0.5
    assert given["q"].shape == (3 if directions == "forward" else 6, 7, 2, 8)
    assert torch.equal(given["g_gamma"], log_gammas(2).float())


@pytest.mark.parametrize("name", ["gla", "retnet", "mamba2"])
def test_layers_hand_on_their_choice_of_kernel(fla, name, monkeypatch):
    monkeypatch.setattr(fla_kernels, "without_gradients", lambda device: "")
    x = torch.randn(3, 7, 16).bfloat16()
    for kernel, taken in (("torch", False), ("auto", True), ("fla", True)):
        fla.clear()
        build(name, Place(d_model=16, num_heads=2, max_len=9), kernel=kernel).bfloat16()(x)
        assert bool(fla) == taken


def rms(expected, found):
    return ((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.slow
def test_fla_in_the_interpreter_equals_torch_in_outputs_and_gradients():
    """Needs Triton but no GPU; float32 where fla takes it, float16 for its delta rules."""
    found = interpreted("fla")
    assert len(found) == 10
    for operation, length, *differences in found:
        limit = 2e-3 if "delta" in operation else 5e-6
        assert all(float(d) < limit for d in differences), (operation, length, differences)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("operation", "length", "heads", "keys", "values"),
    [
        *((name, length, 2, 32, 64) for name in (*OPERATIONS, "retention") for length in (1, 63, 1000)),
        ("chunk_gla", 63, 2, 4, 8),
        ("chunk_gla", 63, 2, 8, 16),
    ],
)
def test_fla_equals_torch_in_outputs_and_gradients(operation, length, heads, keys, values):
    """Against float64 on the same rounded inputs; rows are ragged, padding is zeroed as mechanisms do. Where
    fla refuses gradients, outputs alone are compared.
    """
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    assert fla_kernels.unavailable(device) == ""
    refused = operation in ("chunk_simple_gla", "chunk_gated_delta_rule") and bool(
        fla_kernels.without_gradients(device)
    )
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(3, length, heads, *shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(keys), F.normalize(draw(keys), dim=-1), draw(values)
    one = operation != "chunk_gla"
    log_decay, beta = F.logsigmoid(draw(1 if one else keys) + 2), draw().sigmoid()
    real = torch.tensor([length, max(1, length // 2), max(1, length // 3)])
    mask = (torch.arange(length) < real[:, None])[:, :, None, None]
    inputs = [(x * mask).to(dtype) for x in (q, k, v)]
    log_gamma = -torch.rand(heads, generator=generator).cuda()
    if operation not in ("chunk_delta_rule", "retention"):
        inputs.append((log_decay * mask).float())
    if "delta" in operation:
        inputs.insert(3, (beta * mask[..., 0]).to(dtype))
    weight = (draw(values) * mask).cuda()

    def run(function, cast):
        leaves = [x.cuda().to(cast or x.dtype).requires_grad_() for x in inputs]
        if refused:
            with torch.no_grad():
                return [function(*leaves)]
        out = function(*leaves)
        return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]

    if operation == "retention":
        decays = log_gamma.double()[None, None, :, None].expand(1, length, -1, -1)
        expected = run(lambda q, k, v: scan.decayed_attention(q, k, v, decays), torch.float64)
        found = run(lambda q, k, v: fla_kernels.decayed_attention(q, k, v, log_gamma), None)
    elif "delta" in operation:
        expected = run(
            lambda q, k, v, beta, g=None: delta_rule(q, k, v, beta, None if g is None else g[..., 0]),
            torch.float64,
        )
        found = run(fla_kernels.delta_rule, None)
    else:
        expected, found = run(scan.decayed_attention, torch.float64), run(fla_kernels.decayed_attention, None)
    names = ["out", *"qkv", *(["beta"] if "delta" in operation else []), "log_decay"]
    largest = max(x.square().mean().sqrt().item() for x in expected)
    for name, a, b in zip(names, expected, found, strict=False):
        assert a.shape == b.shape and b.isfinite().all(), name
        if a.square().mean().sqrt() > 1e-3 * largest:  # those that are zero but for rounding say nothing
            assert rms(a, b) < 2e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gla", "retnet", "mamba2"])
def test_a_layer_under_autocast_takes_fla_and_equals_torch(name, monkeypatch):
    if name == "mamba2" and (reason := fla_kernels.without_gradients(torch.device("cuda", 0))):
        pytest.skip(reason)
    calls = []
    honest = fla_kernels.operation
    monkeypatch.setattr(fla_kernels, "operation", lambda n: calls.append(n) or honest(n))
    layer = build(name, Place(d_model=64, num_heads=2, max_len=300)).cuda()
    x = torch.randn(3, 300, 64, device="cuda")
    mask = torch.arange(300, device="cuda") < torch.tensor([300, 170, 1], device="cuda")[:, None]
    results = []
    for kernel in ("torch", "auto"):
        layer.kernel = kernel
        with torch.autocast("cuda", torch.bfloat16):
            results.append(layer(x, mask)[mask].double())
        assert bool(calls) == (kernel == "auto")
    assert rms(*results) < 2e-2
