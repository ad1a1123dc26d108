"""H-Transformer-1D: the whole matrix of scores, each between the means of its pair's level."""

import math

import torch
import torch.nn.functional as F

from models.h_transformer import hierarchical_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, by_head, dense_softmax, distance, draw, normalised


def level_of(i, j, size):
    """The lowest level at which the blocks of i and j are the same or adjacent."""
    level = 0
    while abs(i // (size << level) - j // (size << level)) > 1:
        level += 1
    return level


@by_head
def reference(module, head, q, k, v, real):
    if not real:
        return torch.zeros_like(q)
    c, present = module.block_size, torch.tensor(real, device=q.device)
    top = max([level_of(real[0], real[-1], c), 0])
    means = []
    for level in range(
        top + 1
    ):  # of the real tokens in the cell of 2^level tokens that holds each real token
        cells = [present[present // 2**level == i // 2**level] for i in real]
        means.append([torch.stack([x[cell].mean(dim=0) for cell in cells]) for x in (q, k)])
    levels = torch.tensor([[level_of(i, j, c) for j in real] for i in real], device=q.device)
    scores = q.new_zeros(len(real), len(real))
    for level, (q_mean, k_mean) in enumerate(means):
        scores = torch.where(levels == level, q_mean @ k_mean.T / math.sqrt(q.shape[-1]), scores)
    out = torch.zeros_like(q)
    out[real] = normalised(scores) @ v[real]
    return out


CASES = [{}, {"block_size": 2}, {"block_size": 4}, {"block_size": 6}]


def qkv(length, sharpness=2.0):
    q, k, v = draw(3, 2, 2, length, 8)
    return sharpness * q, sharpness * k, v


def two_blocks():
    (q, k, v), real = qkv(32), torch.ones(2, 32, dtype=torch.bool)
    short = torch.arange(32) < torch.tensor([32, 21])[:, None]
    return max(
        distance(
            dense_softmax(q, k, v, m).transpose(1, 2)[m],
            hierarchical_attention(q, k, v, m, block_size=16).transpose(1, 2)[m],
        )
        for m in (real, short)
    )


def alike_within_means():
    """Eight tokens of each kind: the means of three levels are over tokens alike, at 64 tokens no more."""
    q, k, _ = (x.repeat_interleave(8, dim=2) for x in qkv(8))
    v = draw(2, 2, 64, 8, seed=1)
    return distance(dense_softmax(q, k, v), hierarchical_attention(q, k, v, block_size=4))


LIMITS = [
    Limit("two blocks hold the sequence: softmax attention", two_blocks),
    Limit("queries and keys alike within every mean: softmax attention", alike_within_means),
]


def against_torch():
    """Scores as an additive mask of torch's attention, means by avg_pool1d, levels by what is not reached."""
    c, length = 4, 64
    q, k, v = qkv(length)
    scores, done = torch.zeros(2, 2, length, length).double(), torch.zeros(length, length, dtype=torch.bool)
    for level in range(4):
        size = 2**level
        q_mean, k_mean = (
            F.avg_pool1d(x.flatten(0, 1).mT, size).mT.repeat_interleave(size, dim=1).view_as(x)
            for x in (q, k)
        )
        blocks = torch.ones(length // (c * size), length // (c * size)).tril(1).triu(-1).bool()
        reached = torch.kron(blocks, torch.ones(c * size, c * size, dtype=torch.bool))
        scores = torch.where(reached & ~done, q_mean @ k_mean.mT / math.sqrt(8), scores)
        done |= reached
    expected = F.scaled_dot_product_attention(torch.zeros_like(q), k, v, attn_mask=scores)
    return distance(expected, hierarchical_attention(q, k, v, block_size=c))


ORACLES = [
    Oracle(
        "torch scaled_dot_product_attention and avg_pool1d",
        "four levels at 64 tokens (h-transformer-1d 0.1.9 gives weights whose sum is not 1)",
        against_torch,
    )
]

FAULTS = {
    **attention_faults("hierarchical_attention", block_size=4),
    "window off by one": Plant("near_sums", changed(block_size=lambda c: c // 2), {"block_size": 4}),
}
