"""Nystromformer by kernels for rows: the same as by explicit scores, packed and full."""

from functools import partial

import pytest
import torch
from flash_stand_in import explicit
from interpreter import interpreted
from torch._dynamo.testing import CompileCounterWithBackend

from models import Place, build, few_queries, nystrom
from models.landmarks import SAFE_ITERATIONS
from models.nystrom import nystrom_attention, nystrom_rows
from models.packed import pad_packed

LENGTHS, FILLER, MAX_LEN = (19, 0, 1, 23, 6), 4, 23
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
OPTIONS = [
    {},
    {"count_padding": True},
    {"coupled_start": True, "kernel_size": 0},
    {"num_landmarks": 22, "kernel_size": 35},
]


def mixer(**own):
    place = Place(d_model=16, num_heads=2, max_len=30)
    return build("nystrom", place, **{"num_landmarks": 6, "kernel_size": 5, **own}).double()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Calling it takes the path of a GPU from there on, landmarks reading rows by torch's form of the kernels
    or by the stand-in for FlashAttention.
    """

    def switch(few=False):
        monkeypatch.setattr(nystrom, "flash_runs", lambda q, k, v: True)
        monkeypatch.setattr(few_queries, "flash_runs", lambda q, k, v: not few)
        monkeypatch.setattr(few_queries, "flash", explicit)

    return switch


def trained(mechanism, call, x):
    """Output of one call, and the gradients of its input and of every parameter."""
    x = x.clone().requires_grad_()
    out = call(x)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return out, *torch.autograd.grad(loss, [x, *mechanism.parameters()])


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)  # float64 through the iteration


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("own", OPTIONS, ids=lambda own: "-".join(own) or "default")
def test_packed_rows_train_as_with_explicit_scores_whatever_flash_leaves_at_filler(own, few, on_a_gpu):
    mechanism = mixer(**own)
    x = 3 * torch.randn(sum(LENGTHS) + FILLER, 16, dtype=torch.float64)

    def call(x):
        out = mechanism.forward_packed(x, CU_SEQLENS, MAX_LEN)
        assert out.isfinite().all()
        return out[: sum(LENGTHS)]

    expected = trained(mechanism, call, x)
    on_a_gpu(few)
    found = trained(mechanism, call, x)
    assert_same(found, expected)
    assert not found[1][sum(LENGTHS) :].any()


@pytest.mark.parametrize("own", OPTIONS, ids=lambda own: "-".join(own) or "default")
@pytest.mark.parametrize("length", [24, 23])
def test_full_rows_train_as_with_explicit_scores(own, length, on_a_gpu):
    mechanism, x = mixer(**own), 3 * torch.randn(3, length, 16, dtype=torch.float64)
    expected = trained(mechanism, mechanism, x)
    on_a_gpu()
    assert_same(trained(mechanism, mechanism, x), expected)


def test_nothing_but_stand_ins_for_kernels_pads_rows_on_the_path_of_a_gpu(on_a_gpu, monkeypatch):
    on_a_gpu()
    for name in ("pad_packed", "unpad_packed", "nystrom_attention"):
        monkeypatch.delattr(nystrom, name)
    mechanism = mixer()
    mechanism.forward_packed(torch.randn(sum(LENGTHS), 16).double(), CU_SEQLENS, MAX_LEN)
    mechanism(torch.randn(2, 12, 16).double())


@pytest.mark.parametrize(
    ("max_len", "own"), [(6, {}), (5, {}), (23, {"num_iterations": SAFE_ITERATIONS + 1})]
)
def test_short_sequences_and_long_iterations_keep_their_explicit_scores(max_len, own, on_a_gpu, monkeypatch):
    on_a_gpu()
    monkeypatch.delattr(nystrom, "nystrom_rows")
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    assert mixer(**own).forward_packed(torch.randn(9, 16).double(), bounds, max_len).isfinite().all()


@pytest.mark.parametrize("num_iterations", [6, SAFE_ITERATIONS])
@pytest.mark.parametrize("sharpness", [0.03, 0.3, 1.0, 3.0, 10.0])
def test_what_is_read_through_landmarks_stays_far_inside_float16(sharpness, num_iterations, monkeypatch):
    """The iteration multiplies a singular value by 3.25 at most, and never takes it far past its inverse."""
    largest, attend = [], nystrom.few_keys_attention

    def watched(q, k, v, *rest, **options):
        largest.append(v.abs().amax())
        return attend(q, k, v, *rest, **options)

    monkeypatch.setattr(nystrom, "few_keys_attention", watched)
    q, k = torch.randn(2, 512, 2, 8).mul(sharpness).cumsum(1).unbind()  # neighbours are alike
    v = torch.ones(512, 2, 8).masked_fill(torch.rand(512, 2, 8) < 0.5, -1)
    bounds = torch.tensor([0, 512], dtype=torch.int32)
    options = {"num_landmarks": 64, "num_iterations": num_iterations, "filler": False}
    nystrom_rows(q, k, v, bounds, 512, **options)
    norm = 3.25 ** (num_iterations / 2) * 1.1
    assert largest[0] <= norm * 64**0.5  # of values of at most 1; float16 holds 65,504


@pytest.mark.slow
def test_it_is_compiled_once_for_any_number_of_rows(on_a_gpu):
    on_a_gpu()
    counter, mechanism = CompileCounterWithBackend("aot_eager"), mixer().float()
    torch._dynamo.reset()
    compiled = torch.compile(mechanism.forward_packed, fullgraph=True, backend=counter)
    for filler in (3, 9):
        x = torch.randn(sum(LENGTHS) + filler, 16)
        torch._dynamo.mark_dynamic(x, 0)
        expected = mechanism.forward_packed(x, CU_SEQLENS, MAX_LEN)
        torch.testing.assert_close(compiled(x, CU_SEQLENS, MAX_LEN), expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_with_kernels_in_the_interpreter_it_equals_explicit_scores_in_float64():
    """Needs Triton but no GPU. Gradients of queries and keys are small next to what cancels in them."""
    found = interpreted("nystrom_rows")
    assert len(found) == 3
    for _, out, q_grad, k_grad, v_grad, taps_grad in found:
        assert all(float(x) < 2e-3 for x in (out, v_grad, taps_grad)), found
        assert all(float(x) < 1e-2 for x in (q_grad, k_grad)), found


GPU_LENGTHS = (700, 0, 1, 1024, 129)


def drawn(dtype):
    generator = torch.Generator(device="cuda").manual_seed(0)
    made = torch.randn(sum(GPU_LENGTHS) + 7, 3, 2, 32, device="cuda", generator=generator)
    taps = torch.randn(2, 1, 35, 1, device="cuda", generator=generator) / 6
    bounds = torch.tensor([0, *GPU_LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    return made.to(dtype), taps, bounds


def by_explicit_scores(made, taps, bounds, **options):
    padded, mask = pad_packed(made, bounds, max(GPU_LENGTHS))
    q, k, v = (x.transpose(1, 2) for x in padded.unbind(2))
    return nystrom_attention(q, k, v, mask, conv_weight=taps, **options).transpose(1, 2)[mask]


def by_rows(made, taps, bounds, **options):
    out = nystrom_rows(*made.unbind(1), bounds, max(GPU_LENGTHS), conv_weight=taps, **options)
    return out[: sum(GPU_LENGTHS)]


def with_gradients(call, made, taps, bounds, **options):
    leaves = [x.detach().requires_grad_() for x in (made, taps)]
    out = call(*leaves, bounds, **options)
    return [out, *torch.autograd.grad((out.double() * out.detach().double().sin()).sum(), leaves)]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_landmarks", [64, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_it_equals_explicit_scores_in_float64(dtype, num_landmarks, compiled):
    made, taps, bounds = drawn(dtype)
    torch._dynamo.reset()
    call, own = (
        torch.compile(by_rows, fullgraph=True) if compiled else by_rows,
        {"num_landmarks": num_landmarks},
    )
    found = with_gradients(call, made, taps, bounds, **own)
    expected = with_gradients(by_explicit_scores, made.double(), taps.double(), bounds, **own)
    limit = 1e-2 if dtype == torch.float16 else 8e-2  # of numbers up to 50 that cancel
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < limit * other.norm()
    assert not found[1][sum(GPU_LENGTHS) :].any()


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16_more_iterations_than_float16_holds_go_by_rows_too():
    made, taps, bounds = drawn(torch.bfloat16)
    own = {"num_landmarks": 64, "num_iterations": SAFE_ITERATIONS + 4}
    found = with_gradients(by_rows, made, taps, bounds, **own)
    expected = with_gradients(by_explicit_scores, made.double(), taps.double(), bounds, **own)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 8e-2 * other.norm()


@pytest.mark.gpu
def test_captured_steps_follow_their_bounds():
    made, taps, bounds = drawn(torch.float16)
    step = partial(with_gradients, by_rows, made, taps, bounds, num_landmarks=64)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = step()
    lengths = torch.tensor([0, 129, 700, 1, 1024], device="cuda")
    bounds[1:] = lengths.cumsum(0)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert (found.float() - expected.float()).norm() < 1e-2 * expected.float().norm()
