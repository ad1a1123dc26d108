"""Ring attention: softmax attention, weights over the real keys; if tied, with its queries for keys."""

import math

import torch
import torch.nn.functional as F

from models import Place, build
from models.ring import ring_attention
from models.ring_operator import blocks_for
from proofs.faults import Plant, attention_faults
from proofs.kit import Limit, Oracle, affine, attention, dense_softmax, distance, draw, heads, rotated, rows


def reference(module, x, mask=None):
    d, out = module.place.head_dim, torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if not real:
            continue
        mixed = [attention(q[real], k[real], v[real]) for q, k, v in parts(module, row, d)]
        out[b, real] = affine(module.out, torch.cat(mixed, dim=-1))
    return out


def parts(module, row, d):
    """q, k, v of each head; a tied projection holds all queries, then all values."""
    if not module.tie_qk:
        yield from (part[1:] for part in heads(module, row))
        return
    both, num_heads = affine(module.qkv, row), module.place.num_heads
    for head in range(num_heads):
        q, v = (
            both[:, head * d : (head + 1) * d],
            both[:, (num_heads + head) * d : (num_heads + head + 1) * d],
        )
        q = q if module.place.rotary_base is None else rotated(q, module.place.rotary_base)
        yield q, q, v


CASES = [
    {},
    {"tie_qk": True},
    {"num_units": 3, "num_blocks": 9, "tie_qk": True},
    {"num_units": 4, "num_blocks": 12, "tie_qk": True},
    {"num_units": 2, "num_blocks": 8},
    {"num_units": 1, "num_blocks": 3},
]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def softmax(**own):
    """At real queries: those of a block that is all padding are skipped."""
    q, k, v = draw(3, 3, 2, 37, 8)
    k = q if own.get("tie_qk") else k
    whole = distance(dense_softmax(q, k, v), ring_attention(q, k, v, **own))
    real = MASK[:, None, :, None]
    found, expected = ring_attention(q, k, v, MASK, **own), dense_softmax(q, k, v, MASK)
    return max(whole, distance(expected * real, found * real))


LIMITS = [
    Limit("4 units", softmax),
    Limit("5 units, 10 blocks", lambda: softmax(num_units=5, num_blocks=10)),
    Limit("4 units, 12 blocks, tied", lambda: softmax(num_units=4, num_blocks=12, tie_qk=True)),
    Limit("more blocks than tokens", lambda: softmax(num_units=6, num_blocks=60)),
]


def multihead(tie_qk):
    """Weights copied; of tied ones the queries' are the keys' too."""
    with torch.random.fork_rng(devices=[]):
        place = Place(d_model=16, num_heads=2, max_len=37)
        module = build("ring", place, num_units=3, num_blocks=6, tie_qk=tie_qk).double().eval()
        oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64).eval()
    weight, bias = module.qkv.weight.data, module.qkv.bias.data
    repeat = torch.cat([torch.arange(16), torch.arange(16), torch.arange(16, 32)]) if tie_qk else slice(None)
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = weight[repeat], bias[repeat]
    oracle.out_proj.weight.data, oracle.out_proj.bias.data = module.out.weight.data, module.out.bias.data
    x = draw(3, 37, 16)
    expected, _ = oracle(x, x, x, key_padding_mask=~MASK)
    return distance(expected[MASK], module(x, MASK)[MASK])


def sdpa_gradients(tie_qk):
    found, weights = [], draw(3, 2, 37, 8, seed=3) * MASK[:, None, :, None]
    for attend in ("torch", "ring"):
        q, k, v = (x.requires_grad_() for x in draw(3, 3, 2, 37, 8).unbind(0))
        k = q if tie_qk else k
        if attend == "torch":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=MASK[:, None, None, :])
        else:
            out = ring_attention(q, k, v, MASK, num_units=4, num_blocks=12, tie_qk=tie_qk)
        wanted = {"q": q, "k": k, "v": v}
        found.append(torch.cat(torch.autograd.grad((out * weights).sum(), list(wanted.values()))))
    return distance(*found)


ORACLES = [
    Oracle("torch.nn.MultiheadAttention", "weights copied, padded", lambda: multihead(False)),
    Oracle("torch.nn.MultiheadAttention", "tied weights copied twice, padded", lambda: multihead(True)),
    Oracle("torch scaled_dot_product_attention", "gradients, padded", lambda: sdpa_gradients(False)),
    Oracle(
        "torch scaled_dot_product_attention", "gradients of tied ones, padded", lambda: sdpa_gradients(True)
    ),
]


def last_block_forgotten(args, kwargs):
    """As if each sequence ended a block earlier; a sequence of one block is left whole."""
    q, mask, num_units, num_blocks = args[0], args[3], args[5], args[6]
    length = q.shape[2]
    size = math.ceil(length / (num_blocks or blocks_for(length, num_units)))
    mask = q.new_ones(len(q), length, dtype=torch.bool) if mask is None else mask
    shorter = mask & torch.nn.functional.pad(mask, (0, size))[:, size:]
    args[3] = torch.where(shorter.any(dim=1, keepdim=True), shorter, mask)
    return args, kwargs


FAULTS = {
    **attention_faults("ring_attention"),
    "window off by one": Plant("ring_forward", last_block_forgotten),
}
