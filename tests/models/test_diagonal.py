"""The scan with constant complex decays equals a loop, filters of scipy, and keeps little."""

import pytest
import scipy.signal
import torch

from models.diagonal import CHUNK, diagonal_scan, diagonal_system


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_decays(r, seed=1):
    return torch.complex(-0.1 * draw(r, seed=seed).abs(), 3 * draw(r, seed=seed + 1))


def walk(decay, updates):
    state, states = torch.zeros_like(updates[..., 0]), []
    for t in range(updates.shape[-1]):
        state = decay[:, None] * state + updates[..., t]
        states.append(state)
    return torch.stack(states, dim=-1)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, CHUNK**2 + 5])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_diagonal_scan_equals_the_loop(length, directions):
    log_decay, updates = log_decays(3).requires_grad_(), draw(3, 2, length, dtype=torch.complex128)
    updates.requires_grad_()
    expected = [walk(log_decay.exp(), updates)]
    if directions == 2:
        expected.append(walk(log_decay.exp(), updates.flip(-1)).flip(-1))
    found = diagonal_scan(log_decay, updates, directions)
    weights = draw(directions, 3, 2, length, seed=9, dtype=torch.complex128)
    grads = []
    for states in (found, expected):
        loss = sum((h * w).real.sum() for h, w in zip(states, weights, strict=True))
        grads.append(torch.autograd.grad(loss, (log_decay, updates), allow_unused=True))
    torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-10)
    zero = torch.zeros_like(log_decay)  # a loop of one step has no use for the decay
    torch.testing.assert_close(
        grads[0][0], zero if grads[1][0] is None else grads[1][0], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("log_decay", [0.0, -1e4, 0.02 + 1j])
def test_no_memory_all_memory_and_growth_have_finite_gradients(log_decay):
    log_decay = torch.full((1,), log_decay, dtype=torch.complex128, requires_grad=True)
    updates = draw(1, 1, 200, dtype=torch.complex64).requires_grad_()
    there, back = diagonal_scan(log_decay, updates, 2)
    torch.testing.assert_close(there, walk(log_decay.exp().to(updates.dtype), updates), rtol=1e-4, atol=1e-4)
    (there + back).abs().sum().backward()
    assert log_decay.grad.isfinite().all() and updates.grad.isfinite().all()


def test_single_precision_holds_for_fast_rotation_over_sixteen_thousand_tokens():
    log_decay = torch.complex(
        -torch.tensor([1e-5, 1e-3, 1e-1]).double(), torch.tensor([3.1, 2.0, 0.3]).double()
    )
    updates = draw(3, 1, 16_384, dtype=torch.complex64)
    found = diagonal_scan(log_decay, updates, 1)[0]
    for i, decay in enumerate(log_decay.exp().tolist()):
        expected = torch.tensor(
            scipy.signal.lfilter([1.0], [1.0, -decay], updates[i, 0].to(torch.complex128))
        )
        error = (found[i, 0] - expected).abs().max() / expected.abs().max()
        assert error < 2e-6  # float32 rounds at 6e-8, summed over the memory of a state


def test_a_system_keeps_its_inputs_and_its_states_alone():
    batch_size, length, d, r = 2, 4096, 4, 8
    x, outputs = draw(batch_size, length, d).float().requires_grad_(), draw(2, r, d, dtype=torch.complex64)
    log_decay, inputs = log_decays(r).requires_grad_(), draw(r, d, dtype=torch.complex64).requires_grad_()
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        diagonal_system(x, log_decay, inputs, outputs.requires_grad_())
    assert sum(kept.values()) < 1.02 * batch_size * length * (4 * d + 2 * 8 * r)


@pytest.mark.parametrize("directions", [1, 2])
def test_autocast_leaves_a_system_in_float32(directions):
    x, log_decay = draw(2, 150, 4).float().requires_grad_(), log_decays(8)
    inputs, outputs = draw(8, 4, dtype=torch.complex64), draw(directions, 8, 4, dtype=torch.complex64)
    leaves = [x, inputs.requires_grad_(), outputs.requires_grad_()]
    expected = diagonal_system(x, log_decay, inputs, outputs)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = diagonal_system(x, log_decay, inputs, outputs)
        assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("directions", [1, 2])
def test_a_system_has_the_gradients_of_its_complex_products(directions):
    x, log_decay = draw(2, 50, 3).requires_grad_(), log_decays(4).requires_grad_()
    inputs, outputs = draw(4, 3, dtype=torch.complex128), draw(directions, 4, 5, dtype=torch.complex128)
    leaves = [x, log_decay, inputs.requires_grad_(), outputs.requires_grad_()]
    states = diagonal_scan(log_decay, torch.einsum("rd,bld->rbl", inputs, x.to(inputs.dtype)), directions)
    expected = sum(torch.einsum("rbl,re->ble", h, c) for h, c in zip(states, outputs, strict=True)).real
    found = diagonal_system(x, log_decay, inputs, outputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = draw(*found.shape, seed=9)
    pairs = [torch.autograd.grad((y * weight).sum(), leaves) for y in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
