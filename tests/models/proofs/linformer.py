"""Linformer: columns of E and F for the real positions alone."""

import torch

from models.linformer import linformer_attention
from proofs.faults import attention_faults
from proofs.kit import Limit, Oracle, attention, by_head, dense_softmax, distance, draw


@by_head
def reference(module, head, q, k, v, real):
    seen = real if module.use_mask else list(range(len(q)))
    e, f = (p[head if p.shape[0] > 1 else 0][:, seen] for p in (module.proj_k, module.proj_v))
    return attention(q, e @ k[seen], f @ v[seen])


CASES = [
    {},
    *({"proj_len": 8, "share": share} for share in ("none", "heads", "kv", "layers", "layers_per_head")),
    {"proj_len": 8, "init_std": 0.02},
    {"proj_len": 16, "share": "kv", "use_mask": False},
]


def identity_projections():
    q, k, v = (draw(2, 2, 13, 4, seed=i) for i in range(3))
    eye = torch.eye(13, dtype=torch.float64)[None]
    return distance(dense_softmax(q, k, v), linformer_attention(q, k, v, proj_k=eye, proj_v=eye))


LIMITS = [Limit("E = F = identity: softmax", identity_projections)]


def linformer_package():
    from linformer.linformer import LinformerSelfAttention

    errors = []
    for length, share_kv in ((32, False), (19, False), (32, True), (19, True)):
        with torch.random.fork_rng([]):
            oracle = LinformerSelfAttention(16, 32, k=6, heads=2, share_kv=share_kv).double().eval()
        x = draw(3, length, 16)
        to_v, proj_v = (oracle.to_k, oracle.proj_k) if share_kv else (oracle.to_v, oracle.proj_v)
        q, k, v = (to(x).unflatten(-1, (2, 8)).transpose(1, 2) for to in (oracle.to_q, oracle.to_k, to_v))
        mixed = linformer_attention(q, k, v, proj_k=oracle.proj_k.T[None], proj_v=proj_v.T[None])
        errors.append(distance(oracle(x), oracle.to_out(mixed.transpose(1, 2).flatten(2))))
    return max(errors)


ORACLES = [
    Oracle(
        "linformer 0.2.3",
        "a module's projections, full and shorter lengths, keys and values apart and shared, no mask",
        linformer_package,
    )
]

FAULTS = attention_faults("linformer_attention", proj_len=8)
