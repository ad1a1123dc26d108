"""Synthesizer: each score written out from the learned tables, weights over the real keys."""

import math

import torch
import torch.nn.functional as F

from models import Place, build
from models.synthesizer import synthesizer_attention
from proofs.faults import NO_EPS, NO_WINDOW, Plant, swapped, unmasked, unscaled
from proofs.kit import Limit, Oracle, affine, dense_softmax, distance, draw, heads, normalised, rows


def reference(module, x, mask=None):
    d, out = module.place.head_dim, torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        seen, mixed = real if module.use_mask else list(range(len(row))), []
        if module.dot_product:
            parts = list(heads(module, row))
        else:
            values = affine(module.value, row)
            parts = [(h, None, None, values[:, h * d : (h + 1) * d]) for h in range(module.place.num_heads)]
        for head, q, k, v in parts:
            scores = torch.stack([scores_of(module, head, row, i, seen) for i in range(len(row))])
            if q is not None:
                scores = scores + q @ k[seen].T / math.sqrt(d)
            mixed.append(normalised(scores) @ v[seen] if seen else torch.zeros_like(v))
        if real:
            out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
    return out


def scores_of(module, head, row, i, seen):
    """The scores of query i for the keys it sees, without the dot product."""
    d = module.place.head_dim
    if module.kind == "random":
        return torch.stack([module.scores[head, i, j] for j in seen]) if seen else row.new_zeros(0)
    if module.kind == "factorised":
        return module.right[head][seen] @ module.left[head, i]
    hidden = affine(module.hidden, row[i])[head * d : (head + 1) * d]
    scores = torch.where(hidden > 0, hidden, 0.0) @ module.score_weight[head][:, seen]
    return scores if module.score_bias is None else scores + module.score_bias[head, 0, seen]


CASES = [
    {},
    {"kind": "dense"},
    {"kind": "random", "dot_product": True},
    {"kind": "factorised", "rank": 3, "use_mask": False},
    {"kind": "dense", "dot_product": True},
]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def equal_scores():
    q, k, v = draw(3, 3, 2, 37, 8)
    alike = torch.full((2, 37, 37), 0.7, dtype=v.dtype)
    return distance(dense_softmax(q, k, v, MASK), synthesizer_attention(q, k, v, MASK, synthetic=alike))


def synthetic_scores_of_a_dot_product():
    q, k, v = draw(3, 3, 2, 37, 8)
    found = synthesizer_attention(None, None, v, MASK, synthetic=q @ k.mT / math.sqrt(8))
    return distance(dense_softmax(q, k, v, MASK), found)


LIMITS = [
    Limit("dot_product beside scores that are all equal", equal_scores),
    Limit("scores that are those of a dot product", synthetic_scores_of_a_dot_product),
]


def sdpa(kind, dot_product):
    """Torch's kernel takes the scores of ours as its additive mask, -inf at padding."""
    with torch.random.fork_rng(devices=[]):
        place = Place(d_model=16, num_heads=2, max_len=40)
        module = build("synthesizer", place, kind=kind, dot_product=dot_product).double().eval()
    x = draw(3, 37, 16)
    if kind == "random":
        scores = module.scores[:, :37, :37].expand(3, -1, -1, -1)
    elif kind == "factorised":
        scores = (module.left @ module.right.mT)[:, :37, :37].expand(3, -1, -1, -1)
    else:
        hidden = torch.relu(module.hidden(x)).view(3, 37, 2, 8).transpose(1, 2)
        scores = (hidden @ module.score_weight + module.score_bias)[..., :37]
    scores = scores.masked_fill(~MASK[:, None, None, :], -math.inf)
    if dot_product:
        q, k, v = module.qkv(x).view(3, 37, 3, 2, 8).permute(2, 0, 3, 1, 4)
    else:
        v = module.value(x).view(3, 37, 2, 8).transpose(1, 2)
        q = k = torch.zeros_like(v)
    expected = module.out(
        F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(1, 2).flatten(2)
    )
    return distance(expected[MASK], module(x, MASK)[MASK])


ORACLES = [
    Oracle(
        "torch scaled_dot_product_attention",
        f"kind={kind}{', dot_product' if dot else ''}, scores as additive mask, padded",
        lambda kind=kind, dot=dot: sdpa(kind, dot),
    )
    for kind, dot in (("dense", False), ("random", True), ("factorised", False))
]

MIXTURE = {"kind": "random", "dot_product": True}

FAULTS = {
    "no scale": Plant("synthesizer_attention", unscaled(), MIXTURE),
    "no mask": Plant("synthesizer_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("synthesizer_attention", swapped, MIXTURE),
    "window off by one": NO_WINDOW,
    "wrong eps": NO_EPS,
}
