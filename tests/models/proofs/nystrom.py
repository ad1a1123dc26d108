"""Nystromformer: three explicit matrices, the inverse by the printed iteration."""

import math

import torch

from proofs.faults import Plant, attention_faults, changed
from proofs.kit import affine, attention, heads, normalised, rows


def landmarks(module, q, k, real):
    """Means of queries and keys over the real tokens of each segment that has any; none for short rows."""
    m, length = module.num_landmarks, q.shape[0]
    size = math.ceil(length / m)
    segments = [[i for i in real if i // size == s] for s in range(m)]
    return [torch.stack([x[s].mean(dim=0) for s in segments if s]) for x in (q, k)]


def reference(module, x, mask=None):
    out, parts = torch.zeros_like(x), []
    for b, row, real in rows(x, mask):
        for head, q, k, _ in heads(module, row):
            if real and len(q) > module.num_landmarks:
                q_mean, k_mean = landmarks(module, q, k, real)
                parts.append((b, head, normalised(q_mean @ k_mean.T / math.sqrt(q.shape[-1]))))
    norms = {(b, head): (a.sum(dim=0).max(), a.sum(dim=1).max()) for b, head, a in parts}
    if module.coupled_start and norms:
        together = [torch.stack([n[i] for n in norms.values()]).max() for i in (0, 1)]
        norms = {key: together for key in norms}
    inverses = {}
    for b, head, a in parts:
        z, eye = a.T / (norms[b, head][0] * norms[b, head][1]), torch.eye(len(a), dtype=a.dtype)
        for _ in range(module.num_iterations):
            z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
        inverses[b, head] = z
    for b, row, real in rows(x, mask):
        mixed = []
        for head, q, k, v in heads(module, row):
            if not real:
                continue
            if (b, head) in inverses:
                q_mean, k_mean = landmarks(module, q, k, real)
                scale = math.sqrt(q.shape[-1])
                one = normalised(q @ k_mean.T / scale) @ inverses[b, head]
                one = one @ normalised(q_mean @ k[real].T / scale) @ v[real]
            else:
                one = attention(q, k[real], v[real])
            if module.conv_weight is not None:
                one = one + convolved(module.conv_weight[head, 0, :, 0], v, real)
            mixed.append(one)
        if real:
            out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
    return out


def convolved(weight, v, real):
    """Position i gets sum_t weight_t v_(i + t - centre) over the real positions i + t - centre."""
    centre, present = len(weight) // 2, set(real)
    out = []
    for i in range(len(v)):
        taken = [t for t in range(len(weight)) if i + t - centre in present]
        terms = [weight[t] * v[i + t - centre] for t in taken]
        out.append(torch.stack(terms).sum(dim=0) if terms else torch.zeros_like(v[0]))
    return torch.stack(out)


CASES = [
    {},
    {"num_landmarks": 4},
    {"num_landmarks": 5, "conv_kernel": 0},
    {"num_landmarks": 3, "num_iterations": 2, "conv_kernel": 3},
    {"num_landmarks": 4, "coupled_start": True},
]

FAULTS = {
    **attention_faults("nystrom_attention", num_landmarks=4),
    "window off by one": Plant(
        "nystrom_attention", changed(conv_weight=lambda w: w.roll(1, dims=-2)), {"num_landmarks": 4}
    ),
}
