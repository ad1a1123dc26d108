"""Softmax over the real keys alone: with the kernel for packed rows, the same function as with a mask."""

import pytest
import torch
from flash_stand_in import explicit

from models import softmax
from models.common import dense_attention
from models.softmax import softmax_compacted, softmax_fused, softmax_math

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
LENGTH = 13


def masks():
    holes = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0], [0] * 12 + [1], [1] * 13]).bool()
    prefix = torch.arange(LENGTH) < torch.tensor([1, LENGTH, 6])[:, None]
    return {"holes": holes, "prefix": prefix, "full": torch.ones(3, LENGTH, dtype=torch.bool)}


def leaves(seed=0, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, length, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def gradients(function, *arguments, **options):
    inputs = leaves()
    out = function(*inputs, *arguments, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Takes the path of a GPU, with the stand-in for its kernel."""
    monkeypatch.setattr(softmax, "flash_runs", lambda q, k, v: True)
    monkeypatch.setattr(softmax, "flash", explicit)


@pytest.mark.parametrize("kind", ["holes", "prefix", "full"])
def test_every_query_gets_what_dense_attention_gives_it_and_gradients_agree(kind):
    mask = masks()[kind]
    expected = gradients(dense_attention, mask)
    for found, wanted in zip(gradients(softmax_compacted, mask, explicit), expected, strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


def test_queries_may_be_fewer_or_more_than_keys(on_a_gpu):
    mask, (q, k, v) = masks()["holes"], leaves()
    for some in (q[:, :, :2], torch.cat([q, q], dim=2)):
        torch.testing.assert_close(
            softmax_fused(some, k, v, mask), dense_attention(some, k, v, mask), **EXACT
        )


def test_rows_without_a_real_key_give_zeros_and_no_gradient(on_a_gpu):
    mask = masks()["holes"] & torch.tensor([[False], [True], [False]])
    out, *grads = gradients(softmax_fused, mask)
    assert not out[[0, 2]].any() and out[1].all()
    assert not any(grad[[0, 2]].any() for grad in grads)
    for found, wanted in zip([out, *grads], gradients(softmax_math, mask), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


def test_gradcheck(on_a_gpu):
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    assert torch.autograd.gradcheck(lambda q, k, v: softmax_fused(q, k, v, mask), leaves(length=3))


def test_what_stands_at_masked_keys_reaches_nothing(on_a_gpu):
    mask, (q, k, v) = masks()["holes"], leaves()
    spoiled = [torch.where(mask[:, None, :, None], x, float("nan")) for x in (k, v)]
    assert torch.equal(softmax_fused(q, *spoiled, mask), softmax_fused(q, k, v, mask))


def test_the_path_of_a_gpu_is_traced_in_one_graph(on_a_gpu):
    compiled = torch.compile(softmax_fused, backend="aot_eager", fullgraph=True)
    for kind in ("holes", "prefix"):
        expected = gradients(softmax_fused, masks()[kind])
        for found, wanted in zip(gradients(compiled, masks()[kind]), expected, strict=True):
            torch.testing.assert_close(found, wanted, **EXACT)


def test_the_kernel_of_a_gpu_is_asked_for_nowhere_else():
    for dtype in (torch.bfloat16, torch.float32):
        assert not softmax.flash_runs(*torch.zeros(3, 1, 1, 4, 8, dtype=dtype))


def drawn(length=300, width=32, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (3, 3, 2, length, width)
    q, k, v = torch.randn(shape, device="cuda", generator=generator).bfloat16().unbind(0)
    mask = torch.rand(3, length, device="cuda", generator=generator) < 0.4
    mask[1] = torch.arange(length, device="cuda") < 7
    mask[2] = False
    return [q, k, v], mask


def gradients_on_gpu(function, inputs, mask):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, mask)
    return out, *torch.autograd.grad(out.float().square().sum(), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("width", [8, 32, 128])
def test_fused_equals_explicit_on_a_gpu_in_bfloat16(width, compiled):
    inputs, mask = drawn(width=width)
    assert softmax.flash_runs(*inputs)
    fused = torch.compile(softmax_fused, fullgraph=True) if compiled else softmax_fused
    expected = gradients_on_gpu(softmax_math, [x.double() for x in inputs], mask)
    for found, wanted in zip(gradients_on_gpu(fused, inputs, mask), expected, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 2e-2  # bfloat16 keeps 8 bits
        assert not found[2].any()  # of the row without a real key


@pytest.mark.gpu
def test_heads_of_a_width_without_a_kernel_take_the_mask_instead():
    inputs, mask = drawn(width=4)
    assert not softmax.flash_runs(*inputs)
    expected = softmax_math(*(x.double() for x in inputs), mask)
    assert (softmax_fused(*inputs, mask).double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.gpu
def test_dropout_drops_its_share_of_the_real_keys_weights_and_scales_the_rest():
    length, real = 256, 200
    q = torch.zeros(2, 1, length, length, device="cuda", dtype=torch.bfloat16)  # weights of 1 / real, read
    v = (
        torch.eye(length, device="cuda", dtype=torch.bfloat16).expand_as(q).contiguous()
    )  # off with unit vectors
    mask = torch.ones(2, length, device="cuda", dtype=torch.bool)
    mask[:, 10 : 10 + length - real] = False
    weights = softmax_fused(q, q, v, mask, dropout=0.25).float().transpose(-1, -2)
    assert not weights[:, :, 10 : 10 + length - real].any()
    weights = weights[mask[:, None]]
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert weights.mean().item() * real == pytest.approx(1, abs=0.02)


@pytest.mark.gpu
def test_a_captured_call_follows_its_mask():
    inputs, mask = drawn()
    inputs = [x.requires_grad_() for x in inputs]

    def step():
        out = softmax_fused(*inputs, mask)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    mask.copy_(mask.flip(0))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # dq is added up atomically
    assert not captured[0][0].any() and captured[0][2].any()
