"""RetNet: the recurrence position by position, once from each end, the token itself by the first alone."""

import math

import torch

from models.retnet import log_gammas, retention
from proofs.faults import Plant, late, other_eps, swapped, unmasked, unscaled
from proofs.kit import SINGLE, Limit, Oracle, affine, distance, draw, file_of, rotated, rows

EPS = 1e-6
CASES = [{}, {"directions": "untied", "expand_v": 1.0, "head_norm": "rms"}, {"directions": "forward"}]


def one_way(module, linear, x, real, order, itself):
    """What positions read from the state, in this order, after or before their own: {position: [h e]}."""
    heads, keys = module.place.num_heads, module.place.head_dim
    values = module.widths[2] // heads
    q, k, v = torch.split(affine(linear, x), module.widths, dim=1)
    out = {i: [] for i in order}
    for head in range(heads):
        d, e = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
        turned_q, turned_k = rotated(q[:, d], 10_000.0), rotated(k[:, d], 10_000.0)
        state, gamma = x.new_zeros(keys, values), 1 - 2 ** (-5.0 - head)
        for i in order:
            state = gamma * state
            seen = state
            if i in real:
                state = state + torch.outer(turned_k[i], v[i, e])
            out[i].append(turned_q[i] @ (state if itself else seen) / math.sqrt(keys))
    return {i: torch.stack(parts) for i, parts in out.items()}


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        every, among = list(range(len(row))), set(real)
        there = one_way(module, module.there, row, among, every, itself=True)
        back = {}
        if module.directions != "forward":
            linear = module.there if module.back is None else module.back
            back = one_way(module, linear, row, among, every[::-1], itself=False)
        gate = affine(module.gate, row)
        for i in real:
            o = there[i] + back.get(i, 0)
            if module.head_norm == "layer":
                o = o - o.mean(dim=1, keepdim=True)
            o = o / torch.sqrt((o**2).mean(dim=1, keepdim=True) + EPS)
            out[b, i] = affine(module.out, o.flatten() * gate[i] * torch.sigmoid(gate[i]))
    return out


def decay_powers(length, heads):
    """gamma_h^|i-j|: [h l l]."""
    positions = torch.arange(length, dtype=torch.float64)
    gammas = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    return gammas[:, None, None] ** (positions[:, None] - positions).abs()


def limit_of_the_matrix():
    q, k, v = draw(3, 2, 150, 3, 4)
    mask = (torch.arange(150) % 3 != 1).expand(2, 150)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2 * decay_powers(150, 3) * mask[:, None, None, :]
    expected = torch.einsum("bhij,bjhe->bihe", scores, v)
    return distance(expected[mask], retention(q, k, v, log_gammas(3), mask)[mask])


def limit_of_linear_attention():
    """gamma = 1: the explicit product of all scores, each token once."""
    q, k, v = draw(3, 2, 70, 3, 4)
    expected = torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v) / 2
    return distance(expected, retention(q, k, v, torch.zeros(3, dtype=torch.float64)))


LIMITS = [
    Limit("the matrix (Q K^T * gamma^|i-j|) V, a mask with holes", limit_of_the_matrix),
    Limit("gamma of 1: the explicit product Q K^T V", limit_of_linear_attention),
]


def against_fla(reverse=False):
    """The file computes in float32 and takes [b h l d]."""
    naive = file_of("fla", "ops/retention/naive.py").naive_retention
    q, k, v = draw(3, 2, 150, 3, 8)
    expected = naive(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    if not reverse:
        return distance(expected, retention(q, k, v, log_gammas(3), directions="forward"))
    back = naive(*(x.flip(1).transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flip(1)
    itself = (q * k).sum(dim=-1, keepdim=True) * v / math.sqrt(8)
    return distance(expected + back - itself, retention(q, k, v, log_gammas(3)))


SOURCE = "fla-core 0.6.0, ops/retention/naive.py"
ORACLES = [
    Oracle(SOURCE, "forward, outputs of naive_retention", against_fla, SINGLE),
    Oracle(SOURCE, "tied, its two ways less the token itself", lambda: against_fla(reverse=True), SINGLE),
]


FAULTS = {
    "no scale": Plant("retention", unscaled()),
    "no mask": Plant("retention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("retention", swapped, {"expand_v": 1.0}),
    "window off by one": Plant("retention", late(1, 2)),  # keys and values
    "wrong eps": Plant("head_norm", other_eps),
}
