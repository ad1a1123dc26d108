"""Transformer-LS: each query with the landmarks and the list of keys near its segment, one softmax."""

from copy import copy
from functools import partial

import torch
import torch.nn.functional as F

from models.long_short import long_short_attention
from proofs.faults import Plant, changed, swapped, unmasked, unscaled
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


def layer_normed(norm, x):
    if norm is None:
        return x
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def near(window, i, real):
    """Real positions of the segment of i and of half a window, but at least one token, on each side."""
    if window == 0:
        return []
    start, around = i // window * window, max(1, window // 2)
    return [j for j in real if start - around <= j < start + window + around]


def reference(module, x, mask=None):
    out, r, d = torch.zeros_like(x), module.num_landmarks, module.place.head_dim
    parts = [slice(h * d, (h + 1) * d) for h in range(module.place.num_heads)]
    for b, row, real in rows(x, mask):
        if not real:
            continue
        by_part = zip(*(qkv for _, *qkv in heads(module, row)), strict=True)
        q, k, v = (torch.cat(part, dim=-1) for part in by_part)  # [l h*d]
        k_near, v_near = (layer_normed(module.norm_near, part) for part in (k, v))
        k_far = v_far = k[:0]
        if r:
            p = normalised(affine(module.projection, row[real]).T)  # [h*r real]
            kept = (k_near, v_near) if module.norm_before_projection else (k, v)
            together = [
                torch.cat([p[h * r : (h + 1) * r] @ x[real][:, part] for h, part in enumerate(parts)], dim=-1)
                for x in kept
            ]
            k_far, v_far = (layer_normed(module.norm_far, x) for x in together)  # [r h*d]
        mixed = torch.zeros_like(q)
        for i in real:
            keys = near(module.window, i, real)
            k_i, v_i = torch.cat([k_far, k_near[keys]]), torch.cat([v_far, v_near[keys]])
            for part in parts:
                mixed[i, part] = attention(q[i : i + 1, part], k_i[:, part], v_i[:, part])[0]
        out[b, real] = affine(module.out, mixed[real])
    return out


CASES = [
    {},
    {"num_landmarks": 2, "window": 16},
    {"num_landmarks": 1, "window": 1},
    {"num_landmarks": 3, "window": 0},
    {"num_landmarks": 0, "window": 5},
    {"num_landmarks": 4, "window": 6, "norm_before_projection": True, "eps": 1e-2},
    {"num_landmarks": 4, "window": 7, "dual_norm": False},
]


def qkv(length=21):
    q, k, v = draw(3, 2, 2, length, 8)
    return 2 * q, 2 * k, v, torch.arange(length) < torch.tensor([length, 9])[:, None]


def at(mask, x):
    return x.transpose(1, 2)[mask]


def without_landmarks(window):
    q, k, v, mask = qkv()
    found = long_short_attention(q, k, v, None, mask, window=window)
    return distance(at(mask, dense_softmax(q, k, v, mask)), at(mask, found))


def one_landmark_a_token():
    """Logits so far apart that P is the identity: every token is seen from afar."""
    q, k, v, _ = qkv()
    projection = (1000 * torch.eye(21).double()).expand(2, 2, 21, 21)
    return distance(dense_softmax(q, k, v), long_short_attention(q, k, v, projection, window=0))


LIMITS = [
    Limit("window as long as the sequence, no landmarks, no norms: softmax", partial(without_landmarks, 21)),
    Limit("window longer than the sequence, no landmarks, no norms: softmax", partial(without_landmarks, 64)),
    Limit("each token a landmark, no window, no norms: softmax", one_landmark_a_token),
]


def against_torch(norm_before_projection):
    """All keys in one row, landmarks before tokens, and a mask of who sees whom."""
    q, k, v, real = qkv(24)
    projection, window = draw(2, 2, 24, 5, seed=1), 6
    norms = [torch.nn.LayerNorm(16).double() for _ in range(2)]
    for seed, norm in enumerate(norms):
        norm.weight.data, norm.bias.data = draw(2, 16, seed=seed).unbind(0)
    near, far = ([split(norm(join(x))) for x in (k, v)] for norm in norms)
    p = projection.masked_fill(~real[:, None, :, None], -torch.inf).softmax(dim=2)
    kept = near if norm_before_projection else (k, v)
    far = [split(norms[1](join(p.mT @ x))) for x in kept]
    token, segment = torch.arange(24), torch.arange(24)[:, None] // window
    seen = (token >= segment * window - 3) & (token < segment * window + window + 3) & real[:, None, None]
    seen = torch.cat([torch.ones(2, 1, 24, 5, dtype=torch.bool), seen], dim=-1)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(far, near, strict=True))
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    options = {"norm_near": norms[0], "norm_far": norms[1], "norm_before_projection": norm_before_projection}
    with torch.no_grad():
        found = long_short_attention(q, k, v, projection, real, window=window, **options)
    return distance(at(real, expected), at(real, found))


def join(x):
    return x.transpose(1, 2).flatten(2)


def split(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


ORACLES = [
    Oracle(
        "torch scaled_dot_product_attention and LayerNorm",
        f"landmarks and tokens as one row of keys, norm_before_projection={before}",
        partial(against_torch, before),
    )
    for before in (False, True)
]


def other_eps(args, kwargs):
    if args[0] is not None:
        args[0] = copy(args[0])
        args[0].eps *= 100
    return args, kwargs


FAULTS = {
    "no scale": Plant("long_short_attention", unscaled()),
    "no mask": Plant("long_short_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("long_short_attention", swapped),
    "window off by one": Plant("long_short_attention", changed(window=lambda w: w + 1)),
    "wrong eps": Plant("across_heads", other_eps),
}
