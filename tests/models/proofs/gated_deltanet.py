"""Gated DeltaNet: its recurrence, token by token."""

import math

import torch

from models import Place, build
from models.delta_rule import delta_rule
from proofs.faults import Plant, changed, other_eps, swapped
from proofs.kit import Limit, Oracle, affine, distance, draw, file_of, rows, silu

NORM_EPS, UNIT_EPS = 1e-5, 1e-6


def short_convolution(u, weight):
    """y_t = sum over j of weight[:, j] u_(t-j), nothing before the start: u [l c], weight [c w]."""
    u = torch.cat([torch.zeros(weight.shape[1] - 1, u.shape[1], dtype=u.dtype), u])
    return torch.stack(
        [
            (u[t : t + weight.shape[1]] * weight.T.flip(0)).sum(dim=0)
            for t in range(len(u) - weight.shape[1] + 1)
        ]
    )


def unit(x):
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + UNIT_EPS)


def memory(q, k, v, beta, decay):
    """The state of each head as [values keys], as in the papers: q, k [l h d], v [l h e] -> [l h e]."""
    state, out = torch.zeros(*v.shape[1:], k.shape[2], dtype=q.dtype), []
    eye = torch.eye(k.shape[2], dtype=q.dtype)
    for t in range(len(q)):
        outer = k[t, :, :, None] * k[t, :, None, :]
        step = decay[t, :, None, None] * (eye - beta[t, :, None, None] * outer)
        state = state @ step + beta[t, :, None, None] * v[t, :, :, None] * k[t, :, None, :]
        out.append((state @ q[t, :, :, None])[..., 0])
    return torch.stack(out)


def one_way(module, s, x, real):
    """x [l width], real [l]: 0 where the row, read in this order, has padding or a hole -> [l h e]."""
    h, d, e = module.place.num_heads, module.d, module.e
    u = silu(short_convolution(affine(module.project, x) * real[:, None], module.conv[s]))
    q, k, v = u[:, : h * d], u[:, h * d : 2 * h * d], u[:, 2 * h * d :]
    q, k, v = unit(q.reshape(-1, h, d)), unit(k.reshape(-1, h, d)), v.reshape(-1, h, e)
    rates = affine(module.rates, x)[:, 2 * h * s : 2 * h * (s + 1)]
    beta = (2 if module.largest_beta == 2 else 1) / (1 + torch.exp(-rates[:, :h])) * real[:, None]
    step = torch.log1p(torch.exp(rates[:, h:] + module.step_bias[s]))
    decay = torch.exp(-torch.exp(module.log_rate[s]) * step * real[:, None])
    out = memory(q / math.sqrt(d), k, v, beta, decay)
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
            gate = silu(affine(module.gate, row[real]))
            out[b, real] = affine(module.out, mixed[real].reshape(len(real), -1) * gate)
    return out


CASES = [{}, {"directions": "untied", "neg_eigval": True}, {"directions": "forward", "expand_v": 1.0}]


def limit_of_linear_attention():
    """Orthonormal keys, each written once and wholly: nothing is found under a key before it is written."""
    q, v, length = draw(1, 8, 2, 8), draw(1, 8, 2, 5, seed=1), 8
    k = torch.linalg.qr(draw(2, length, length, seed=2)).Q.transpose(0, 1)[None]
    ones = torch.ones(1, length, 2, dtype=torch.float64)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    found = delta_rule(q, k, v, ones, torch.zeros_like(ones))
    return distance(torch.einsum("bhij,bjhe->bihe", scores, v), found)


def limit_of_one_key():
    """A key written to again and again, beta = 1 and no decay, holds the last value."""
    v, ones = draw(1, 150, 2, 5), torch.ones(1, 150, 2, dtype=torch.float64)
    k = draw(1, 1, 2, 8, seed=1)
    k = (k / torch.linalg.vector_norm(k, dim=-1, keepdim=True)).expand(1, 150, 2, 8)
    return distance(v, delta_rule(k, k, v, ones, torch.zeros_like(ones)))


