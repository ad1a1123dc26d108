"""Longformer: every token with its window and the global tokens; global tokens with all, projected apart."""

import torch

from models import Place, build
from models.longformer import longformer_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import (
    Limit,
    Oracle,
    affine,
    attention_where,
    dense_softmax,
    distance,
    draw,
    flex,
    heads,
    rotated,
    rows,
)


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    half, g = module.window // 2, module.num_global
    for b, row, real in rows(x, mask):
        i, j, mixed = torch.arange(len(row))[:, None], torch.tensor(real), []
        before = module.window - half - 1 if module.even_window else half
        seen = ((j >= i - before) & (j <= i + half)) | (j < g)
        for head, q, k, v in heads(module, row):
            one = attention_where(q, k[real], v[real], seen)
            if g:
                q, k, v = global_heads(module, row, head)
                everything = torch.ones(len(row), len(real), dtype=torch.bool)
                one = torch.where(i < g, attention_where(q, k[real], v[real], everything), one)
            mixed.append(one)
        if real:
            out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
    return out


def global_heads(module, row, head):
    d = module.place.head_dim
    inner = module.place.num_heads * d
    q, kv = affine(module.q_global, row), affine(module.kv_global, row)
    q, k, v = (part[:, head * d :][:, :d] for part in (q, kv[:, :inner], kv[:, inner:]))
    if module.place.rotary_base is not None:
        q, k = rotated(q, module.place.rotary_base), rotated(k, module.place.rotary_base)
    return q, k, v


CASES = [
    {},
    {"window": 40, "num_global": 0},
    {"window": 6, "even_window": True, "num_global": 0},
    {"window": 1, "num_global": 3},
    {"window": 7, "num_global": 20},
    {"window": 70, "even_window": True, "num_global": 2},
]


def wide_window():
    q, k, v = draw(3, 2, 2, 29, 4)
    mask = torch.arange(29) % 5 != torch.tensor([1, 4])[:, None]
    expected = dense_softmax(q, k, v, mask)
    errors = [distance(expected, longformer_attention(q, k, v, mask, window=58))]
    of_global = (q[:, :, :3], k, v)
    return max(
        *errors, distance(expected, longformer_attention(q, k, v, mask, window=58, of_global=of_global))
    )


def all_global():
    q, k, v = draw(3, 2, 2, 29, 4)
    mask = torch.arange(29) % 5 != torch.tensor([1, 4])[:, None]
    other = draw(3, 2, 2, 29, 4, seed=1)
    found = longformer_attention(q, k, v, mask, window=4, of_global=tuple(other))
    return distance(dense_softmax(*other, mask), found)


LIMITS = [
    Limit("a window over all, global tokens projected as the others, masked: softmax", wide_window),
    Limit("all tokens global, masked: softmax of the other projections", all_global),
]


def against_transformers():
    from transformers.models.longformer import configuration_longformer as configuration
    from transformers.models.longformer import modeling_longformer as modeling

    config = configuration.LongformerConfig(hidden_size=16, num_attention_heads=2, attention_window=[8])
    with torch.random.fork_rng([]):
        oracle = modeling.LongformerSelfAttention(config, 0).double().eval()
        place = Place(d_model=16, num_heads=2, max_len=40)
        mechanism = build("longformer", place, window=8, num_global=3).double()
    x = draw(2, 40, 16)
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    marks = torch.where(mask, 0.0, -1e4)
    marks[:, :3] = 1e4
    with torch.no_grad():
        joined = [
            (mechanism.qkv, (oracle.query, oracle.key, oracle.value)),
            (mechanism.q_global, (oracle.query_global,)),
            (mechanism.kv_global, (oracle.key_global, oracle.value_global)),
        ]
        for linear, parts in joined:
            for name in ("weight", "bias"):
                getattr(linear, name).copy_(torch.cat([getattr(part, name) for part in parts]))
        mechanism.out.weight.copy_(torch.eye(16))
        mechanism.out.bias.zero_()
        kinds = {"is_index_masked": marks < 0, "is_index_global_attn": marks > 0, "is_global_attn": True}
        expected = oracle(x, attention_mask=marks, **kinds)[0]
        return distance(expected[mask], mechanism(x, mask)[mask])


def against_flex():
    q, k, v = draw(3, 2, 2, 131, 4)
    mask = torch.arange(131) % 7 != torch.tensor([3, 5])[:, None]
    own = {"window": 40, "even_window": True, "of_global": (q[:, :, :2], k, v)}

    def sees(b, h, i, j):
        near = (j >= i - 19) & (j <= i + 20)
        return (near | (i < 2) | (j < 2)) & (mask[b, j] | (i == j))

    real = mask[:, None, :, None]
    return distance(flex(q, k, v, sees) * real, longformer_attention(q, k, v, mask, **own) * real)


ORACLES = [
    Oracle(
        "transformers 5.23",
        "LongformerSelfAttention, whose softmax is in float32, all six projections copied, 3 global, masked",
        against_transformers,
        tolerance=1e-6,
    ),
    Oracle("torch FlexAttention", "an even window and global tokens, a mask with holes", against_flex),
]

FAULTS = {
    **attention_faults("longformer_attention"),
    "window off by one": Plant("longformer_attention", changed(window=lambda w: w + 2), {"window": 16}),
}
