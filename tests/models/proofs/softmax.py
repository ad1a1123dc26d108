"""Softmax attention: weights over the real keys."""

import torch
import torch.nn.functional as F

from models import Place, build
from models.softmax import softmax_fused, softmax_math
from proofs.faults import attention_faults
from proofs.kit import Limit, Oracle, attention, by_head, dense_softmax, distance, draw


@by_head
def reference(module, head, q, k, v, real):
    return attention(q, k[real], v[real])


CASES = [{"kernel": "fused"}, {"kernel": "math"}]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def dense(kernel):
    q, k, v = draw(3, 3, 2, 37, 8)
    return max(distance(dense_softmax(q, k, v, mask), kernel(q, k, v, mask)) for mask in (None, MASK))


LIMITS = [
    Limit("kernel=fused at any length", lambda: dense(softmax_fused)),
    Limit("kernel=math at any length", lambda: dense(softmax_math)),
]


def multihead(kernel):
    """The projection of torch's module holds queries, keys and values in the order of ours."""
    with torch.random.fork_rng(devices=[]):
        module = build("softmax", Place(d_model=16, num_heads=2, max_len=37), kernel=kernel).double().eval()
        oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64).eval()
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = module.qkv.weight.data, module.qkv.bias.data
    oracle.out_proj.weight.data, oracle.out_proj.bias.data = module.out.weight.data, module.out.bias.data
    x = draw(3, 37, 16)
    expected, _ = oracle(x, x, x, key_padding_mask=~MASK)
    return distance(expected[MASK], module(x, MASK)[MASK])


def sdpa():
    q, k, v = draw(3, 3, 2, 37, 8)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASK[:, None, None, :])
    return distance(expected, softmax_math(q, k, v, MASK))


ORACLES = [
    Oracle("torch.nn.MultiheadAttention", "kernel=fused, weights copied, padded", lambda: multihead("fused")),
    Oracle("torch.nn.MultiheadAttention", "kernel=math, weights copied, padded", lambda: multihead("math")),
    Oracle("torch scaled_dot_product_attention", "kernel=math, padded", sdpa),
]

FAULTS = attention_faults("softmax_fused", kernel="fused")
