"""S5: the recurrence, token after token, from both ends."""

import math

import numpy
import scipy.linalg
import scipy.signal
import torch

from models.s5 import s5
from proofs.faults import NO_KEYS, NO_SCALE, Plant, unmasked
from proofs.kit import Limit, Oracle, distance, draw


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def walk(decay, updates):
    """h_t = decay h_(t-1) + update_t, all of them, [l r]."""
    state, states = torch.zeros_like(updates[0]), []
    for update in updates:
        state = decay * state + update
        states.append(state)
    return torch.stack(states)


def reference(module, x, mask=None):
    real = module.a_real.clamp(max=-1e-4) if module.clip_eigs else module.a_real
    a, step = torch.complex(real, module.a_imag), torch.exp(module.log_step)
    decay = torch.exp(step * a)
    b = torch.complex(module.b[..., 0], module.b[..., 1]) * ((decay - 1) / a)[:, None]
    c = torch.complex(module.c[..., 0], module.c[..., 1])
    out = []
    for i, row in enumerate(x):
        u = row if mask is None else torch.where(mask[i][:, None], row, 0.0)
        updates = u.to(b.dtype) @ b.T
        y = module.skip * u + 2 * (walk(decay, updates) @ c[0]).real
        if module.directions != "forward":
            y = y + 2 * (walk(decay, updates.flip(0)).flip(0) @ c[-1]).real
        kind, a_of_y = getattr(module.output, "kind", None), gelu(y)
        if kind == "none":
            out.append(a_of_y)
            continue
        z = a_of_y @ module.output.linear.weight.T + module.output.linear.bias
        if kind is None:
            out.append((a_of_y if module.output.gate_gelu else y) * sigmoid(z))
        elif kind == "glu":
            value, gate = z.chunk(2, dim=-1)
            out.append(value * sigmoid(gate))
        else:
            out.append(z)
    return torch.stack(out)


SMALL = {"d_state": 8, "num_blocks": 2}

CASES = [
    {},
    {**SMALL, "directions": "tied", "output": "half_glu2", "clip_eigs": False},
    {**SMALL, "directions": "forward", "output": "none", "init_c": "lecun"},
    {**SMALL, "output": "glu", "init_c": "complex", "num_blocks": 1},
    {**SMALL, "output": "linear", "dt_min": 0.01, "dt_max": 0.01},
]


def system(directions=1, r=6, d=3):
    """a, step, b, c, skip of a stable system, complex128 and float64."""
    a = torch.complex(-draw(r, seed=1).abs() - 0.01, 3 * draw(r, seed=2))
    step = draw(r, seed=3).exp() / 10
    b, c = (torch.complex(*draw(2, *shape, seed=4)) for shape in ((r, d), (directions, r, d)))
    return a, step, b, c, draw(d, seed=5)


def limit_of_sums():
    """Steps that lead nowhere: Abar is 1, and states are running sums of step B u."""
    a, _, b, c, skip = system(directions=2)
    u, step = draw(2, 70, 3), torch.full((6,), 1e-9, dtype=torch.float64)
    sums = (u.to(b.dtype) @ b.T * 1e-9).cumsum(1)
    from_end = (u.to(b.dtype) @ b.T * 1e-9).flip(1).cumsum(1).flip(1)
    expected = 2 * (sums @ c[0] + from_end @ c[1]).real + skip * u
    return distance(expected - skip * u, s5(u, a, step, b, c, skip, None) - skip * u)


def limit_of_forgetting():
    """Steps so long that Abar is 0: each token by itself, through -B / A, once from either side."""
    a, _, b, c, skip = system(directions=2)
    a, step = torch.complex(-1 - a.real.abs(), a.imag), torch.full((6,), 1e3, dtype=torch.float64)
    u = draw(2, 40, 3)
    expected = 2 * (u.to(b.dtype) @ (-b / a[:, None]).T @ (c[0] + c[1])).real + skip * u
    return distance(expected, s5(u, a, step, b, c, skip, None))


LIMITS = [
    Limit("steps of 1e-9: states are running sums, from both ends", limit_of_sums, tolerance=1e-6),
    Limit("steps of 1e3: no state outlives a token", limit_of_forgetting),
]


def against_simulation():
    """The continuous system, the pairs written out as one real system, held between tokens and simulated."""
    a, step, b, c, skip = system()
    r = len(a)
    pairs = [
        step[i].item() * numpy.array([[z.real, -z.imag], [z.imag, z.real]]) for i, z in enumerate(a.tolist())
    ]
    matrix = scipy.linalg.block_diag(*pairs)
    inputs = numpy.stack([(step[:, None] * b).real, (step[:, None] * b).imag], axis=1).reshape(2 * r, -1)
    outputs = numpy.stack([2 * c[0].T.real, -2 * c[0].T.imag], axis=2).reshape(-1, 2 * r)
    continuous = (matrix, inputs, outputs, numpy.diag(skip))
    held = scipy.signal.cont2discrete(continuous, dt=1.0, method="zoh")
    u = draw(1, 90, 3)
    # dlsim gives C x_t with the state before u_t; one token later it is the state after it.
    late = scipy.signal.dlsim(
        (held[0], held[1], outputs, 0 * held[3], 1.0), numpy.pad(u[0], ((0, 1), (0, 0)))
    )
    expected = torch.tensor(late[1][1:]) + u[0] @ torch.tensor(held[3]).T
    return distance(expected, s5(u, a, step, b, c, skip, None)[0])


def against_filters():
    """Each state in either direction as a filter of one pole."""
    a, step, b, c, skip = system(directions=2)
    decay = torch.exp(a * step)
    u = draw(1, 150, 3)
    updates = (u[0].to(b.dtype) @ (b * ((decay - 1) / a)[:, None]).T).numpy()
    y = skip * u[0]
    for i in range(len(a)):
        there = scipy.signal.lfilter([1.0], [1.0, -decay[i].item()], updates[:, i])
        back = scipy.signal.lfilter([1.0], [1.0, -decay[i].item()], updates[::-1, i])[::-1].copy()
        y = y + 2 * (torch.tensor(there)[:, None] * c[0, i] + torch.tensor(back)[:, None] * c[1, i]).real
    return distance(y, s5(u, a, step, b, c, skip, None)[0])


ORACLES = [
    Oracle("scipy", "signal.cont2discrete(method='zoh') and dlsim of the real system", against_simulation),
    Oracle("scipy", "signal.lfilter, one filter a state, both directions", against_filters),
]


def one_late(args, kwargs):
    args[0] = torch.nn.functional.pad(args[0], (0, 0, 1, -1))
    return args, kwargs


FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("s5", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": Plant("diagonal_system", one_late),
    "wrong eps": "the formula has no eps",
}
