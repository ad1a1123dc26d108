"""Based: the polynomial of an explicit score matrix, a list of near keys for each query, or both added."""

import math

import torch

from models import Place, build
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, attention, by_head, dense_softmax, distance, draw, file_of


@by_head
def reference(module, head, q, k, v, real):
    even = module.place.layer_index % 2 == 0
    out = torch.zeros_like(v)
    if module.mode == "parallel" or even:
        for i in real:
            keys = [j for j in real if abs(i - j) <= module.window // 2]
            out[i] = attention(q[i : i + 1], k[keys], v[keys])[0]
    if module.mode == "parallel" or not even:
        q, k = q @ module.query_projection[head], k @ module.key_projection[head]
        scores = q @ k[real].T / math.sqrt(module.d_feature)
        weights = 1 + scores + scores**2 / 2
        out = out + weights @ v[real] / weights.sum(dim=-1, keepdim=True)
    return out


CASES = [
    {},
    {"window": 4},
    {"mode": "parallel", "window": 4},
    {"mode": "parallel", "d_feature": 3, "window": 5},
]


def built(**own):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        place = Place(
            d_model=16, num_heads=2, max_len=40, layer_index=own.pop("layer_index", 0), num_layers=2
        )
        return build("based", place, **own).double()


def limit_of_wide_window():
    q, k, v = draw(3, 2, 2, 33, 8)
    mask = (torch.arange(33) % 3 != 1).expand(2, 33)
    found = built(window=66).attend(q, k, v, mask)
    return distance(dense_softmax(q, k, v, mask)[:, :, mask[0]], found[:, :, mask[0]])


def limit_of_dense_polynomial():
    mixer = built(layer_index=1)
    q, k, v = draw(3, 2, 2, 33, 8)
    scores = (q @ mixer.query_projection) @ (k @ mixer.key_projection).mT / 4
    weights = ((1 + scores) ** 2 + 1) / 2
    return distance(weights @ v / weights.sum(dim=-1, keepdim=True), mixer.attend(q, k, v, None))


LIMITS = [
    Limit("layer 0, window at least twice the length: softmax", limit_of_wide_window),
    Limit("layer 1: dense attention with ((1 + s)^2 + 1) / 2 of narrowed scores", limit_of_dense_polynomial),
]


def against_fla_and_torch():
    """fla's causal kernel with each of 33 tokens turned to be the last; torch with a band of keys."""
    naive = file_of("fla", "ops/based/naive.py")
    mixer = built(mode="parallel", window=6)
    q, k, v = draw(3, 2, 33, 8)  # [h l d]
    narrow = q @ mixer.query_projection, k @ mixer.key_projection, v
    turned = [torch.stack([x.roll(32 - i, dims=1) for i in range(33)]) for x in narrow]
    values, ones = turned[2], torch.ones_like(turned[2])
    mixed, sums = (
        naive.naive_parallel_based(*turned[:2], x, use_norm=False)[:, :, -1] for x in (values, ones)
    )
    band = torch.ones(33, 33).tril(3).triu(-3).bool()
    near = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band)
    found = mixer.attend(*(x[None] for x in (q, k, v)), None)[0]
    return distance((mixed / sums).transpose(0, 1) + near, found)


ORACLES = [
    Oracle(
        "fla-core 0.6.0, ops/based/naive.py, and torch", "mode=parallel at 33 tokens", against_fla_and_torch
    )
]

FAULTS = {
    **attention_faults("taylor_attention", mode="parallel", d_feature=8),
    "window off by one": Plant("local_attention", changed(window=lambda w: w + 2), {"window": 4}),
    "wrong eps": "the weights p(s) are at least a half",
}
