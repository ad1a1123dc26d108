"""Mega: the average token by token from both ends, then scores, gates and feed-forward of each chunk."""

import math

import torch
import torch.nn.functional as F

from models.gelu import gelu
from models.mega import MovingAverage, mega_attention, moving_average
from proofs.faults import Plant, other_eps, swapped, unmasked, unscaled
from proofs.kit import Limit, Oracle, affine, dense_softmax, distance, draw, normalised, normed, rows, silu


def reference(module, x, mask=None, carry=None):
    """-> (x, None)."""
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if not real:
            continue
        inner = normed(module.norm, row) if module.prenorm else row
        update, candidate = gated(module.gated, inner, real)
        y = (1 - update) * row[real] + update * candidate
        if not module.prenorm:
            y = normed(module.norm, y)
        hidden = affine(module.ffn.up, normed(module.ffn_norm, y) if module.prenorm else y)
        y = y + affine(module.ffn.down, ACTIVATIONS[module.ffn.activation](hidden))
        out[b, real] = y if module.prenorm else normed(module.ffn_norm, y)
    return out, None


def logistic(x):
    return 1 / (1 + torch.exp(-x))


ACTIVATIONS = {F.silu: silu, gelu: lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2}
WEIGHTS = {
    "softmax": normalised,
    "relu2": lambda x: torch.where(x > 0, x, 0.0) ** 2,
    "laplace": lambda x: (1 + torch.erf((x - math.sqrt(1 / 2)) / math.sqrt(1 / (2 * math.pi)))) / 2,
}


def gated(gate, row, real):
    """Update gate and candidate of one row at its real positions."""
    moved = averaged(gate.average, row, real)[real]
    update, shared, reset, candidate = affine(gate.hidden, moved).split(gate.widths, dim=-1)
    shared, v = silu(shared), silu(affine(gate.value, row[real]))
    q, k = (gate.gain[i] * shared + gate.offset[i] for i in (0, 1))
    attended = torch.zeros_like(v)
    for first in range(0, len(row), gate.chunk or len(row)):
        stop = first + (gate.chunk or len(row))
        places = [n for n, i in enumerate(real) if first <= i < stop]
        if places:
            factor = q.shape[-1] ** -0.5 if gate.attention == "softmax" else 1 / len(places)
            scores = factor * q[places] @ k[places].T + bias_of(gate, [real[n] for n in places])
            attended[places] = WEIGHTS[gate.attention](scores) @ v[places]
    return logistic(update), silu(candidate + affine(gate.out, silu(reset) * attended))


def averaged(average, row, real):
    """silu(EMA + omega x), each direction a recurrence of its own over all positions."""
    held = [row[i] if i in set(real) else torch.zeros_like(row[i]) for i in range(len(row))]
    total = average.omega * row
    for direction in (0, 1):
        alpha, delta, beta, gamma = (
            getattr(average, name)[direction] for name in ("alpha", "delta", "beta", "gamma")
        )
        taken = logistic(alpha) * beta
        factor = 1 - logistic(alpha) * logistic(delta)
        order = range(len(row)) if direction == 0 else range(len(row))[::-1]
        inputs = [taken * held[t][:, None] for t in order]
        states = []
        for n in range(len(row)):
            if average.truncation is None:
                states.append(factor * states[-1] + inputs[n] if n else inputs[n])
            else:
                state = torch.zeros_like(taken)
                for one in inputs[max(0, n - average.truncation + 1) : n + 1]:
                    state = factor * state + one
                states.append(state)
        read = torch.stack(states).mul(gamma).sum(dim=-1) / math.sqrt(gamma.shape[-1])
        total = total + (read if direction == 0 else read.flip(0))
    return silu(total)


