"""The mean of all real tokens."""

import torch

from models import Place, build
from models.global_mean import global_mean
from proofs.faults import NO_KEYS, NO_SCALE, NO_WINDOW, Plant, unmasked
from proofs.kit import Limit, Oracle, affine, dense_softmax, distance, draw, rows


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if real:
            mean = sum(affine(module.value, row[i]) for i in real) / len(real)
            out[b, real] = affine(module.out, mean)
    return out


CASES = [{}]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def equal_scores():
    v = draw(3, 37, 8)
    alike = torch.zeros(3, 1, 37, 8, dtype=v.dtype)
    expected = dense_softmax(alike, alike, v[:, None], MASK)[:, 0]
    return distance(expected, global_mean(v, MASK))


def multihead():
    """Queries and keys of torch's module are zero, so that its weights are all equal."""
    with torch.random.fork_rng(devices=[]):
        module = build("global_mean", Place(d_model=16, num_heads=2, max_len=37)).double()
        oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64).eval()
    oracle.in_proj_weight.data = torch.cat([torch.zeros(32, 16).double(), module.value.weight.data])
    oracle.in_proj_bias.data = torch.cat([torch.zeros(32).double(), module.value.bias.data])
    oracle.out_proj.weight.data, oracle.out_proj.bias.data = module.out.weight.data, module.out.bias.data
    x = draw(3, 37, 16)
    expected, _ = oracle(x, x, x, key_padding_mask=~MASK)
    return distance(expected[MASK], module(x, MASK)[MASK])


LIMITS = [Limit("softmax attention whose scores are all equal", equal_scores)]

ORACLES = [Oracle("torch.nn.MultiheadAttention", "queries and keys zero, other weights copied", multihead)]

FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("global_mean", unmasked, check="content_invariance"),
    "k and v swapped": NO_KEYS,
    "window off by one": NO_WINDOW,
    "wrong eps": "counts are at least 1",
}
