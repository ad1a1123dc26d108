"""Informer: each query with its own list of sampled keys, and the queries ranked one by one."""

import math

import torch

from models.informer import attend_where_sparse, informer_attention, sparsity
from proofs.faults import attention_faults
from proofs.kit import Limit, Oracle, attention, by_head, dense_softmax, distance, draw
from proofs.skyformer import draw_of, number


@by_head
def reference(module, head, q, k, v, real):
    seen = real if module.use_mask else list(range(len(q)))
    if not seen:
        return torch.zeros_like(q)
    n, own = len(seen), draw_of(module)
    most = max(1, min(n, module.factor * math.ceil(math.log(n))))
    measure = {}
    for i in seen:
        keys = [seen[number(i + j * 2**20, *own) * n // 2**32] for j in range(most)]
        scores = (k[keys] @ q[i]).detach()
        measure[i] = float(scores.max() - scores.sum() / (n if module.mean_over_length else most))
    out = v[seen].mean(dim=0).expand_as(v).clone()
    for i in sorted(seen, key=lambda i: -measure[i])[:most]:
        out[i] = attention(q[i : i + 1], k[seen], v[seen])[0]
    return out


CASES = [
    {},
    {"factor": 1, "sample_seed": 3},
    {"factor": 2, "mean_over_length": True},
    {"target": 12},
    {"factor": 2, "use_mask": False},
]


def every_query():
    q, k, v = (draw(2, 2, 40, 8, seed=i) for i in range(3))
    mask = torch.arange(40) < torch.tensor([40, 7])[:, None]
    numbers = torch.randint(2**32, (40, 40), generator=torch.Generator().manual_seed(3))
    found = informer_attention(q, k, v, mask, numbers=numbers, factor=10)
    real = mask[:, None, :, None].expand_as(v)
    return distance(dense_softmax(q, k, v, mask)[real], found[real])


LIMITS = [Limit("u = n, masked: softmax", every_query)]


def transformers_module():
    from transformers.models.informer.modeling_informer import InformerProbSparseAttention

    with torch.random.fork_rng([]):
        oracle = InformerProbSparseAttention(16, 2, sampling_factor=2).double().eval()
        x = 2 * draw(3, 50, 16)
        torch.manual_seed(3)
        expected = oracle(x)[0]
        torch.manual_seed(3)
        sampled = torch.randint(0, 50, (50,))  # its samples: as many as keys, the same for all queries
    q, k, v = (
        to(x).unflatten(-1, (2, 8)).transpose(1, 2) for to in (oracle.q_proj, oracle.k_proj, oracle.v_proj)
    )
    measure = sparsity(q, k, sampled.expand(1, 50, 50))
    mixed = attend_where_sparse(q, k, v, None, measure, 2 * 4)  # ceil(ln 51) = 4
    return distance(expected, oracle.out_proj(mixed.transpose(1, 2).flatten(2)))


ORACLES = [
    Oracle(
        "transformers 5.23",
        "InformerProbSparseAttention of an encoder, its samples injected, no mask",
        transformers_module,
    )
]

FAULTS = attention_faults("informer_attention", factor=2)