LIMITS = [
    Limit("orthonormal keys, beta = 1, no decay: linear attention", limit_of_linear_attention),
    Limit("one key throughout, beta = 1, no decay: the last value", limit_of_one_key, tolerance=1e-8),
]


def against_fla():
    naive = file_of("fla", "ops/gated_delta_rule/naive.py")
    q, k, v = draw(2, 150, 2, 8), draw(2, 150, 2, 8, seed=1), draw(2, 150, 2, 5, seed=2)
    k = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True)
    beta, decay = draw(2, 150, 2, seed=3).sigmoid(), -draw(2, 150, 2, seed=4).abs() / 4
    theirs, _ = naive.naive_recurrent_gated_delta_rule(q, k, v, beta, decay, scale=0.3)
    return distance(theirs, delta_rule(q, k, v, beta, decay, scale=0.3))


def against_transformers():
    """Their projection holds query, key, value and gate head by head, their other one beta and decay."""
    from transformers.models.qwen3_next import configuration_qwen3_next as configuration
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling
    from transformers.utils import logging

    sizes = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_value_head_dim": 16}
    config = configuration.Qwen3NextConfig(
        hidden_size=16, linear_key_head_dim=8, rms_norm_eps=NORM_EPS, num_hidden_layers=1, **sizes
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        theirs = modeling.Qwen3NextGatedDeltaNet(config, 0)
        place = Place(d_model=16, num_heads=2, max_len=150, bias=False)
        ours = build("gated_deltanet", place, directions="forward")
    with torch.no_grad():
        q, k, v = ours.project.weight.split([16, 16, 32])
        parts = [part.unflatten(0, (2, -1)) for part in (q, k, v, ours.gate.weight)]
        theirs.in_proj_qkvz.weight.copy_(torch.cat(parts, dim=1).flatten(0, 1))
        beta, decay = ours.rates.weight.chunk(2)
        theirs.in_proj_ba.weight.copy_(torch.stack([beta, decay], dim=1).flatten(0, 1))
        theirs.conv1d.weight.copy_(ours.conv[0].flip(1)[:, None])
        theirs.A_log.copy_(ours.log_rate[0]), theirs.dt_bias.copy_(ours.step_bias[0])
        ours.norm[0].copy_(1 + draw(16) / 4), theirs.norm.weight.copy_(ours.norm[0])
        theirs.out_proj.weight.copy_(ours.out.weight)
        x, verbosity = draw(2, 150, 16, seed=1).float(), logging.get_verbosity()
        logging.set_verbosity_error()  # it tells which kernels it misses
        try:
            return distance(theirs(x), ours(x))
        finally:
            logging.set_verbosity(verbosity)


ORACLES = [
    Oracle(
        "fla-core 0.6.0, ops/gated_delta_rule/naive.py",
        "the recurrence in float32, 150 tokens",
        against_fla,
        tolerance=1e-5,
    ),
    Oracle(
        "transformers 5.23 Qwen3NextGatedDeltaNet",
        "the whole layer, causal, in float32, our weights in its order",
        against_transformers,
        tolerance=1e-4,
    ),
]


def without_mask(args, kwargs):
    args[2] = None
    return args, kwargs


def decays_late(args, kwargs):
    """Position t decays by what belongs to t - 1."""
    args[4] = torch.nn.functional.pad(args[4], (0, 0, 1, 0))[:, :-1]
    return args, kwargs


FAULTS = {
    "no scale": Plant("delta_rule", changed(scale=lambda scale: 1.0)),
    "no mask": Plant("both_directions", without_mask, check="content_invariance"),
    "k and v swapped": Plant("delta_rule", swapped, {"expand_v": 1.0}),
    "window off by one": Plant("delta_rule", decays_late),
    "wrong eps": Plant("rms_norm", other_eps),
}
