"""Local attention: each query with the list of keys its pattern names."""

from itertools import product

import torch

from proofs.faults import Plant, attention_faults, changed
from proofs.kit import attention, by_head


@by_head
def reference(module, head, q, k, v, real):
    w, out = module.window, torch.zeros_like(q)
    near = {
        "sliding": lambda i, j: abs(i - j) <= w // 2,
        "block": lambda i, j: i // w == j // w,
        "neighbours": lambda i, j: abs(i // w - j // w) <= 1,
    }[module.pattern]
    for i in real:
        keys = [j for j in real if near(i, j)]
        out[i] = attention(q[i : i + 1], k[keys], v[keys])[0]
    return out


CASES = [
    {},
    *({"window": w, "pattern": p} for w, p in product((4, 5, 16), ("sliding", "block", "neighbours"))),
]

FAULTS = {
    **attention_faults("local_attention"),
    "window off by one": Plant("local_attention", changed(window=lambda w: w + 2), {"window": 4}),
}
