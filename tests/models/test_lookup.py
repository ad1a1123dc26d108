"""Lookups: the gradient of a short table, a product, is what autograd sums of an embedding."""

import pytest
import torch
import torch.nn.functional as F

from models.lookup import CHUNK, SHORT, lookup, lookup_short, lookup_spread


def gradient(function, table, ids, weight):
    table = table.clone().requires_grad_()
    out = function(table, ids)
    (out * weight).sum().backward()
    return out, table.grad


def embedding(table, ids):
    return F.embedding(ids, table)


@pytest.mark.parametrize("count", [1, 7, SHORT])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (CHUNK,), (3, CHUNK + 1), (2, 3, 4)])
def test_lookup_and_its_gradient_equal_those_of_an_embedding(count, shape):
    table, ids = torch.randn(count, 6, dtype=torch.float64), torch.randint(count, shape)
    weight = torch.randn(*shape, 6, dtype=torch.float64)
    expected, found = (gradient(f, table, ids, weight) for f in (embedding, lookup_short))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)  # float64 rounding of 800 addends


def test_gradcheck_of_first_and_second_derivatives():
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2, 2], [3, 0, 0]])
    assert torch.autograd.gradcheck(lambda t: lookup_short(t, ids), table)
    assert torch.autograd.gradgradcheck(lambda t: lookup_short(t, ids).square(), table)


@pytest.mark.parametrize("count", [1, 7, 257, 2048])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 700)])
def test_a_spread_gradient_equals_that_of_an_embedding(count, shape):
    table, ids = torch.randn(count, 6, dtype=torch.float64), torch.randint(count, shape)
    weight = torch.randn(*shape, 6, dtype=torch.float64)
    expected, found = (gradient(f, table, ids, weight) for f in (embedding, lookup_spread))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)  # float64 rounding of 2,000 addends


def test_gradients_in_half_precision_are_added_in_float32():
    table, ids = torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(3000, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, grad = gradient(lookup_short, table, ids, torch.ones(3000, 1, dtype=torch.bfloat16))
    assert grad.dtype == torch.bfloat16
    assert grad[:, 0].tolist() == [3008, 0]  # 3000 rounded once; ones added in bfloat16 would stop at 256


def test_one_compiled_form_serves_any_number_of_ids_past_a_chunk():
    table, forms = torch.randn(5, 3, dtype=torch.float64), []

    def backend(graph, inputs):
        forms.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lookup_short, backend=backend, fullgraph=True)
    for length in (700, 4 * CHUNK, CHUNK + 1):
        ids = torch.randint(5, (length,))
        torch._dynamo.maybe_mark_dynamic(ids, 0)
        weight = torch.randn(length, 3, dtype=torch.float64)
        for found, expected in zip(
            gradient(compiled, table, ids, weight), gradient(embedding, table, ids, weight), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(forms) == 1


def test_on_a_cpu_the_gradient_is_that_of_an_embedding_bit_for_bit():
    table, ids, weight = torch.randn(16, 6), torch.randint(16, (900,)), torch.randn(900, 6)
    expected, found = (gradient(f, table, ids, weight)[1] for f in (embedding, lookup))
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [SHORT, SHORT + 1])
def test_a_gpu_takes_products_for_short_tables_only(count):
    table = torch.randn(count, 4, device="cuda", requires_grad=True)
    out = lookup(table, torch.arange(count, device="cuda"))
    assert ("_Lookup" in type(out.grad_fn).__name__) == (count == SHORT)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_on_a_gpu_is_the_same_bits_each_time_and_captured_too(compiled):
    table = torch.randn(16, 64, device="cuda").requires_grad_()
    ids, weight = torch.randint(16, (32, 2048), device="cuda"), torch.randn(32, 2048, 64, device="cuda")
    function = torch.compile(lookup, fullgraph=True) if compiled else lookup

    def step():
        return torch.autograd.grad((function(table, ids) * weight).sum(), table)[0]

    first, second = step(), step()
    assert torch.equal(first, second)
    _, expected = gradient(embedding, table.detach().double(), ids, weight.double())
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=1e-3)  # 4096 addends in float32
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(captured, step())
