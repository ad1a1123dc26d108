"""S4D: the recurrence of each channel, token by token, both ways."""

import torch
from torch.nn.functional import gelu, pad

from models.s4d import convolve, s4d_kernel
from proofs.faults import Plant, swapped, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, rows


def as_complex(pairs):
    return torch.complex(pairs[..., 0], pairs[..., 1])


def discretised(module):
    """Abar, Bbar [d n]."""
    a = torch.complex(-torch.exp(module.log_decay), module.frequency)
    step, b = torch.exp(module.log_step)[:, None], as_complex(module.b)
    if module.discretisation == "zoh":
        return torch.exp(step * a), b * (torch.exp(step * a) - 1) / a
    return (2 + step * a) / (2 - step * a), b * 2 * step / (2 - step * a)


def states(turn, b, inputs):
    """x_t = turn(x_(t-1)) + Bbar u_t for each input [d] of a row: a list of [d n]."""
    state, found = torch.zeros_like(b), []
    for u in inputs:
        state = turn(state) + b * u[:, None]
        found.append(state)
    return found


def finished(module, y):
    y = gelu(y)
    if module.output.kind == "none":
        return y
    y = affine(module.output.linear, y)
    if module.output.kind == "linear":
        return y
    value, gate = y.split(y.shape[-1] // 2, dim=-1)
    return value / (1 + torch.exp(-gate))


def both_ways(module, x, mask, turn, b, c):
    """The layer with states that `turn` moves on by Abar, of which Re c . x is read. b: [d n], c: [2 d n]."""
    out = torch.zeros_like(x)

    def read(c, state):
        return (c * state).sum(dim=-1).real

    for index, row, real in rows(x, mask):
        inputs = [row[t] if t in real else torch.zeros_like(row[t]) for t in range(len(row))]
        y = [read(c[0], s) + module.skip * u for s, u in zip(states(turn, b, inputs), inputs, strict=True)]
        if module.directions != "forward":
            later = states(turn, b, inputs[::-1])[::-1]
            for t in range(len(row) - 1):  # what has been read from the end up to the next token
                if module.directions == "untied":
                    y[t] = y[t] + read(c[1], later[t + 1])
                else:
                    y[t] = y[t] + read(c[0], turn(later[t + 1]))
        if real:
            out[index, real] = finished(module, torch.stack(y))[real]
    return out


def reference(module, x, mask=None):
    """The conjugates of the states are read with them: twice the real part."""
    a, b = discretised(module)
    return both_ways(module, x, mask, lambda state: a * state, b, 2 * as_complex(module.c))


CASES = [
    {"d_state": 8},
    {
        "d_state": 4,
        "state_init": "legs",
        "discretisation": "bilinear",
        "directions": "tied",
        "output": "linear",
    },
    {"d_state": 4, "state_init": "inv", "directions": "forward", "output": "none"},
]


def system(d=3, n=4):
    a = torch.complex(-draw(d, n).exp(), 5 * draw(d, n, seed=1))
    b, c = (torch.complex(draw(d, n, seed=s), draw(d, n, seed=s + 1)) for s in (2, 4))
    return a, 0.1 * draw(d, seed=6).exp(), b, c[None]


def limit_of_running_sum():
    """A of almost zero, step 1: K is 2 Re C B, a constant."""
    x, b, c = draw(2, 17, 3), torch.ones(3, 1).to(torch.complex128), torch.full((1, 3, 1), 0.5 + 0j)
    a = torch.full((3, 1), -1e-14, dtype=torch.complex128)
    kernel = s4d_kernel(a, torch.ones(3), b, c.to(a), 17)[0]
    found = convolve(x, kernel, None, torch.zeros(3, dtype=torch.float64), None)
    return distance(torch.stack([x[:, : t + 1].sum(1) for t in range(17)], dim=1), found)


def limit_of_toeplitz():
    from scipy.linalg import toeplitz

    a, step, b, c = system()
    x, skip, mask = draw(2, 150, 3, seed=9), draw(3, seed=8), torch.arange(150) % 3 != 1
    there, back = (s4d_kernel(a, step, b, k, 150)[0] for k in (c, c.flip(-1).conj()))
    expected = torch.zeros_like(x)
    for d in range(3):
        matrix = toeplitz(there[d].numpy(), pad(back[d, :-1], (1, 0)).numpy())
        expected[..., d] = (x[..., d] * mask) @ torch.tensor(matrix).T
    expected += x * mask[:, None] * skip
    return distance(expected, convolve(x, there, back, skip, mask.expand(2, -1)))


LIMITS = [
    Limit("states that do not decay: a running sum", limit_of_running_sum),
    Limit("the product with an explicit Toeplitz matrix (scipy), a mask with holes", limit_of_toeplitz),
]


def against_scipy(method):
    """Real matrices of twice the size: [Re x, Im x] turned and shrunk, read as 2 (Re C, -Im C)."""

    def measure():
        from scipy import signal

        a, step, b, c = system()
        x = draw(150, 3, seed=9)
        kernel = s4d_kernel(a, step, b, c, 150, discretisation=method)[0]
        found = convolve(x[None], kernel, None, torch.zeros(3, dtype=torch.float64), None)[0]
        expected = torch.zeros_like(x)
        for d in range(3):
            real, imag = torch.diag(a[d].real), torch.diag(a[d].imag)
            matrix = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)])
            into = torch.cat([b[d].real, b[d].imag])[:, None]
            out = 2 * torch.cat([c[0, d].real, -c[0, d].imag])[None]
            continuous = [t.numpy() for t in (matrix, into, out, torch.zeros(1, 1))]
            discrete = list(signal.cont2discrete(continuous, step[d].item(), method=method))
            if method == "zoh":  # dlsim reads the state before the input: C Abar after it, C Bbar at once
                discrete[2], discrete[3] = discrete[2] @ discrete[0], discrete[2] @ discrete[1]
            y = signal.dlsim(tuple(discrete), x[:, d].numpy())[1]
            expected[:, d] = torch.tensor(y[:, 0])
        if method == "bilinear":  # scipy also averages each input with the last one
            found = (found + pad(found, (0, 0, 1, 0))[:-1]) / 2
        return distance(expected, found)

    return measure


