"""S4D: what its states start as, which parameters are the recurrence's, and float32 over long sequences."""

import copy
import math

import pytest
import torch

from models import Place, build
from models.common import own_parameters
from models.s4d import s4d_kernel

PLACE = Place(d_model=4, num_heads=2, max_len=64)


def dense_hippo(n):
    """A of HiPPO-LegS (arXiv 2111.00396, eq. 2), entry by entry."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for row in range(n):
        for column in range(row):
            matrix[row, column] = -math.sqrt((2 * row + 1) * (2 * column + 1))
        matrix[row, row] = -(row + 1)
    return matrix


def test_the_states_start_at_the_published_eigenvalues():
    start = {init: build("s4d", PLACE, d_state=8, state_init=init) for init in ("lin", "inv", "legs")}
    for mechanism in start.values():
        torch.testing.assert_close(-mechanism.log_decay.exp(), torch.full((4, 4), -0.5))
    lin = torch.tensor([0, math.pi, 2 * math.pi, 3 * math.pi])
    inv = torch.tensor([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)])
    p = (torch.arange(8, dtype=torch.float64) + 0.5).sqrt()
    values = torch.linalg.eigvals(dense_hippo(8) + p[:, None] * p)
    torch.testing.assert_close(values.real, torch.full_like(values.real, -0.5))
    legs = values.imag[values.imag > 0].sort().values.float()
    for init, expected in (("lin", lin), ("inv", inv), ("legs", legs)):
        torch.testing.assert_close(start[init].frequency[3], expected)


def test_inputs_start_at_ones_and_steps_in_their_range():
    mechanism = build("s4d", Place(d_model=500, num_heads=1, max_len=8), dt_min=1e-3, dt_max=1e-2)
    assert (mechanism.b == torch.tensor([1.0, 0.0])).all()
    step = mechanism.log_step.exp()
    assert 1e-3 <= step.min() < 1.1e-3
    assert 0.9e-2 < step.max() <= 1e-2
    assert abs(mechanism.log_step.median().exp() - math.sqrt(1e-5)) < 5e-4  # even in the logarithm


def test_the_recurrence_learns_at_a_rate_of_its_own_without_weight_decay():
    mechanism = build("s4d", PLACE, ssm_lr_scale=0.25)
    tagged = {n for n, p in mechanism.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert tagged == {"log_decay", "frequency", "log_step", "b"}
    assert {p.lr_scale for n, p in mechanism.named_parameters() if n in tagged} == {0.25}


def test_the_zero_order_hold_is_the_matrix_exponential():
    a = torch.tensor([[-0.3 + 2j, -0.7 - 5j]], dtype=torch.complex128)
    b, c = torch.tensor([[[1.0 + 1j, 2 - 1j]], [[0.5 - 2j, 1 + 0j]]], dtype=torch.complex128)
    found = s4d_kernel(a, torch.tensor([0.2], dtype=torch.float64), b, c[None], 30)[0, 0]
    held = torch.zeros(3, 3, dtype=torch.complex128)  # the input as one more state, which stays
    held[:2, :2], held[:2, 2] = torch.diag(a[0]), b[0]
    step = torch.linalg.matrix_exp(0.2 * held)
    state, expected = step[:2, 2], []
    for _ in range(30):
        expected.append(2 * (c[0] @ state).real)
        state = step[:2, :2] @ state
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_a_state_that_hardly_moves_keeps_float32_precision(discretisation):
    a = torch.complex(torch.tensor([[-1e-6]]), torch.tensor([[2e-6]]))
    one = torch.ones(1, 1, dtype=torch.complex64)
    kernel = s4d_kernel(a, torch.tensor([1e-3]), one, one[None], 1000, discretisation=discretisation)[0, 0]
    torch.testing.assert_close(kernel, torch.full((1000,), 2e-3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("state_init", ["lin", "inv", "legs"])
def test_float32_kernels_of_16384_taps_are_those_of_float64(state_init):
    mechanism = build("s4d", PLACE, state_init=state_init, dt_min=1e-4)
    wide = copy.deepcopy(mechanism).double().kernels(16384)
    assert (mechanism.kernels(16384) - wide).abs().max() < 1e-4 * wide.abs().max()  # found 1e-5


def test_the_defaults_are_those_of_the_paper():
    """state-spaces/s4: d_state 64, steps of 1e-3 to 0.1, A, B and step at 1e-3 beside 1e-2."""
    own = {n: p.default for n, p in own_parameters(type(build("s4d", PLACE))).items()}
    assert own == {
        "d_state": 64,
        "state_init": "lin",
        "discretisation": "zoh",
        "directions": "untied",
        "dt_min": 1e-3,
        "dt_max": 0.1,
        "output": "glu",
        "ssm_lr_scale": 0.1,
        "dt_lr_scale": None,
    }


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_slow_states_keep_float32_precision_over_16384_taps(discretisation):
    mechanism = build("s4d", PLACE, discretisation=discretisation)
    torch.nn.init.constant_(mechanism.log_decay, -7.0)
    wide = copy.deepcopy(mechanism).double().kernels(16_384)
    error = (mechanism.kernels(16_384) - wide).abs().max() / wide.abs().max()
    assert error < 1e-6  # found 3e-7; of float32 steps or angles: 2e-4


@pytest.mark.parametrize(
    ("a", "discretisation", "taps"),
    [
        (0.0, "zoh", [4.0, 4.0, 4.0]),  # 2 step, and nothing is forgotten
        (-1.0, "bilinear", [2.0, 0.0, 0.0]),  # step A = -2: 2 step / 2, and everything is forgotten
    ],
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_kernels_and_gradients_are_finite_where_a_formula_divides_by_zero(a, discretisation, taps, dtype):
    a = torch.full((1, 1), a, dtype=dtype, requires_grad=True)
    one, step = torch.ones(1, 1, dtype=dtype), torch.tensor([2.0])
    kernel = s4d_kernel(a, step, one, one[None], 3, discretisation=discretisation)[0, 0]
    torch.testing.assert_close(kernel, torch.tensor(taps).to(kernel.dtype), rtol=0, atol=1e-6)
    (found,) = torch.autograd.grad(kernel[:2].sum(), a)
    beside = a.detach() + 1e-4  # real, so that the derivative is that along the real axis
    ahead, behind = (
        s4d_kernel(
            x.to(torch.complex128),
            step,
            one.to(torch.complex128),
            one[None].to(torch.complex128),
            3,
            discretisation=discretisation,
        )[0, 0, :2].sum()
        for x in (beside, a.detach() - 1e-4)
    )
    torch.testing.assert_close(found.real.item(), ((ahead - behind) / 2e-4).item(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"d_state": 7}, "d_state=7; choose an even number"),
        ({"d_state": 0}, "d_state=0; choose an even number"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max, got dt_min=0.2, dt_max=0.1"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max, got dt_min=0.0"),
        ({"state_init": "hippo"}, "unknown state_init 'hippo' for s4d; choose from: lin, inv, legs"),
        ({"discretisation": "euler"}, "unknown discretisation 'euler' for s4d; choose from: zoh, bilinear"),
        ({"directions": "back"}, "unknown directions 'back' for s4d; choose from: tied, untied, forward"),
        ({"output": "mlp"}, "unknown output 'mlp' for s4d"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_with_the_good_ones(own, message):
    with pytest.raises(ValueError, match=message):
        build("s4d", PLACE, **own)
