"""Luna by FlashAttention: the same layer as by explicit scores, packed, padded and full."""

from functools import partial

import pytest
import torch
from flash_stand_in import explicit
from torch._dynamo.testing import CompileCounterWithBackend

from models import Place, build, few_keys, few_queries, luna, softmax
from models.luna import luna_attention, pack_rows, unpack_rows
from models.packed import pad_packed, unpad_packed
from models.row_products import kernels

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
LENGTHS, FILLER = (9, 0, 1, 4), 3
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
OPTIONS = [
    {},
    {"tie_kv": False, "prenorm": True, "proj_len": 3},
    {"dynamic_projection": True},
    {"dynamic_projection": True, "tie_kv": False},
]


def layer(**own):
    place = Place(d_model=16, num_heads=2, max_len=30, num_layers=2)
    return build("luna", place, **{"proj_len": 5, "d_ff": 24, **own}).double()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Calling it takes the path of a GPU from there on, with the stand-in for its operator."""

    def switch():
        for module in (few_keys, few_queries, luna, softmax):
            monkeypatch.setattr(module, "flash_runs", lambda q, k, v: True)
        for module in (few_keys, few_queries, softmax):
            monkeypatch.setattr(module, "flash", explicit)

    return switch


def trained(mechanism, call, x):
    """Output and carry of one call, and the gradients of its input and of every parameter."""
    x = x.clone().requires_grad_()
    out, carry = call(x)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + carry.sin().sum()
    return out, carry, *torch.autograd.grad(loss, [x, *mechanism.parameters()])


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("own", OPTIONS, ids=lambda own: "-".join(own) or "default")
def test_packed_rows_train_as_with_explicit_scores_whatever_the_operator_leaves_at_filler(own, on_a_gpu):
    mechanism = layer(**own)
    x = torch.randn(sum(LENGTHS) + FILLER, 16, dtype=torch.float64)

    def call(x):
        out, carry = mechanism.forward_packed(x, CU_SEQLENS, max(LENGTHS), None)
        assert out.isfinite().all()
        return out[: sum(LENGTHS)], carry

    expected = trained(mechanism, call, x)
    on_a_gpu()
    found = trained(mechanism, call, x)
    assert_same(found, expected)
    assert not found[2][sum(LENGTHS) :].any()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("own", OPTIONS, ids=lambda own: "-".join(own) or "default")
def test_padded_rows_train_as_with_explicit_scores(own, full, on_a_gpu):
    mechanism, x = layer(**own), torch.randn(len(LENGTHS), 9, 16, dtype=torch.float64)
    mask = None if full else torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    call = partial(mechanism, mask=mask, carry=None)
    expected = trained(mechanism, call, x)
    on_a_gpu()
    assert_same(trained(mechanism, call, x), expected)


def test_no_row_of_the_path_of_a_gpu_is_padded(on_a_gpu, monkeypatch):
    on_a_gpu()
    for module in (luna, few_queries):
        monkeypatch.delattr(module, "sum_chunks")
    layer().forward_packed(torch.randn(sum(LENGTHS), 16).double(), CU_SEQLENS, 9, None)


@pytest.mark.parametrize("used", [None, torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]]).bool()])
def test_gradcheck_of_both_steps(used, on_a_gpu):
    on_a_gpu()
    rows = torch.randn(2, sum(LENGTHS) + 1, 4, dtype=torch.float64).requires_grad_()
    slots = torch.randn(2, len(LENGTHS), 3, 4, dtype=torch.float64).requires_grad_()
    bounds = (CU_SEQLENS, max(LENGTHS))
    pack = lambda p, x: pack_rows(p[0], x[0], *bounds, num_heads=2, values=x[1])  # noqa: E731
    unpack = lambda x, p: unpack_rows(x[0], p[0], *bounds, used, num_heads=2, values=p[1])  # noqa: E731
    assert torch.autograd.gradcheck(pack, (slots, rows))
    assert torch.autograd.gradcheck(unpack, (rows, slots))


def test_both_steps_are_compiled_once_for_any_number_of_rows(on_a_gpu):
    on_a_gpu()
    counter, slots = CompileCounterWithBackend("aot_eager"), torch.randn(len(LENGTHS), 3, 4)

    def steps(x):
        packed = pack_rows(slots, x, CU_SEQLENS, 9, num_heads=2)
        used = torch.arange(3) < CU_SEQLENS.diff()[:, None]
        return packed, unpack_rows(x, packed, CU_SEQLENS, 9, used, num_heads=2)

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend=counter)
    for filler in (3, 9):
        x = torch.randn(sum(LENGTHS) + filler, 4)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), steps(x))
    torch._dynamo.reset()
    assert counter.frame_count == 1


GPU_LENGTHS = (300, 0, 1, 64, 129)


def drawn(dtype, num_slots, seed=0):
    """(rows [2 t h*d] with seven of filler, slots [2 b p h*d], cu_seqlens) for two heads of 32."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    draw = partial(torch.randn, device="cuda", generator=generator)
    cu_seqlens = torch.tensor([0, *GPU_LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    rows = draw(2, sum(GPU_LENGTHS) + 7, 64).to(dtype)
    return rows, draw(2, len(GPU_LENGTHS), num_slots, 64).to(dtype), cu_seqlens


def both_steps(rows, slots, cu_seqlens, used):
    """Outputs of the pack step and of the unpack step at the real rows."""
    bounds, real = (cu_seqlens, max(GPU_LENGTHS)), sum(GPU_LENGTHS)
    packed = pack_rows(slots[0], rows[0], *bounds, num_heads=2, values=rows[1])
    return packed, unpack_rows(rows[0], slots[0], *bounds, used, num_heads=2, values=slots[1])[:real]


def both_steps_explicit(rows, slots, cu_seqlens, used):
    real = sum(GPU_LENGTHS)
    padded, mask = pad_packed(rows.transpose(0, 1), cu_seqlens, max(GPU_LENGTHS))
    x, y = padded.unbind(2)
    packed = luna_attention(slots[0], x, mask, num_heads=2, values=y)
    mixed = luna_attention(x, slots[0], used, num_heads=2, values=slots[1])
    return packed, unpad_packed(mixed, cu_seqlens, rows.shape[1])[:real]


def with_gradients(steps, rows, slots, *rest):
    leaves = [x.detach().requires_grad_() for x in (rows, slots)]
    outs = steps(*leaves, *rest)
    return *outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_slots", "hidden"), [(16, False), (256, False), (16, True)])
@pytest.mark.parametrize("triton", [False, True])
def test_both_steps_equal_explicit_ones_on_a_gpu(triton, num_slots, hidden, dtype, compiled):
    rows, slots, cu_seqlens = drawn(dtype, num_slots)
    used = torch.arange(num_slots, device="cuda") < cu_seqlens.diff()[:, None] if hidden else None
    torch._dynamo.reset()  # more cases than it would keep compiled forms
    steps = torch.compile(both_steps, fullgraph=True) if compiled else both_steps
    with kernels(triton):
        found = with_gradients(steps, rows, slots, cu_seqlens, used)
    expected = with_gradients(both_steps_explicit, rows.double(), slots.double(), cu_seqlens, used)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() / other.norm() < 2e-2  # bfloat16 keeps 8 bits
    packed, _, rows_grad, slots_grad = found
    assert not packed[1].any() and not slots_grad[:, 1].any()  # of the sequence without rows
    assert not rows_grad[:, sum(GPU_LENGTHS) :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("length", [200, 300])  # few keys, and more than the kernels for few of them hold
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padded_attention_equals_explicit_attention_on_a_gpu(dtype, length, full):
    rows, slots, cu_seqlens = drawn(dtype, 16)
    padded, mask = (x[:, :length] for x in pad_packed(rows.transpose(0, 1), cu_seqlens, max(GPU_LENGTHS)))
    inputs, mask = [slots[0], *padded.unbind(2)], None if full else mask
    results = []
    for kind in (torch.float64, dtype):
        q, k, v = leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = luna_attention(q, k, mask, num_heads=2, values=v)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for expected, found in zip(*results, strict=True):
        assert (found.double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [False, True])
def test_captured_steps_follow_their_bounds(hidden):
    rows, slots, cu_seqlens = drawn(torch.float16, 16)
    rows, slots = rows.requires_grad_(), slots.requires_grad_()

    def step():
        used = torch.arange(16, device="cuda") < cu_seqlens.diff()[:, None] if hidden else None
        outs = both_steps(rows, slots, cu_seqlens, used)
        return *outs, *torch.autograd.grad(sum(x.float().square().sum() for x in outs), (rows, slots))

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    lengths = torch.tensor([0, 129, 300, 1, 64], device="cuda")
    cu_seqlens[1:] = lengths.cumsum(0)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # dq is added up atomically
    assert not captured[0][0].any() and captured[0][1].any()