def bias_of(gate, at):
    """One number for each pair of places, by how far the key stands after the query."""
    after = torch.tensor([[j - i for j in at] for i in at])
    if gate.table is not None:
        return gate.table[after + (len(gate.table) - 1) // 2]
    half = gate.vectors.shape[1] // 2
    a, e = (torch.complex(vector[:half], vector[half:]) for vector in gate.vectors)
    speed = torch.tensor([10_000.0 ** (-n / half) for n in range(half)], dtype=torch.float64)
    turned = torch.exp(-1j * after[..., None] * speed)
    return (a * e.conj() * turned).sum(dim=-1).real


CASES = [
    {},
    {
        "key_width": 6,
        "d_state": 2,
        "attention": "laplace",
        "position_bias": "rotary",
        "chunk": 16,
        "norm": "scale",
        "prenorm": False,
        "activation": "silu",
    },
    {"key_width": 5, "d_state": 3, "expansion": 1, "attention": "relu2", "truncation": 4, "norm": "none"},
    {"key_width": 6, "d_state": 1, "position_bias": "rotary", "chunk": 7},
]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def plain_softmax(**own):
    q, k, v = draw(3, 37, 6), draw(3, 37, 6, seed=1), draw(3, 37, 10, seed=2)
    expected = dense_softmax(q[:, None], k[:, None], v[:, None], MASK)[:, 0]
    return distance(expected, mega_attention(q, k, v, MASK, **own))


def without_decay():
    """delta = -60 makes every factor 1: each direction is a running sum times a number for each channel."""
    x, alpha, beta, gamma = (
        draw(2, 37, 3),
        draw(2, 3, 4, seed=1),
        draw(2, 3, 4, seed=2),
        draw(2, 3, 4, seed=3),
    )
    found = moving_average(x, alpha, torch.full_like(alpha, -60.0), beta, gamma)
    past, future = (alpha.sigmoid() * beta * gamma).sum(dim=-1) / 2
    expected = past * x.cumsum(dim=1) + future * x.flip(1).cumsum(dim=1).flip(1)
    return distance(expected, found)


LIMITS = [
    Limit("attention=softmax without a bias is softmax attention", plain_softmax),
    Limit("a table of equal biases changes nothing", lambda: plain_softmax(table=draw(1).expand(79))),
    Limit("an average that forgets nothing is a running sum from both ends", without_decay),
]


def filtered(average, x):
    """The average by scipy: every state of every channel is a filter, over the row and the row reversed."""
    from scipy.signal import lfilter

    share = torch.special.expit(average.alpha)
    factor = 1 - share * torch.special.expit(average.delta)
    size = share * average.beta * average.gamma / math.sqrt(factor.shape[-1])
    total = (x * average.omega).numpy()
    for direction, step in ((0, 1), (1, -1)):
        for c in range(x.shape[-1]):
            for b, a in zip(size[direction, c].tolist(), factor[direction, c].tolist(), strict=True):
                total[:, :, c] += lfilter([b], [1, -a], x[:, :, c].numpy()[:, ::step])[:, ::step]
    return F.silu(torch.from_numpy(total))


def filters_of_scipy():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        average, x = MovingAverage(3, 4, None).double(), draw(2, 37, 3)
        return distance(filtered(average, x), average(x, None))


def operands(length):
    q, k, v = (draw(3, length, width, seed=width) for width in (6, 7, 10))
    return q, k[..., :6], v, draw(79, seed=4)  # offsets -39 ... 39


def biases_of_scipy(table, length):
    from scipy.linalg import toeplitz

    return torch.from_numpy(toeplitz(table[40 - length : 40].flip(0), table[39 : 39 + length]))


def attention_of_torch():
    q, k, v, table = operands(37)
    bias = biases_of_scipy(table, 37).masked_fill(~MASK[:, None], -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return distance(expected, mega_attention(q, k, v, MASK, table=table))


def distribution_of_scipy():
    """Two chunks of 20 and 17 tokens, each with its own count of keys."""
    from scipy.stats import norm

    q, k, v, table = operands(37)
    found = mega_attention(q, k, v, function="laplace", table=table, chunk=20)
    expected = []
    for s in (slice(0, 20), slice(20, 37)):
        n = s.stop - s.start
        scores = q[:, s] @ k[:, s].mT / n + biases_of_scipy(table, n)
        weights = norm.cdf(scores.numpy(), loc=math.sqrt(1 / 2), scale=math.sqrt(1 / (4 * math.pi)))
        expected.append(torch.from_numpy(weights) @ v[:, s])
    return distance(torch.cat(expected, dim=1), found)


ORACLES = [
    Oracle("scipy.signal.lfilter", "the average, one filter a state and direction", filters_of_scipy),
    Oracle(
        "torch.nn.functional.scaled_dot_product_attention, scipy.linalg.toeplitz",
        "attention=softmax with position_bias=simple, padded",
        attention_of_torch,
    ),
    Oracle(
        "scipy.stats.norm, scipy.linalg.toeplitz",
        "attention=laplace with position_bias=simple, in chunks",
        distribution_of_scipy,
    ),
]


def moved_on(args, kwargs):
    """The kernel of the past one position late."""
    return [args[0], args[1].roll(1, dims=-1), *args[2:]], kwargs


FAULTS = {
    "no scale": Plant("mega_attention", unscaled()),
    "no mask": Plant("mega_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("mega_attention", swapped, {"key_width": 32}),
    "window off by one": Plant("fft_conv", moved_on),
    "wrong eps": Plant("make_norm", other_eps),
}
