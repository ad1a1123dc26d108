"""Sparse Transformer: the sets of the paper as predicates on pairs of positions."""

import torch

from models.sparse import sparse_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, attention_where, by_head, dense_softmax, distance, draw, flex


def sees(i, j, near, far, *, pattern, stride, num_summary, causal, num_global, first_column):
    """Whether query i sees key j, for index tensors; the pattern starts after the global tokens."""
    all_see = (i < num_global) | (j < num_global)
    i, j = i - num_global, j - num_global
    if pattern == "strided":
        near_set, far_set = abs(i - j) <= stride, (i - j) % stride == 0
    else:
        near_set, far_set = i // stride == j // stride, j % stride >= stride - num_summary
        if first_column:
            far_set = far_set | (j % stride == 0)
    seen = (near_set & near) | (far_set & far)
    if causal:
        seen = seen & (j <= i)
    return all_see | seen


@by_head
def reference(module, head, q, k, v, real):
    near = far = True
    if module.split == "heads":
        near = head < module.place.num_heads / 2
        far = not near
    if module.split == "layers":
        near = module.place.layer_index % 2 == 0
        far = not near
    i, j = torch.arange(len(q))[:, None], torch.tensor(real)
    return attention_where(q, k[real], v[real], sees(i, j, near, far, **module.options))


CASES = [
    {},
    {"stride": 4},
    {"stride": 16, "causal": True},
    {"stride": 5, "split": "heads"},
    {"stride": 5, "split": "layers", "num_global": 2},
    {"stride": 1, "causal": True},
    {"pattern": "fixed", "stride": 8, "num_summary": 3},
    {"pattern": "fixed", "stride": 6, "num_summary": 3, "first_column": True},
    {"pattern": "fixed", "stride": 7, "num_summary": 2, "causal": True, "split": "heads"},
    {"pattern": "fixed", "stride": 7, "num_summary": 2, "first_column": True, "split": "heads"},
    {
        "pattern": "fixed",
        "stride": 10,
        "num_summary": 2,
        "causal": True,
        "num_global": 1,
        "first_column": True,
    },
]


def all_at_once():
    q, k, v = draw(3, 2, 2, 29, 4)
    mask = torch.arange(29) % 5 != torch.tensor([1, 4])[:, None]
    expected = dense_softmax(q, k, v, mask)
    ways = [{"stride": 29}, {"stride": 1}, {"pattern": "fixed", "stride": 29, "num_summary": 1}]
    ways += [{"pattern": "fixed", "stride": s, "num_summary": s} for s in (1, 6)]
    return max(distance(expected, sparse_attention(q, k, v, mask, **own)) for own in ways)


def from_the_last():
    q, k, v = draw(3, 2, 2, 29, 4)
    found = sparse_attention(q, k, v, stride=1, causal=True)[:, :, -1:]
    return distance(dense_softmax(q[:, :, -1:], k, v), found)


LIMITS = [
    Limit("a stride of 1 or of the length, or summaries of whole blocks, masked: softmax", all_at_once),
    Limit("a causal stride of 1, from the last token: softmax", from_the_last),
]


def against_flex():
    q, k, v = draw(3, 2, 2, 131, 4)
    mask = torch.arange(131) % 7 != torch.tensor([3, 5])[:, None]
    real, errors = mask[:, None, :, None], []
    ways = [
        ({"stride": 9}, lambda i, j: ((i - j).abs() <= 9) | ((i - j) % 9 == 0)),
        ({"stride": 9, "causal": True}, lambda i, j: (((i - j) <= 9) | ((i - j) % 9 == 0)) & (j <= i)),
        (
            {"pattern": "fixed", "stride": 9, "num_summary": 2},
            lambda i, j: (i // 9 == j // 9) | (j % 9 >= 7),
        ),
    ]
    for own, near in ways:
        expected = flex(q, k, v, lambda b, h, i, j, near=near: near(i, j) & (mask[b, j] | (i == j)))
        errors.append(distance(expected * real, sparse_attention(q, k, v, mask, **own) * real))
    return max(errors)


ORACLES = [Oracle("torch FlexAttention", "strided, strided causal and fixed, masks with holes", against_flex)]

FAULTS = {
    **attention_faults("sparse_attention"),
    "window off by one": Plant("sparse_attention", changed(stride=lambda s: s + 1), {"stride": 8}),
}
