"""Local attention: each query with the list of keys its pattern names."""

from itertools import product

import torch

from models.local import local_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, affine, attention, by_head, dense_softmax, distance, draw, flex, heads


@by_head
def near_keys(module, head, q, k, v, real):
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


def reference(module, x, mask=None):
    if module.pattern == "released":
        return torch.stack([released(module, x[b], None if mask is None else mask[b]) for b in range(len(x))])
    return near_keys(module, x, mask)


def released(module, x, mask):
    """One row, token by token: token p n + b stands at place p of block b and borrows the mask of b w + p."""
    w, length = module.window, len(x)
    n = length // w + 1
    zeros = torch.zeros(n * w - length, x.shape[1], dtype=x.dtype)
    marks = [mask is None or bool(mask[t]) for t in range(length)] + [bool(-1e9)] * len(zeros)
    mixed = []
    for _, q, k, v in heads(module, torch.cat([x, zeros])):
        rows = []
        for i in range(length):
            place, block = divmod(i, n)
            seen = [p for p in range(w) if marks[block * w + place] and marks[block * w + p]]
            keys = [p * n + block for p in seen]
            if keys:
                rows.append(attention(q[i : i + 1], k[keys], v[keys])[0])
            else:
                rows.append(sum(v[p * n + block] for p in range(w)) / w)
        mixed.append(torch.stack(rows))
    return affine(module.out, torch.cat(mixed, dim=-1))


CASES = [
    {},
    {"window": 4, "pattern": "released"},
    {"window": 7, "pattern": "released"},
    *({"window": w, "pattern": p} for w, p in product((4, 5, 16), ("sliding", "block", "neighbours"))),
]


def qkv(length):
    return draw(3, 2, 2, length, 4)


def wide_window():
    q, k, v = qkv(29)
    mask = torch.arange(29) < torch.tensor([29, 11])[:, None]
    expected, errors = dense_softmax(q, k, v, mask), []
    for pattern, window in (("sliding", 58), ("block", 29), ("neighbours", 29)):
        found = local_attention(q, k, v, mask, window=window, pattern=pattern)
        errors += [distance(expected[0], found[0]), distance(expected[1, :, :11], found[1, :, :11])]
    return max(errors)


def own_token():
    q, k, v = qkv(29)
    return distance(v, local_attention(q, k, v, window=1))


LIMITS = [
    Limit("a window as wide as the sequence, masked: softmax", wide_window),
    Limit("a sliding window of one: softmax over one token, its value", own_token),
]


def against_local_attention():
    import local_attention as package

    ways = {
        "block": {"look_backward": 0, "look_forward": 0},
        "neighbours": {"look_backward": 1, "look_forward": 1},
        "sliding": {"look_backward": 1, "look_forward": 1, "exact_windowsize": True},
    }
    errors = []
    for (pattern, options), length in product(ways.items(), (28, 29)):
        oracle = package.LocalAttention(7, autopad=True, use_rotary_pos_emb=False, **options)
        q, k, v = qkv(length)
        mask = torch.arange(length) < torch.tensor([length, 16])[:, None]
        window = 14 if pattern == "sliding" else 7
        found = local_attention(q, k, v, mask, window=window, pattern=pattern)
        expected = oracle(q, k, v, mask=mask)
        errors += [distance(expected[0], found[0]), distance(expected[1, :, :16], found[1, :, :16])]
    return max(errors)


def against_flex():
    q, k, v = qkv(150)
    mask = torch.arange(150) % 7 != torch.tensor([3, 5])[:, None]
    expected = flex(q, k, v, lambda b, h, i, j: ((i - j).abs() <= 10) & (mask[b, j] | (i == j)))
    found = local_attention(q, k, v, mask, window=20)
    real = mask[:, None, :, None]
    return distance(expected * real, found * real)


ORACLES = [
    Oracle(
        "local-attention 1.11.2",
        "blocks, blocks with neighbours, sliding, each masked",
        against_local_attention,
    ),
    Oracle("torch FlexAttention", "sliding, a mask with holes", against_flex),
]

FAULTS = {
    **attention_faults("local_attention"),
    "window off by one": Plant("local_attention", changed(window=lambda w: w + 2), {"window": 4}),
}
