"""Nystromformer: three explicit matrices, the inverse by the printed iteration."""

import math

import torch

from models.nystrom import nystrom_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import (
    Limit,
    Oracle,
    affine,
    attention,
    dense_softmax,
    distance,
    draw,
    heads,
    normalised,
    rows,
)


def landmarks(module, q, k, real):
    """Means of queries and keys over the real tokens of each segment that has any; none for short rows.

    If padding counts, sums over real tokens divided by the full size, of every segment.
    """
    m, length = module.num_landmarks, q.shape[0]
    size = math.ceil(length / m)
    segments = [[i for i in real if i // size == s] for s in range(m)]
    if module.count_padding:
        return [torch.stack([x[s].sum(dim=0) / size for s in segments]) for x in (q, k)]
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
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
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
    {"num_landmarks": 5, "kernel_size": 0},
    {"num_landmarks": 3, "num_iterations": 2, "kernel_size": 3},
    {"num_landmarks": 4, "coupled_start": True},
    {"num_landmarks": 4, "count_padding": True},
]


def enough_landmarks():
    q, k, v = (draw(2, 2, 24, 8, seed=i) for i in range(3))
    mask = torch.arange(24) < torch.tensor([24, 5])[:, None]
    found = (
        distance(dense_softmax(q, k, v, mask), nystrom_attention(q, k, v, mask, num_landmarks=m))
        for m in (24, 64)
    )
    return max(found)


def alike_within_segments():
    q, k, v = (scale * draw(2, 2, 6, 8, seed=i) for i, scale in enumerate((2.0, 2.0, 1.0)))
    q, k, v = (x.repeat_interleave(4, dim=2) for x in (q, k, v))
    found = nystrom_attention(q, k, v, num_landmarks=6, num_iterations=30)
    return distance(dense_softmax(q, k, v), found)


LIMITS = [
    Limit("as many landmarks as tokens, or more, masked: softmax", enough_landmarks),
    Limit("tokens alike within segments, the inverse iterated to its end: softmax", alike_within_segments),
]


def nystrom_attention_package():
    import nystrom_attention as package

    with torch.random.fork_rng([]):
        oracle = package.NystromAttention(16, dim_head=8, heads=2, num_landmarks=6, residual_conv_kernel=5)
    oracle, errors = oracle.double(), []
    for real in (
        [24, 24],
        [24, 22],
    ):  # the last segment keeps a token: without one the package divides by eps
        x, mask = 3 * draw(2, 24, 16), torch.arange(24) < torch.tensor(real)[:, None]
        q, k, v = oracle.to_qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        options = {"num_landmarks": 6, "conv_weight": oracle.res_conv.weight, "coupled_start": True}
        found = oracle.to_out(nystrom_attention(q, k, v, mask, **options).transpose(1, 2).flatten(2))
        errors.append(distance(oracle(x, mask=mask)[mask], found[mask]))
    return max(errors)


def transformers_module():
    from transformers.models.nystromformer import configuration_nystromformer as configuration
    from transformers.models.nystromformer import modeling_nystromformer as modeling

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_landmarks": 6, "segment_means_seq_len": 24}
    config = configuration.NystromformerConfig(**sizes, conv_kernel_size=5)
    with torch.random.fork_rng([]):
        oracle = modeling.NystromformerSelfAttention(config).double().eval()
    projections = (oracle.query, oracle.key, oracle.value)
    x, mask = 3 * draw(2, 24, 16), torch.arange(24) < torch.tensor([24, 9])[:, None]
    with torch.no_grad():
        for projection in projections:
            projection.bias.zero_()  # then zeros in are zeros out, as the authors' code makes padding
        x = x * mask[..., None]
        expected = oracle(x, attention_mask=torch.where(mask, 0.0, -1e9)[:, None, None, :].double())[0]
        q, k, v = (projection(x).unflatten(-1, (2, 8)).transpose(1, 2) for projection in projections)
        options = {"num_landmarks": 6, "conv_weight": oracle.conv.weight}
        options |= {"coupled_start": True, "count_padding": True}
        found = nystrom_attention(q, k, v, mask, **options).transpose(1, 2).flatten(2)
    return distance(expected, found)


ORACLES = [
    Oracle(
        "nystrom-attention 0.0.14",
        "a module's projections and convolution, padded and not",
        nystrom_attention_package,
    ),
    Oracle(
        "transformers 5.23",
        "NystromformerSelfAttention, the authors' code, with four empty segments as landmarks",
        transformers_module,
    ),
]

FAULTS = {
    **attention_faults("nystrom_attention", num_landmarks=4),
    "window off by one": Plant(
        "nystrom_attention", changed(conv_weight=lambda w: w.roll(1, dims=-2)), {"num_landmarks": 4}
    ),
}
