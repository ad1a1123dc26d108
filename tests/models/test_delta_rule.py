"""The delta rule in chunks equals a loop over tokens, in values and gradients, also where that is hard.

At the end, what DeltaNet and Gated DeltaNet have in common.
"""

import importlib

import pytest
import torch

from models import Place, build
from models.delta_rule import delta_rule, queries_keys_values, rms_norm, unit, unit_inverse


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def streams(length, d=4, e=3):
    """q, k of length 1, v, beta in (0, 1), log decay."""
    q, k, v = draw(2, length, 3, d), unit(draw(2, length, 3, d, seed=1)), draw(2, length, 3, e, seed=2)
    return q, k, v, draw(2, length, 3, seed=3).sigmoid(), -draw(2, length, 3, seed=4).abs()


def loop(q, k, v, beta, log_decay=None):
    state, out = q.new_zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = state * log_decay[:, t].exp()[..., None, None]
        found = torch.einsum("bhde,bhd->bhe", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - found)
        state = state + k[:, t, :, :, None] * change[:, :, None]
        out.append(torch.einsum("bhde,bhd->bhe", state, q[:, t]))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("decays", [True, False])
def test_chunks_equal_the_loop(length, decays):
    leaves = [x.requires_grad_() for x in streams(length)][: 5 if decays else 4]
    found, expected = delta_rule(*leaves), loop(*leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = draw(*found.shape, seed=9)
    pairs = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 16, 128])
def test_the_size_of_chunks_does_not_matter(chunk):
    args = streams(150)
    torch.testing.assert_close(delta_rule(*args, chunk=chunk), delta_rule(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_the_inverse_times_the_matrix_is_the_identity(size):
    lower = 0.3 * draw(2, 3, size, size).tril(-1)
    eye = torch.eye(size, dtype=torch.float64).expand(2, 3, -1, -1)
    torch.testing.assert_close(unit_inverse(lower) @ (eye + lower), eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spread", [0.0, 0.05, 10.0])
@pytest.mark.parametrize(("beta", "tolerance"), [(0.5, 1e-5), (1.0, 1e-5), (2.0, 2e-4)])
def test_single_precision_holds_for_keys_that_are_equal_or_nearly_so(spread, beta, tolerance):
    """With beta = 2 nothing is ever forgotten and errors of all 600 tokens add up; 4e-5 found."""
    q, _, v, *_ = streams(600, d=16)
    k = unit(draw(1, 1, 1, 16, seed=5) + spread * draw(2, 600, 3, 16, seed=6), eps=0)
    beta = torch.full((2, 600, 3), beta, dtype=torch.float64)
    expected = loop(q, k, v, beta)
    found = delta_rule(*(x.float() for x in (q, k, v, beta)))
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_positions_without_beta_and_decay_change_nothing():
    q, k, v, beta, log_decay = streams(100)
    idle = (torch.arange(100) % 3 == 1)[:, None]
    found = delta_rule(q, k, v, beta.masked_fill(idle, 0), log_decay.masked_fill(idle, 0))
    busy = ~idle[:, 0]
    alone = delta_rule(*(x[:, busy] for x in (q, k, v, beta, log_decay)))
    torch.testing.assert_close(found[:, busy], alone, rtol=0, atol=1e-12)


def test_decays_that_underflow_give_finite_gradients_in_single_precision():
    q, k, v, beta, _ = (x.float() for x in streams(200))
    log_decay = torch.where(torch.arange(200) % 7 == 3, -1e4, -1e-3)[None, :, None].float().expand(2, 200, 3)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, beta, log_decay)]
    delta_rule(*leaves).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_unit_vector_has_length_one_and_zero_a_finite_gradient(norm):
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]], requires_grad=True)
    out = unit(x, norm=norm)
    expected = {"l2": [0.6, -0.8], "l1": [3 / 7, -4 / 7]}[norm]
    torch.testing.assert_close(out, torch.tensor([expected, [0.0, 0.0]]), rtol=0, atol=1e-6)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_gradients_of_lengths_and_norms_are_those_of_finite_differences(norm):
    x, weight = draw(2, 3, 2, 4).requires_grad_(), draw(2, 1, 1, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit(x, norm=norm, eps=0.3), x)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, eps=0.3), (x, weight))


def test_what_is_kept_in_memory_of_half_precision_is_little():
    """Queries and keys are kept once, as chunks want them; nothing of the elementwise steps between."""
    u, conv = draw(1, 256, 32, dtype=torch.bfloat16).requires_grad_(), draw(32, 4, dtype=torch.float32)
    beta = torch.full((1, 256, 2), 0.5)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        q, k, v = queries_keys_values(u, conv, width=4, num_heads=2)
        delta_rule(q, k, v, beta, -beta, chunk=4)
    assert q.dtype == k.dtype == torch.float32 and v.dtype == torch.bfloat16
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()
    assert sum(kept.values()) < 10 * u.nbytes


def test_the_triton_kernel_is_refused_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="kernel=fla cannot run: it needs a CUDA device"):
        delta_rule(*streams(3), kernel="fla")


LAYERS = pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])


@LAYERS
def test_tied_is_the_causal_layer_on_the_sequence_and_on_the_reversed_one(name):
    x, place = draw(2, 70, 16), Place(d_model=16, num_heads=2, max_len=80, bias=False)
    causal, both = build(name, place, directions="forward").double(), build(name, place).double()
    both.load_state_dict(causal.state_dict())
    torch.testing.assert_close(both(x), causal(x) + causal(x.flip(1)).flip(1), rtol=0, atol=1e-12)


@LAYERS
@pytest.mark.parametrize("width", [64, 256])
def test_at_first_a_branch_is_neither_silent_nor_loud(name, width, monkeypatch):
    """Also for the norm of a head's output: its eps is small beside the mean square."""
    file, normed = importlib.import_module(f"models.{name}"), []
    honest = file.rms_norm
    monkeypatch.setattr(file, "rms_norm", lambda *args: normed.append(honest(*args)) or normed[-1])
    out = build(name, Place(width, width // 32, max_len=128))(torch.randn(2, 128, width))
    assert 0.1 < out.std() < 1
    assert {"deltanet": 0.9, "gated_deltanet": 0.6}[name] < normed[0].square().mean().sqrt() < 1


@LAYERS
def test_layers_start_as_torch_starts_linear_ones(name):
    layer = build(name, Place(d_model=64, num_heads=16, max_len=80))
    linear = {n: part for n, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {"project", "out", "rates"} <= linear.keys()
    for part in linear.values():
        bound = part.in_features**-0.5
        assert 0.95 * bound < part.weight.abs().max() <= bound
    assert not any(bias.any() for n, bias in layer.named_parameters() if n.endswith(".bias"))
