"""Clustered attention: clusters as lists of queries, a pattern each, then queries alone at its top keys."""

import math
from collections import Counter

import torch

from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, attention, by_head, dense_softmax, distance, draw, normalised


@by_head
def reference(module, head, q, k, v, real):
    out = torch.zeros_like(v)
    if not real:
        return out
    planes = module.fixed_directions[head].double()
    offset = planes[q.shape[-1]] if len(planes) > q.shape[-1] else 0.0
    codes = ((q.detach() @ planes[: q.shape[-1]] + offset) > 0).tolist()
    for members in clusters(module, codes, real):
        mean = q[members].mean(dim=0)
        shared = normalised((k[real] @ mean)[None] / math.sqrt(q.shape[-1]))[0]
        if not module.improved:
            out[members] = (shared @ v[real]).expand(len(members), -1)
            continue
        pairs = sorted((-value, n) for n, value in enumerate(shared.detach().float().tolist()))
        order = [n for _, n in pairs]
        top, rest = order[: module.topk], order[module.topk :]
        keys = [real[n] for n in top]
        exact = attention(q[members], k[keys], v[keys])
        out[members] = shared[top].sum() * exact + shared[rest] @ v[[real[n] for n in rest]]
    return out


def clusters(module, codes, real):
    """Lists of tokens: each alone, or by Lloyd's iterations on codes."""
    number = module.num_clusters
    if len(real) <= number:
        return [[i] for i in real]
    centres = [codes[real[c * len(real) // number]] for c in range(number)]
    for _ in range(module.num_iterations):
        found = groups(codes, centres, real)
        for c, members in enumerate(found):
            ones = Counter(bit for i in members for bit, one in enumerate(codes[i]) if one)
            if members:
                centres[c] = [2 * ones[bit] >= len(members) for bit in range(len(centres[c]))]
    return [members for members in groups(codes, centres, real) if members]


def groups(codes, centres, real):
    far = torch.tensor([codes[i] for i in real])[:, None] != torch.tensor(centres)
    found = [[] for _ in centres]
    for i, distances in zip(real, far.sum(dim=-1).tolist(), strict=True):
        found[distances.index(min(distances))].append(i)
    return found


CASES = [
    {},
    {"num_clusters": 5, "bits": 9, "num_iterations": 3, "topk": 4},
    {"num_clusters": 6, "improved": False, "hash_seed": 1, "redraw_every": 7},
    {"num_clusters": 3, "bits": 4, "num_iterations": 0, "topk": 20, "redraw_every": 0},
    {"num_clusters": 4, "bits": 12, "topk": 5, "hash_bias": True},
]


def dense(improved, **options):
    from models.clustered import clustered_attention

    q, k, v = draw(2, 2, 40, 8, seed=1), draw(2, 2, 40, 8, seed=2), draw(2, 2, 40, 8, seed=3)
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    found = clustered_attention(q, k, v, mask, planes=draw(2, 8, 12, seed=4), improved=improved, **options)
    real = mask[:, None].expand(2, 2, 40)
    return distance(dense_softmax(q, k, v, mask)[real], found[real])


LIMITS = [
    Limit("as many clusters as tokens", lambda: dense(False, num_clusters=40)),
    Limit("as many clusters as tokens, improved", lambda: dense(True, num_clusters=40, topk=7)),
    Limit("any clusters, improved at all keys", lambda: dense(True, num_clusters=4, topk=40)),
]
NO_ORACLE = "the only public code, pytorch-fast-transformers 0.4.0, is built from C++ and CUDA against torch"

FEW = {"num_clusters": 5, "topk": 4}
FAULTS = {
    **attention_faults("clustered_attention", **FEW),
    "window off by one": Plant("clustered_attention", changed(topk=lambda k: k + 1), FEW),
}
