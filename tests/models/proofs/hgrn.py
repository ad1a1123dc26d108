"""HGRN: the recurrence token by token in complex numbers, once from each end."""

import torch

from models import Place, build
from models.hgrn import hgru
from proofs.faults import NO_KEYS, NO_SCALE, Plant, late, other_eps, unmasked
from proofs.kit import NORM_EPS, SINGLE, Limit, Oracle, affine, distance, draw, file_of, rows

CASES = [
    {},
    {"directions": "untied", "recurrence": "real"},
    {"directions": "theta"},
    {"directions": "forward", "lower_bound": False},
]


def floor(module):
    """f: the shares of the layers below, by a softmax over layers."""
    if module.floors is None:
        return 0.0
    weights = torch.exp(module.floors)
    return weights[: module.place.layer_index].sum(dim=0) / weights.sum(dim=0)


def one_way(module, streams, theta, x, order):
    """The state after each token of `order`: {token: [w]}."""
    width = streams.decay.out_features
    forget = floor(module) + (1 - floor(module)) * torch.sigmoid(affine(streams.decay, x))
    content = affine(streams.input, x)
    content = content * torch.sigmoid(content)
    if theta is not None:
        content = content[:, :width] + 1j * content[:, width:]
    turn = 1.0 if theta is None else torch.cos(theta) + 1j * torch.sin(theta)
    state, out = torch.zeros_like(content[0]), {}
    for i in order:
        state = forget[i] * turn * state + (1 - forget[i]) * content[i]
        out[i] = state
    return out


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        theta = getattr(module.there, "theta", None)
        there = one_way(module, module.there, theta, row, real)
        back = {}
        if module.directions == "untied":
            back = one_way(module, module.back, getattr(module.back, "theta", None), row, real[::-1])
        elif module.directions != "forward":
            other = theta if module.theta_back is None else module.theta_back
            back = one_way(module, module.there, other, row, real[::-1])
        gate = affine(module.gate, row)
        for i in real:
            h = there[i] + back.get(i, 0)
            h = torch.cat([h.real, h.imag]) if h.is_complex() else h
            h = (h - h.mean()) / torch.sqrt(((h - h.mean()) ** 2).mean() + NORM_EPS)
            h = h * module.norm_weight + module.norm_bias
            out[b, i] = affine(module.out, h * gate[i] * torch.sigmoid(gate[i]))
    return out


def limit_of_a_running_sum():
    """l = 1, t = 0: sums from both ends, the token itself twice."""
    update = torch.complex(*draw(2, 2, 70, 4))
    mask = (torch.arange(70) % 3 != 1).expand(2, 70)
    kept = update * mask[..., None]
    found = hgru(torch.zeros_like(update), update, mask)
    return distance(
        torch.view_as_real(kept.sum(dim=1, keepdim=True) + update)[mask], torch.view_as_real(found)[mask]
    )


def limit_of_a_fourier_sum():
    """l = 1 and angles 2 pi n / L: the last states are a discrete Fourier transform."""
    update = torch.complex(*draw(2, 2, 64, 1)).expand(2, 64, 64)
    angles = 2j * torch.pi * torch.arange(64, dtype=torch.float64) / 64
    found = hgru(angles.expand(2, 64, 64), update, directions="forward")[:, -1]
    expected = torch.fft.ifft(update[..., 0].flip(1), norm="forward")
    return distance(torch.view_as_real(expected), torch.view_as_real(found))


LIMITS = [
    Limit(
        "decays of 1 without angles: running sums from both ends, a mask with holes", limit_of_a_running_sum
    ),
    Limit(
        "decays of 1 with angles 2 pi n / L: torch's inverse FFT of the reversed row", limit_of_a_fourier_sum
    ),
]


def against_fla(reverse=False):
    """The file computes in float32."""
    naive = file_of("fla", "ops/hgrn/naive.py").naive_recurrent_hgrn
    x, log_decay = draw(2, 100, 8), -(draw(2, 100, 8, seed=1) ** 2)
    expected = naive(x, log_decay)[0]
    if not reverse:
        return distance(expected, hgru(log_decay, x, directions="forward"))
    back = naive(x.flip(1), log_decay.flip(1))[0].flip(1)
    return distance(expected + back, hgru(log_decay, x))


def layer_against_fla():
    """A layer with a lower bound: gates by the formula, states by the package."""
    naive = file_of("fla", "ops/hgrn/naive.py").naive_recurrent_hgrn
    place = Place(d_model=8, num_heads=2, max_len=40, layer_index=2, num_layers=4)
    with torch.random.fork_rng([]):
        layer = build("hgrn", place, directions="forward", recurrence="real").double()
    x = draw(2, 40, 8)
    with torch.no_grad():
        layer.floors.copy_(draw(4, 8, seed=2))
        f = layer.floors.softmax(dim=0).cumsum(dim=0)[1]
        decay = f + (1 - f) * layer.there.decay(x).sigmoid()
        states = naive((1 - decay) * torch.nn.functional.silu(layer.there.input(x)), decay.log())[0]
        states = torch.nn.functional.layer_norm(states, (8,), layer.norm_weight, layer.norm_bias)
        expected = layer.out(states * torch.nn.functional.silu(layer.gate(x)))
        return distance(expected, layer(x))


SOURCE = "fla-core 0.6.0, ops/hgrn/naive.py"
ORACLES = [
    Oracle(SOURCE, "forward, real states of naive_recurrent_hgrn", against_fla, SINGLE),
    Oracle(SOURCE, "tied, states from both ends added", lambda: against_fla(reverse=True), SINGLE),
    Oracle(SOURCE, "a whole real layer, the third of four, its bound by cumsum", layer_against_fla, SINGLE),
]


FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("hgru", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": Plant("hgru", late(0)),  # decays
    "wrong eps": Plant("normed", other_eps),
}