def against_lfilter():
    """One pair of states: a filter with the poles Abar and its conjugate."""
    from scipy import signal

    a, step, b, c = system(d=2, n=1)
    x = draw(90, 2, seed=9)
    kernel = s4d_kernel(a, step, b, c, 90, discretisation="bilinear")[0]
    found = convolve(x[None], kernel, None, torch.zeros(2, dtype=torch.float64), None)[0]
    expected = torch.zeros_like(x)
    for d in range(2):
        pole = ((2 + step[d] * a[d]) / (2 - step[d] * a[d])).item()
        gain = (c[0, d] * b[d] * 2 * step[d] / (2 - step[d] * a[d])).item()
        numerator = [2 * gain.real, -2 * (gain * pole.conjugate()).real]
        denominator = [1.0, -2 * pole.real, abs(pole) ** 2]
        expected[:, d] = torch.tensor(signal.lfilter(numerator, denominator, x[:, d].numpy()))
    return distance(expected, found)


ORACLES = [
    Oracle("scipy, signal.cont2discrete and dlsim", "zero-order hold, causal", against_scipy("zoh")),
    Oracle("scipy, signal.cont2discrete and dlsim", "bilinear, causal", against_scipy("bilinear")),
    Oracle("scipy, signal.lfilter", "bilinear, one pair of poles, causal", against_lfilter),
]


def late(args, kwargs):
    """The kernel one tap later: the token itself is seen as the last one."""
    args[1] = pad(args[1], (1, 0))
    return args, kwargs


def faults_of(kernel, step):
    """FAULTS of a layer whose function `kernel` takes B as argument 2 and the step as argument `step`."""

    def unscaled(args, kwargs):
        """Bbar without the step."""
        args[2] = args[2] / args[step][:, None]
        return args, kwargs

    return {
        "no scale": Plant(kernel, unscaled, {"d_state": 8}),
        "no mask": Plant("convolve", unmasked, {"d_state": 8}, check="content_invariance"),
        "k and v swapped": Plant("convolve", swapped, {"d_state": 8}),  # the two directions
        "window off by one": Plant("convolve", late, {"d_state": 8}),
        "wrong eps": "the formula has no eps: it divides by nothing that could vanish",
    }


FAULTS = faults_of("s4d_kernel", step=1)
