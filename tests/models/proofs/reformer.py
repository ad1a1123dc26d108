"""Reformer: each token with the explicit set of tokens it meets in some round, in one softmax."""

import math
from unittest import mock

import torch

from proofs.faults import Plant, changed, unmasked, unscaled
from proofs.kit import Limit, Oracle, affine, distance, draw, normalised, rotated, rows


def reference(module, x, mask=None):
    d, num_heads = module.place.head_dim, module.place.num_heads
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if not real:
            continue
        keys = list(real) if module.use_mask else list(range(x.shape[1]))
        if module.append_zeros:
            filled = (len(row) // module.num_chunks + 1) * module.num_chunks
            keys += range(len(row), filled)
            row = torch.cat([row, row.new_zeros(filled - len(row), row.shape[1])])
        both, mixed = affine(module.qkv, row), []
        for head in range(num_heads):
            q, v = (both[:, (part * num_heads + head) * d :][:, :d] for part in range(2))
            directions = module.fixed_directions[head].double().detach()
            rounds = [(q.detach() @ turn).tolist() for turn in directions]
            codes = [[code(turned[i], module.sizes) for i in keys] for turned in rounds]
            chunk = math.ceil(len(row) / module.num_chunks) if module.num_chunks else module.bucket_size
            met = meetings(codes, keys, len(row), min(chunk, len(row)), module.across_buckets)
            if module.place.rotary_base is not None:
                q = rotated(q, module.place.rotary_base)
            mixed.append(attended(module, q, v, met))
        together = torch.cat(mixed, dim=-1)
        out[b, real] = (affine(module.out, together) if hasattr(module.out, "weight") else together)[real]
    return out


def code(turned, sizes):
    """The index of the largest of (turned, -turned), hash by hash."""
    number, first, factor = 0, 0, 1
    for size in sizes:
        part = turned[first : first + size // 2]
        signed = part + [-value for value in part]
        number += factor * signed.index(max(signed))
        first, factor = first + size // 2, factor * size
    return number


def meetings(codes, keys, length, chunk, across):
    """met[i, j]: whether (across: how often) i sees j."""
    met, num_chunks = torch.zeros(length, length, dtype=torch.float64), math.ceil(length / chunk)
    chunks = []  # of all rounds, each the (bucket, token) in it
    for round_codes in codes:
        order = sorted(zip(round_codes, keys, strict=True))
        chunks += [order[n * chunk : (n + 1) * chunk] for n in range(num_chunks)]
    for c, queries in enumerate(chunks):
        first = c % num_chunks == 0
        before = c - 1 if across or not first else c
        seen = chunks[c] + (chunks[before] if before % len(chunks) != c else [])
        for bucket, i in queries:
            for other, j in seen:
                if across:
                    met[i, j] += 1
                elif other == bucket:
                    met[i, j] = 1
    return met


def attended(module, q, v, met):
    k = q / torch.sqrt((q**2).sum(dim=-1, keepdim=True)) if module.unit_keys else q
    d = q.shape[-1]
    scores = q @ k.T * {"divided": d**-0.5, "none": 1.0, "multiplied": d**0.5}[module.score_scale]
    if module.mask_self:
        for i in range(len(met)):
            met[i, i] = 0 if (met[i].sum() > met[i, i]) else met[i, i]
    alone = met.sum(dim=-1) == 0  # padded
    met = torch.where(alone[:, None], torch.eye(len(met), dtype=met.dtype), met)
    return normalised(scores + torch.log(met).to(scores.device)) @ v


RELEASED = {
    "num_hashes": 1,
    "num_buckets": 10,
    "num_chunks": 10,
    "across_buckets": True,
    "score_scale": "multiplied",
    "unit_keys": False,
    "mask_self": False,
    "output_projection": False,
    "use_mask": False,
    "append_zeros": True,
    "redraw_every": 0,
}
CASES = [
    {},
    {"num_hashes": 3, "bucket_size": 8, "num_buckets": 6},
    {"num_hashes": 1, "bucket_size": 5, "num_buckets": 4, "hash_seed": 3, "redraw_every": 7},
    {"bucket_size": 8, "num_buckets": 1, "mask_self": False},
    {"bucket_size": 8, "num_buckets": 4, "across_buckets": True, "score_scale": "none"},
    {"bucket_size": 16, "num_buckets": 132, "unit_keys": False},
    {"num_buckets": 2, "num_chunks": 4},
    {"num_buckets": 4, "num_chunks": 3, "append_zeros": True},
    RELEASED,
]


def dense_without_self():
    from models.reformer import lsh_attention

    q, v = draw(2, 2, 40, 8, seed=1), draw(2, 2, 40, 8, seed=2)
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT / math.sqrt(8)
    hidden = torch.eye(40, dtype=torch.bool) | ~mask[:, None, None, :]
    expected = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v
    buckets = torch.zeros(2, 2, 3, 40, dtype=torch.long)
    found = lsh_attention(q, v, mask, buckets=buckets, chunk=64)
    real = mask[:, None].expand(2, 2, 40)
    return distance(expected[real], found[real])


LIMITS = [
    Limit("one bucket and one chunk: softmax of q and q / |q| over all other tokens", dense_without_self)
]


def transformers_layer():
    """Its rounds, sorting, ring of chunks and merging, from the same projections and rotations."""
    from transformers.models.reformer.configuration_reformer import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    from models import Place, build

    module = build(
        "reformer",
        Place(d_model=16, num_heads=2, max_len=96, bias=False),
        num_hashes=3,
        bucket_size=8,
        num_buckets=6,
        across_buckets=True,
        score_scale="none",
        output_projection=False,
    )
    module = module.double().eval()
    config = ReformerConfig(
        hidden_size=16,
        num_attention_heads=2,
        attention_head_size=8,
        lsh_attn_chunk_length=8,
        num_buckets=6,
        num_hashes=3,
        hash_seed=None,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
        axial_pos_embds=False,
    )
    layer = LSHSelfAttention(config, layer_idx=0).double().eval()
    with torch.no_grad():
        weight = draw(32, 16, seed=3) / 4
        module.qkv.weight.copy_(weight)
        layer.query_key.weight.copy_(weight[:16])
        layer.value.weight.copy_(weight[16:])
        layer._len_norm = lambda x: x / (x**2).mean(dim=-1, keepdim=True).sqrt()  # without its 1e-6
        x = 2 * draw(2, 96, 16, seed=4)
        rotations = module.fixed_directions.permute(0, 2, 1, 3)  # [h d r n]
        with mock.patch.object(torch, "randn", lambda *shape, **kw: rotations):
            expected = layer(x).hidden_states
        return distance(expected, module(x))


def pytorch_layer():
    """Its masks by bucket and its count of repeated pairs, with padding, from the same rotations."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    from models.reformer import lsh_attention, lsh_buckets

    q, v, rotations = draw(3, 1, 96, 8, seed=5), draw(3, 1, 96, 8, seed=6), draw(1, 3, 8, 6, seed=7)
    mask = torch.ones(3, 96, dtype=torch.bool)
    layer = LSHAttention(
        bucket_size=8, n_hashes=3, allow_duplicate_attention=False, attend_across_buckets=False
    ).eval()
    with mock.patch.object(torch, "randn", lambda *shape, **kw: rotations.permute(0, 2, 1, 3)):
        expected = layer(q[:, 0], v[:, 0])[0]
    found = lsh_attention(q, v, mask, buckets=lsh_buckets(q, rotations, (12,)), chunk=8)
    return distance(expected, found[:, 0])


ORACLES = [
    Oracle(
        "transformers 5.23 (LSHSelfAttention)",
        "three rounds with across_buckets and score_scale=none, weights copied, rotations injected",
        transformers_layer,
    ),
    Oracle(
        "reformer-pytorch 1.4.4 (LSHAttention)",
        "three rounds within buckets, pairs counted once (up to its 1e-9), rotations injected",
        pytorch_layer,
        tolerance=1e-8,
    ),
]


def swapped(args, kwargs):
    args[0], args[1] = args[1], args[0]
    return args, kwargs


FAULTS = {
    "no scale": Plant("lsh_attention", unscaled()),
    "no mask": Plant("lsh_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("lsh_attention", swapped),
    "window off by one": Plant("lsh_attention", changed(chunk=lambda c: c + 1), {"bucket_size": 8}),
    "wrong eps": "the formula has no eps; only the unit length of a zero vector is guarded",
}
