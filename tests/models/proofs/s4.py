"""S4: the dense recurrence of each channel, token by token, both ways."""

import math

import torch
from torch.nn.functional import pad

from models.s4 import convolve, s4_kernel
from models.s4d import s4d_kernel
from models.ssm import hippo_legs
from proofs.kit import Limit, Oracle, distance, draw
from proofs.s4d import as_complex, both_ways, faults_of


def with_conjugate(x):
    return torch.cat([x, x.conj()], dim=-1)


def discretised(module):
    """Abar [d N N] and Bbar [d N] of all states, each followed by its conjugate."""
    a = with_conjugate(torch.complex(-torch.exp(module.log_decay), module.frequency))
    p, b = (with_conjugate(as_complex(pairs)) for pairs in (module.p, module.b))
    dense = torch.diag_embed(a) - p[:, :, None] * p[:, None, :].conj()
    copy = [channel % len(dense) for channel in range(len(module.log_step))]
    half = (torch.exp(module.log_step) / 2)[:, None, None] * dense[copy]
    one = torch.eye(a.shape[-1], dtype=half.dtype)
    into = 2 * (torch.exp(module.log_step) / 2)[:, None] * b[copy]
    return torch.linalg.solve(one - half, one + half), torch.linalg.solve(one - half, into)


def reference(module, x, mask=None):
    a, b = discretised(module)
    c = with_conjugate(as_complex(module.c))
    return both_ways(module, x, mask, lambda state: (a @ state[..., None])[..., 0], b, c)


CASES = [
    {"d_state": 8},
    {"d_state": 4, "n_ssm": 4, "directions": "tied", "output": "linear"},
    {"d_state": 4, "n_ssm": None, "directions": "forward", "output": "none"},
]


def system(d=3, n=3):
    """a, p, b, step, c as `s4_kernel` takes them."""
    a = torch.complex(-draw(d, n).exp(), 5 * draw(d, n, seed=1))
    p, b, c = (torch.complex(draw(d, n, seed=s), draw(d, n, seed=s + 1)) for s in (2, 4, 6))
    return a, p, b, 0.1 * draw(d, seed=8).exp(), c[None]


def limit_of_s4d():
    a, p, b, step, c = system()
    expected = s4d_kernel(a, step, b, c, 150, discretisation="bilinear")
    return distance(expected, s4_kernel(a, 0 * p, b, step, c, 150))


def limit_of_powers():
    a, p, b, step, c = system(d=1)
    dense = torch.diag(with_conjugate(a[0])) - with_conjugate(p[0])[:, None] * with_conjugate(p[0]).conj()
    one, half = torch.eye(6, dtype=dense.dtype), dense * step / 2
    turn, state = torch.linalg.solve(one - half, one + half), step * with_conjugate(b[0])
    state, taps = torch.linalg.solve(one - half, state), []
    for _ in range(150):
        taps.append((with_conjugate(c[0, 0]) @ state).real)
        state = turn @ state
    return distance(torch.stack(taps)[None, None], s4_kernel(a, p, b, step, c, 150))


LIMITS = [
    Limit("P = 0: the kernel of S4D with the bilinear discretisation", limit_of_s4d),
    Limit("the kernel is C Abar^t Bbar, by 150 products with the dense Abar", limit_of_powers),
]


def response(matrix, into, out, step, u):
    """scipy's bilinear system of real matrices, driven by u [l]; its input is averaged with the last one."""
    from scipy import signal

    continuous = [t.numpy() for t in (matrix, into[:, None], out[None], torch.zeros(1, 1))]
    discrete = signal.cont2discrete(continuous, step.item(), method="bilinear")
    return torch.tensor(signal.dlsim(discrete, u.numpy())[1][:, 0])


def averaged(y):
    return (y + pad(y, (0, 0, 1, 0))[:-1]) / 2


def convolved(kernel, x):
    return convolve(x[None], kernel, None, torch.zeros_like(x[0]), None)[0]


def against_hippo():
    """The start, read by C = B: the real matrix of HiPPO-LegS, from its definition, read by B."""
    n = 16
    w, p, b = (part.to(torch.complex128).expand(3, -1) for part in hippo_legs(n))
    step, x = torch.tensor([1e-3, 1e-2, 0.1], dtype=torch.float64), draw(200, 3)
    kernel = s4_kernel(-0.5 + 1j * w, p, b, step, b[None], 200)[0]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            matrix[i, j] = -(i + 1) if i == j else -math.sqrt((2 * i + 1) * (2 * j + 1))
    into = torch.tensor([math.sqrt(2 * i + 1) for i in range(n)], dtype=torch.float64)
    expected = torch.stack([response(matrix, into, into, step[d], x[:, d]) for d in range(3)], dim=-1)
    return distance(expected, averaged(convolved(kernel, x)))


def against_scipy():
    """Real matrices of twice the size, for [Re x, Im x]: P* x is 2 Re(P* x) for a state and its conjugate."""
    a, p, b, step, c = system()
    x, expected = draw(150, 3, seed=9), []
    for d in range(3):
        real, imag = torch.diag(a[d].real), torch.diag(a[d].imag)
        matrix = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)])
        low_rank, into = torch.cat([p[d].real, p[d].imag]), torch.cat([b[d].real, b[d].imag])
        matrix -= 2 * low_rank[:, None] * low_rank
        out = 2 * torch.cat([c[0, d].real, -c[0, d].imag])
        expected.append(response(matrix, into, out, step[d], x[:, d]))
    found = averaged(convolved(s4_kernel(a, p, b, step, c, 150)[0], x))
    return distance(torch.stack(expected, dim=-1), found)


ORACLES = [
    Oracle("scipy, signal.cont2discrete and dlsim", "the real matrix of HiPPO-LegS, causal", against_hippo),
    Oracle("scipy, signal.cont2discrete and dlsim", "any Lambda, P, B, C, causal", against_scipy),
]


FAULTS = faults_of("s4_kernel", step=3)
