"""S4: what it starts as, which parameters are the recurrence's, float32, and what it keeps for gradients."""

import copy
import math

import pytest
import torch

from models import Place, build
from models.common import own_parameters
from models.fft_conv import fast_size
from models.s4 import after, transition
from models.ssm import hippo_legs

PLACE = Place(d_model=4, num_heads=2, max_len=64)


def test_the_diagonal_less_the_product_is_hippo():
    """Traces of powers of A and B* A^k B are those of the real matrix (arXiv 2111.00396, eq. 2)."""
    w, p, b = (part.to(torch.complex128) for part in hippo_legs(8))
    p, b, a = (torch.cat([x, x.conj()]) for x in (p, b, -0.5 + 1j * w))
    ours = torch.diag(a) - p[:, None] * p.conj()
    row = torch.arange(8, dtype=torch.float64)
    into = (2 * row + 1).sqrt().to(ours)
    hippo = -(into[:, None] * into).tril(-1) - torch.diag(row + 1)
    for power in range(1, 5):
        one, other = (torch.linalg.matrix_power(matrix, power) for matrix in (ours, hippo))
        torch.testing.assert_close(one.trace(), other.trace(), rtol=1e-10, atol=0)
        torch.testing.assert_close(b.conj() @ one @ b, into @ other @ into, rtol=1e-10, atol=0)


def test_parameters_start_at_hippo():
    mechanism = build("s4", PLACE, d_state=8, n_ssm=2)
    w, p, b = (part.float().expand(2, 4) for part in hippo_legs(8))
    torch.testing.assert_close(mechanism.log_decay, torch.full((2, 4), math.log(0.5)))
    torch.testing.assert_close(mechanism.frequency, w)
    torch.testing.assert_close(torch.view_as_complex(mechanism.p), p.to(torch.complex64))
    torch.testing.assert_close(torch.view_as_complex(mechanism.b), b.to(torch.complex64))


@pytest.mark.parametrize("n_ssm", [1, 2, None])
def test_channels_share_a_and_b_in_turn(n_ssm):
    mechanism = build("s4", PLACE, d_state=4, n_ssm=n_ssm).double()
    copies = n_ssm or 4
    shapes = {n: tuple(getattr(mechanism, n).shape) for n in ("log_decay", "frequency", "p", "b")}
    assert shapes == {
        "log_decay": (copies, 2),
        "frequency": (copies, 2),
        "p": (copies, 2, 2),
        "b": (copies, 2, 2),
    }
    before = mechanism.kernels(9)
    with torch.no_grad():
        mechanism.b[-1] += 1
    moved = (mechanism.kernels(9) - before).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [channel % copies == copies - 1 for channel in range(4)]


def test_the_recurrence_learns_at_a_rate_of_its_own_without_weight_decay():
    mechanism = build("s4", PLACE, ssm_lr_scale=0.25)
    tagged = {n for n, p in mechanism.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert tagged == {"log_decay", "frequency", "p", "b", "log_step"}
    assert {p.lr_scale for n, p in mechanism.named_parameters() if n in tagged} == {0.25}


def test_every_fast_size_is_a_power_that_is_reached():
    mechanism = build("s4", PLACE, d_state=4)
    a = torch.complex(-mechanism.log_decay.exp(), mechanism.frequency).to(torch.complex128)
    matrix = transition(a, torch.view_as_complex(mechanism.p), torch.tensor([0.1]))
    c = torch.randn(1, 1, 2, dtype=torch.complex128)
    row = torch.cat([c.real, -c.imag], dim=-1)[0]  # [1 2n]
    for count in sorted({fast_size(least) for least in range(1, 300)}):
        expected = (row @ torch.linalg.matrix_power(matrix[0], count))[0]
        found = after(matrix, c, count)[0, 0]
        torch.testing.assert_close(torch.cat([found.real, -found.imag]), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("length", [1, 3, 300, 16384])
def test_float32_kernels_are_those_of_float64(length):
    mechanism = build("s4", PLACE, dt_min=1e-4)
    wide = copy.deepcopy(mechanism).double().kernels(length)
    assert (mechanism.kernels(length) - wide).abs().max() < 1e-4 * wide.abs().max()  # found 2e-6


def test_a_kernel_is_the_start_of_a_longer_one():
    mechanism = build("s4", PLACE, d_state=8).double()
    long = mechanism.kernels(1000)
    for length in (1, 2, 50, 999):
        torch.testing.assert_close(mechanism.kernels(length), long[..., :length], rtol=0, atol=1e-12)


def test_what_is_kept_for_gradients_does_not_grow_with_states_times_length():
    def kept(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            build("s4", PLACE, d_state=64).kernels(length)
        return sum(sizes)

    assert (
        kept(4096) - kept(2048) < 2 * 4 * 64**2 + 4 * 2048
    )  # one more squaring; [d n f] would be 2**17 more


def test_the_defaults_are_those_of_the_paper():
    """state-spaces/s4: d_state 64, steps of 1e-3 to 0.1, A, B and step at 1e-3 beside 1e-2."""
    own = {n: p.default for n, p in own_parameters(type(build("s4", PLACE))).items()}
    assert own == {
        "d_state": 64,
        "n_ssm": 1,
        "directions": "untied",
        "dt_min": 1e-3,
        "dt_max": 0.1,
        "output": "glu",
        "ssm_lr_scale": 0.1,
        "dt_lr_scale": None,
    }


def test_steps_start_in_their_range():
    step = build("s4", Place(d_model=500, num_heads=1, max_len=8), dt_min=1e-3, dt_max=1e-2).log_step.exp()
    assert 1e-3 <= step.min() < 1.1e-3 and 0.9e-2 < step.max() <= 1.001e-2
    assert abs(step.log().median().exp() - math.sqrt(1e-5)) < 5e-4  # even in the logarithm


def test_powers_of_slow_states_are_taken_in_float64():
    a = torch.complex(torch.full((2, 4), -1e-3), torch.arange(1.0, 9.0).view(2, 4))
    p, c = torch.full((2, 4), 0.01 + 0j), torch.ones(1, 2, 4, dtype=torch.complex64)
    step, double = torch.tensor([0.1, 0.01]), torch.complex128
    exact = after(transition(a.to(double), p.to(double), step.double()), c.to(double), 16_384)
    found = after(transition(a, p, step), c, 16_384)
    assert exact.abs().max() > 0.1  # not forgotten
    assert (found - exact).abs().max() < 4e-7 * exact.abs().max()  # rounded once


@pytest.mark.parametrize("log_step", [-50.0, -20.0, 5.0])
def test_steps_of_any_size_have_finite_kernels_and_gradients(log_step):
    mechanism = build("s4", PLACE)
    torch.nn.init.constant_(mechanism.log_step, log_step)
    kernels = mechanism.kernels(300)
    wide = copy.deepcopy(mechanism).double().kernels(300)
    assert (kernels - wide).abs().max() < 1e-5 * wide.abs().max() + 1e-7
    kernels.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mechanism.parameters())


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"d_state": 7}, "s4 keeps conjugate pairs of states, got d_state=7"),
        ({"dt_max": math.inf}, "s4 needs 0 < dt_min <= dt_max, got dt_min=0.001, dt_max=inf"),
        ({"n_ssm": 3}, "to divide its 4 channels, got 3; choose a divisor, or null"),
        ({"n_ssm": 0}, "to divide its 4 channels, got 0"),
        ({"directions": "both"}, "unknown directions 'both' for s4; choose from: tied, untied, forward"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_with_the_good_ones(own, message):
    with pytest.raises(ValueError, match=message):
        build("s4", PLACE, **own)
