"""LRU: the recurrence, token after token, from both ends."""

import math

import numpy
import scipy.signal
import torch

from models.lru import lru
from models.s5 import s5
from proofs.faults import NO_KEYS, Plant, unmasked
from proofs.kit import Limit, Oracle, distance, draw


def walk(decay, updates):
    """h_t = decay h_(t-1) + update_t, all of them, [l r]."""
    state, states = torch.zeros_like(updates[0]), []
    for update in updates:
        state = decay * state + update
        states.append(state)
    return torch.stack(states)


def reference(module, x, mask=None):
    decay = torch.polar(torch.exp(-torch.exp(module.nu)), torch.exp(module.theta))
    b = torch.complex(module.b[..., 0], module.b[..., 1])
    c = torch.complex(module.c[..., 0], module.c[..., 1])
    out = []
    for i, row in enumerate(x):
        u = row if mask is None else torch.where(mask[i][:, None], row, 0.0)
        updates = torch.exp(module.log_gamma) * (u.to(b.dtype) @ b.T)
        y = (walk(decay, updates) @ c[0]).real + module.skip * u
        if module.directions != "forward":
            y = y + (walk(decay, updates.flip(0)).flip(0) @ c[-1]).real
        a = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        if module.output.kind != "none":
            a = a @ module.output.linear.weight.T + module.output.linear.bias
        if module.output.kind == "glu":
            value, gate = a.chunk(2, dim=-1)
            a = value / (1 + torch.exp(-gate))
        out.append(a)
    return torch.stack(out)


CASES = [
    {},
    {"d_state": 6, "directions": "tied", "output": "linear", "r_min": 0.0, "r_max": 1.0},
    {"d_state": 6, "directions": "forward", "output": "none", "max_phase": 0.1},
]


def system(directions=1, r=5, d=3):
    """nu, theta, log_gamma, b, c, skip."""
    nu, theta, log_gamma = draw(3, r, seed=1) - torch.tensor([[3.0], [0.0], [1.0]]).double()
    b, c = (torch.complex(*draw(2, *shape, seed=4)) for shape in ((r, d), (directions, r, d)))
    return nu, theta, log_gamma, b, c, draw(d, seed=5)


def limit_of_s5():
    """Poles -exp(nu) + i exp(theta), held for steps of 1: what S5 divides out of B is put back in."""
    nu, theta, log_gamma, b, c, skip = system(directions=2)
    u, mask = draw(2, 90, 3), torch.arange(90) % 5 != 2
    a = torch.complex(-torch.exp(nu), torch.exp(theta))
    held = torch.exp(log_gamma)[:, None] * b * (a / (torch.exp(a) - 1))[:, None]
    mask = mask.expand(2, 90)
    expected = s5(u, a, torch.ones_like(nu), held, c / 2, skip, mask)
    return distance(expected, lru(u, nu, theta, log_gamma, b, c, skip, mask))


def limit_of_forgetting():
    """|L| = 0: each token by itself."""
    _, theta, log_gamma, b, c, skip = system(directions=2)
    u, nu = draw(2, 40, 3), torch.full_like(theta, 7.0)
    gamma = torch.exp(log_gamma)
    expected = ((u.to(b.dtype) @ b.T) * gamma @ (c[0] + c[1])).real + skip * u
    return distance(expected, lru(u, nu, theta, log_gamma, b, c, skip, None))


LIMITS = [
    Limit("S5 with poles log L, steps of 1 and as many inputs, a mask with holes", limit_of_s5),
    Limit("|L| = 0: no state outlives a token", limit_of_forgetting),
]


def against_simulation():
    """One real system of which each state is two numbers, simulated."""
    nu, theta, log_gamma, b, c, skip = system()
    radius, angle = torch.exp(-torch.exp(nu)), torch.exp(theta)
    r = len(nu)
    matrix = numpy.zeros((2 * r, 2 * r))
    for i, (size, turn) in enumerate(zip(radius.tolist(), angle.tolist(), strict=True)):
        cos, sin = size * math.cos(turn), size * math.sin(turn)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[cos, -sin], [sin, cos]]
    b = torch.exp(log_gamma)[:, None] * b
    inputs = torch.stack([b.real, b.imag], dim=1).flatten(0, 1).numpy()
    outputs = torch.stack([c[0].real, -c[0].imag], dim=1).flatten(0, 1).T.numpy()
    u = draw(1, 90, 3)
    # dlsim gives the state before each token; one token later it is the state after it.
    late = scipy.signal.dlsim(
        (matrix, inputs, outputs, numpy.zeros((3, 3)), 1.0), numpy.pad(u[0], ((0, 1), (0, 0)))
    )
    expected = torch.tensor(late[1][1:]) + skip * u[0]
    return distance(expected, lru(u, nu, theta, log_gamma, *system()[3:], None)[0])


def against_filters():
    """Each state in either direction as a filter of one pole."""
    nu, theta, log_gamma, b, c, skip = system(directions=2)
    decay = torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta))).tolist()
    u = draw(1, 150, 3)
    updates = (torch.exp(log_gamma) * (u[0].to(b.dtype) @ b.T)).numpy()
    y = skip * u[0]
    for i, pole in enumerate(decay):
        there = scipy.signal.lfilter([1.0], [1.0, -pole], updates[:, i])
        back = scipy.signal.lfilter([1.0], [1.0, -pole], updates[::-1, i])[::-1].copy()
        y = y + (torch.tensor(there)[:, None] * c[0, i] + torch.tensor(back)[:, None] * c[1, i]).real
    return distance(y, lru(u, nu, theta, log_gamma, b, c, skip, None)[0])


ORACLES = [
    Oracle("scipy", "signal.dlsim of the real system, one direction", against_simulation),
    Oracle("scipy", "signal.lfilter, one filter a state, both directions", against_filters),
]


def unnormalised(args, kwargs):
    args[3] = torch.zeros_like(args[3])  # log_gamma
    return args, kwargs


def one_late(args, kwargs):
    args[0] = torch.nn.functional.pad(args[0], (0, 0, 1, -1))
    return args, kwargs


FAULTS = {
    "no scale": Plant("lru", unnormalised),
    "no mask": Plant("lru", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": Plant("diagonal_system", one_late),
    "wrong eps": "the formula has no eps",
}
