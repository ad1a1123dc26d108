"""Gated linear attention: the recurrence token by token, once from each end."""

import math

import torch

from models import Place, build
from models.gla import gla
from proofs.faults import Plant, late, other_eps, swapped, unmasked, unscaled
from proofs.kit import NORM_EPS, SINGLE, Limit, Oracle, affine, distance, draw, file_of, rows

CASES = [{}, {"directions": "untied", "expand_k": 1.0, "head_norm": "layer"}, {"directions": "forward"}]


def one_way(streams, x, real, heads, tau):
    """Outputs of the tokens `real` in that order: {token: [h e]}."""
    keys, values = streams.widths[0] // heads, streams.widths[2] // heads
    q, k, v = torch.split(affine(streams.qkv, x), streams.widths, dim=1)
    decay = torch.sigmoid(affine(streams.decay_up, affine(streams.decay_down, x))) ** (1 / tau)
    state, out = [x.new_zeros(keys, values) for _ in range(heads)], {}
    for i in real:
        parts = []
        for head in range(heads):
            d, e = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
            state[head] = decay[i, d, None] * state[head] + torch.outer(k[i, d], v[i, e])
            parts.append(q[i, d] @ state[head] / math.sqrt(keys))
        out[i] = torch.stack(parts)
    return out


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    heads = module.place.num_heads
    for b, row, real in rows(x, mask):
        there = one_way(module.there, row, real, heads, module.there.tau)
        back = {}
        if module.directions != "forward":
            streams = module.there if module.back is None else module.back
            back = one_way(streams, row, real[::-1], heads, module.there.tau)
        gate = affine(module.gate, row)
        for i in real:
            o = there[i] + back.get(i, 0)
            if module.head_norm == "layer":
                o = o - o.mean(dim=1, keepdim=True)
            o = o / torch.sqrt((o**2).mean(dim=1, keepdim=True) + NORM_EPS) * module.norm_weight
            out[b, i] = affine(module.out, o.flatten() * gate[i] * torch.sigmoid(gate[i]))
    return out


def limit_of_linear_attention():
    """No decay: q_i . (sum of all k_j v_j^T and once more the token's own)."""
    q, k, v = draw(3, 2, 70, 2, 4)
    mask = (torch.arange(70) % 3 != 1).expand(2, 70)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2 * mask[:, None, None, :]
    scores = scores + torch.diag_embed(torch.diagonal(scores, dim1=-2, dim2=-1))
    expected = torch.einsum("bhij,bjhe->bihe", scores, v)
    found = gla(q, k, v, torch.zeros_like(q), mask)
    return distance(expected[mask], found[mask])


def limit_of_the_token_alone():
    """Full decay: nothing is seen but the token itself, by each direction once."""
    q, k, v = draw(3, 2, 70, 2, 4)
    found = gla(q, k, v, torch.full_like(q, -1e4))
    return distance((q * k).sum(dim=-1, keepdim=True) * v, found)


LIMITS = [
    Limit(
        "decays of one: linear attention, the token itself twice, a mask with holes",
        limit_of_linear_attention,
    ),
    Limit("decays of zero: each token sees itself alone", limit_of_the_token_alone),
]


def against_fla(reverse=False):
    """The file computes in float32."""
    naive = file_of("fla", "ops/gla/naive.py")
    q, k, v = draw(3, 2, 100, 2, 8)
    log_decay = -(draw(2, 100, 2, 8, seed=1) ** 2)
    expected = naive.naive_recurrent_gla(q, k, v, log_decay)[0]
    if not reverse:
        return distance(expected, gla(q, k, v, log_decay, directions="forward"))
    back = naive.naive_recurrent_gla(*(x.flip(1) for x in (q, k, v, log_decay)))[0].flip(1)
    return distance(expected + back, gla(q, k, v, log_decay))


def layer_against_fla():
    """Decays of the layer too: alpha of section 4.4, as float64 of our weights."""
    naive = file_of("fla", "ops/gla/naive.py")
    with torch.random.fork_rng([]):
        layer = build("gla", Place(d_model=16, num_heads=2, max_len=40), directions="forward").double()
    x = draw(2, 40, 16)
    with torch.no_grad():
        q, k, v, _ = layer.there(x)
        alpha = torch.sigmoid(
            x @ layer.there.decay_down.weight.T @ layer.there.decay_up.weight.T + layer.there.decay_up.bias
        ) ** (1 / 16)
        o = naive.naive_recurrent_gla(q, k, v, alpha.log().unflatten(-1, (2, -1)))[0]
        o = torch.nn.functional.rms_norm(o, o.shape[-1:], layer.norm_weight, NORM_EPS).flatten(2)
        expected = layer.out(o * torch.nn.functional.silu(layer.gate(x)))
        return distance(expected, layer(x))


SOURCE = "fla-core 0.6.0, ops/gla/naive.py"
ORACLES = [
    Oracle(SOURCE, "forward, outputs of naive_recurrent_gla", against_fla, SINGLE),
    Oracle(SOURCE, "tied, outputs from both ends added", lambda: against_fla(reverse=True), SINGLE),
    Oracle(SOURCE, "forward, a whole layer with torch's rms_norm", layer_against_fla, SINGLE),
]


FAULTS = {
    "no scale": Plant("gla", unscaled()),
    "no mask": Plant("gla", unmasked, check="content_invariance"),
    "k and v swapped": Plant("gla", swapped, {"expand_k": 1.0}),
    "window off by one": Plant("gla", late(3)),  # decays
    "wrong eps": Plant("head_norm", other_eps),
}
