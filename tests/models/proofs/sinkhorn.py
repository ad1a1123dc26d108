"""Sinkhorn Transformer: blocks as lists of tokens, the matrix R by division in turn, one query at a time."""

import math

import torch
import torch.nn.functional as F

from models.sinkhorn import attend_in_blocks, in_blocks, sinkhorn_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, by_head, dense_softmax, distance, draw, normalised


def block_and_place(i, length, size, strided):
    return (i % -(-length // size), i // -(-length // size)) if strided else (i // size, i % size)


def sorting(module, head, k, blocks):
    """R over the blocks that hold real tokens; None for the sum of all blocks."""
    options = module.options
    if options["sort"] == "sum":
        return None
    logits = torch.stack([k[list(tokens.values())].sum(dim=0) for tokens in blocks.values()])
    logits = logits @ module.sort_weight[head][:, list(blocks)]
    logits = logits if module.sort_bias is None else logits + module.sort_bias[head][list(blocks)]
    if options["sort"] == "softmax":
        return normalised(logits)
    log_r = logits / options["temperature"]
    for _ in range(options["num_iterations"]):
        for axis in (1, 0):
            log_r = log_r - torch.logsumexp(log_r, dim=axis, keepdim=True)
    return torch.exp(log_r)


@by_head
def reference(module, head, q, k, v, real):
    options, out, blocks = module.options, torch.zeros_like(q), {}
    size, strided = options["block_size"], options["strided"]
    for i in real:
        block, place = block_and_place(i, len(q), size, strided)
        blocks.setdefault(block, {})[place] = i
    if not real:
        return out
    blocks = dict(sorted(blocks.items()))
    r = sorting(module, head, k, blocks)
    for row, tokens in enumerate(blocks.values()):
        sorted_k, sorted_v, counts = [], [], []
        for place in range(size):
            holders = [n for n, other in enumerate(blocks.values()) if place in other]
            if not holders:
                continue
            there = [other[place] for other in blocks.values() if place in other]
            if r is None:
                weights, count = q.new_ones(len(there)), q.new_ones(())
            else:
                count = r[row, holders].sum() / r[row].sum()
                weights = r[row, holders] / count
            sorted_k.append(weights @ k[there])
            sorted_v.append(weights @ v[there])
            counts.append(count)
        mine = list(tokens.values())
        logs = torch.cat([q.new_zeros(len(mine)), torch.log(torch.stack(counts))])
        keys, values = (
            torch.cat([k[mine], torch.stack(sorted_k)]),
            torch.cat([v[mine], torch.stack(sorted_v)]),
        )
        scores = q[mine] @ keys.T / math.sqrt(q.shape[-1]) + logs
        if options["separate"]:
            n = len(mine)
            out[mine] = normalised(scores[:, :n]) @ values[:n] + normalised(scores[:, n:]) @ values[n:]
        else:
            out[mine] = normalised(scores) @ values
    return out


CASES = [
    {},
    {"block_size": 4},
    {"block_size": 5, "temperature": 0.5, "num_iterations": 2, "max_num_blocks": 300},
    {"block_size": 6, "sort": "softmax"},
    {"block_size": 4, "sort": "sum", "separate": True, "strided": True},
    {"block_size": 7, "strided": True},
]


def qkv(length=24):
    q, k, v = draw(3, 2, 2, length, 8)
    return 2 * q, 2 * k, v


def one_block():
    (q, k, v), weight = qkv(), draw(2, 8, 1, seed=1)
    real = torch.arange(24) < torch.tensor([24, 9])[:, None]
    found = sinkhorn_attention(q, k, v, real, block_size=24, weight=weight)
    return distance(dense_softmax(q, k, v, real).transpose(1, 2)[real], found.transpose(1, 2)[real])


def own_block_sorted_beside_itself():
    blocks = [in_blocks(x, 6, False) for x in qkv()]
    order = torch.eye(4, dtype=torch.float64).expand(2, 2, 4, 4)
    q, k, v = blocks
    found = attend_in_blocks(q / math.sqrt(8), k, v, torch.ones(2, 4, 6).double(), order)
    expected = dense_softmax(*(x.flatten(1, 2) for x in blocks)).view_as(q)
    return distance(expected, found)


LIMITS = [
    Limit("one block holds the sequence: softmax attention", one_block),
    Limit("the identity as the permutation: softmax attention in blocks", own_block_sorted_beside_itself),
]


def against_torch():
    """A hard permutation, through torch's attention with a mask of pairs of blocks over the keys twice."""
    q, k, v = qkv()
    permutation, block = torch.tensor([2, 0, 3, 1]), torch.arange(24) // 6
    blocks = [in_blocks(x, 6, False) for x in (q / math.sqrt(8), k, v)]
    order = F.one_hot(permutation, 4).double().expand(2, 2, 4, 4)
    found = attend_in_blocks(*blocks, torch.ones(2, 4, 6).double(), order).flatten(2, 3)
    seen = torch.cat([block[:, None] == block, permutation[block][:, None] == block], dim=1)
    expected = F.scaled_dot_product_attention(
        q, torch.cat([k, k], dim=2), torch.cat([v, v], dim=2), attn_mask=seen
    )
    return distance(expected, found)


def sorting_against_the_package():
    """R of one head from its logits: the package's iteration on the same numbers, without noise."""
    from sinkhorn_transformer.sinkhorn_transformer import sinkhorn_sorting_operator

    from models.sinkhorn import balanced

    logits = 3 * draw(2, 1, 7, 7)
    expected = sinkhorn_sorting_operator(logits[:, 0] / 0.75, n_iters=5)
    return distance(expected, balanced(logits / 0.75, torch.ones(2, 7, dtype=torch.bool), 5)[:, 0])


ORACLES = [
    Oracle("torch scaled_dot_product_attention", "a hard permutation of four blocks", against_torch),
    Oracle("sinkhorn-transformer 0.11.4", "five Sinkhorn iterations", sorting_against_the_package),
]

FAULTS = {
    **attention_faults("sinkhorn_attention", block_size=4),
    "window off by one": Plant("sinkhorn_attention", changed(block_size=lambda c: c + 1), {"block_size": 4}),
}
