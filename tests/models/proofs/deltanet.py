"""DeltaNet: what is under a key is read, and moved towards the new value, token by token."""

import math

import torch

from models.delta_rule import delta_rule
from proofs.faults import Plant, changed, other_eps, swapped
from proofs.kit import Limit, Oracle, affine, distance, draw, file_of, rows, silu

NORM_EPS, UNIT_EPS = 1e-5, 1e-6


FEATURES = {
    "silu": silu,
    "relu": lambda x: x * (x > 0),
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0))),
    "identity": lambda x: x,
}
LENGTHS = {
    "l2": lambda x: torch.sqrt((x * x).sum(dim=-1, keepdim=True) + UNIT_EPS),
    "l1": lambda x: x.abs().sum(dim=-1, keepdim=True) + UNIT_EPS,
}


def features(module, x):
    x = FEATURES[module.feature_map](x).reshape(len(x), module.place.num_heads, module.d)
    return x / LENGTHS[module.qk_norm](x)


def one_way(module, s, x, real):
    """x [l width], real [l]: 0 where the row, read in this order, has padding or a hole -> [l h e]."""
    h, d, e = module.place.num_heads, module.d, module.e
    taps = module.conv[s]  # [channels w]
    u = affine(module.project, x) * real[:, None]
    u = torch.stack(
        [sum(taps[:, j] * u[t - j] for j in range(taps.shape[1]) if j <= t) for t in range(len(u))]
    )
    q, k = features(module, u[:, : h * d]), features(module, u[:, h * d : 2 * h * d])
    v = silu(u[:, 2 * h * d :]).reshape(-1, h, e)
    rates = affine(module.rates, x)[:, h * s : h * (s + 1)]
    beta = (2 if module.largest_beta == 2 else 1) / (1 + torch.exp(-rates)) * real[:, None]
    state, out = torch.zeros(h, e, d, dtype=x.dtype), []
    for t in range(len(x)):
        old = (state @ k[t, :, :, None])[..., 0]
        new = beta[t, :, None] * v[t] + (1 - beta[t, :, None]) * old
        state = state + (new - old)[:, :, None] * k[t, :, None, :]
        out.append((state @ q[t, :, :, None])[..., 0] / math.sqrt(d))
    out = torch.stack(out)
    return out / torch.sqrt((out * out).mean(dim=-1, keepdim=True) + NORM_EPS) * module.norm[s]


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        is_real = torch.tensor([float(i in real) for i in range(len(row))], dtype=x.dtype)
        mixed = one_way(module, 0, row, is_real)
        if module.directions != "forward":
            back = one_way(module, int(module.directions == "untied"), row.flip(0), is_real.flip(0))
            mixed = mixed + back.flip(0)
        if real:
            out[b, real] = affine(module.out, mixed[real].flatten(1))
    return out


CASES = [
    {},
    {"directions": "untied", "feature_map": "elu", "qk_norm": "l1", "expand_k": 0.5},
    {"directions": "forward", "feature_map": "identity", "expand_v": 2.0, "neg_eigval": True},
    {"feature_map": "relu", "kernel_size": 1},
]


def limit_of_linear_attention():
    """Orthonormal keys, each written once and wholly: nothing is found under a key before it is written."""
    q, v = draw(1, 8, 2, 8), draw(1, 8, 2, 5, seed=1)
    k = torch.linalg.qr(draw(2, 8, 8, seed=2)).Q.transpose(0, 1)[None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    found = delta_rule(q, k, v, torch.ones(1, 8, 2, dtype=torch.float64))
    return distance(torch.einsum("bhij,bjhe->bihe", scores, v), found)


def limit_of_one_key():
    """One key, written to with beta: the exponential moving average of the values."""
    v, beta = draw(1, 150, 1, 5), draw(1, 150, 1, seed=1).sigmoid()
    k = draw(1, 1, 1, 8, seed=2)
    k = (k / torch.linalg.vector_norm(k, dim=-1, keepdim=True)).expand(1, 150, 1, 8)
    mean, means = torch.zeros(5, dtype=torch.float64), []
    for t in range(150):
        mean = mean + beta[0, t] * (v[0, t, 0] - mean)
        means.append(mean)
    return distance(torch.stack(means)[None, :, None], delta_rule(k, k, v, beta))


def limit_of_the_gated_rule():
    q, k, v = draw(2, 100, 2, 8), draw(2, 100, 2, 8, seed=1) / 4, draw(2, 100, 2, 5, seed=2)
    beta = draw(2, 100, 2, seed=3).sigmoid()
    return distance(delta_rule(q, k, v, beta, torch.zeros_like(beta)), delta_rule(q, k, v, beta))


LIMITS = [
    Limit("orthonormal keys, beta = 1: linear attention", limit_of_linear_attention),
    Limit("one key throughout: an exponential moving average of the values", limit_of_one_key),
    Limit("the gated rule, its decays zero", limit_of_the_gated_rule),
]


def against_fla():
    """Its chunkwise form, chunks of 32 and keys of length at most 1; it divides by the square root of d."""
    naive = file_of("fla", "ops/delta_rule/naive.py")
    q, k, v = draw(2, 2, 160, 8), draw(2, 2, 160, 8, seed=1), draw(2, 2, 160, 5, seed=2)
    k, beta = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True), draw(2, 2, 160, seed=3).sigmoid()
    theirs, _ = naive.delta_rule_chunkwise(q, k, v, beta)  # [b h l e]
    ours = delta_rule(*(x.transpose(1, 2) for x in (q, k, v, beta)), scale=8**-0.5)
    return distance(theirs.transpose(1, 2), ours)


ORACLES = [Oracle("fla-core 0.6.0, ops/delta_rule/naive.py", "its chunkwise form, 160 tokens", against_fla)]


def without_mask(args, kwargs):
    args[2] = None
    return args, kwargs


def convolved_late(args, kwargs):
    """Position t gets what belongs to t - 1."""
    args[0] = torch.nn.functional.pad(args[0], (0, 0, 1, 0))[..., :-1, :]
    return args, kwargs


FAULTS = {
    "no scale": Plant("delta_rule", changed(scale=lambda scale: 1.0)),
    "no mask": Plant("both_directions", without_mask, check="content_invariance"),
    "k and v swapped": Plant("delta_rule", swapped),
    "window off by one": Plant("queries_keys_values", convolved_late),
    "wrong eps": Plant("rms_norm", other_eps),
}
