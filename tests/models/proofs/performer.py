"""Performer: the explicit matrix of feature products, stabilisers taken over the real keys alone."""

import torch

from models.performer import favor_attention, orthogonal_features
from proofs.faults import Plant, attention_faults, other_eps, unscaled
from proofs.kit import Limit, Oracle, affine, distance, draw, heads, rows


def reference(module, x, mask=None):
    tops = {}
    for b, row, real in rows(x, mask):
        for head, _, k, v in heads(module, row):
            scaled = keys_and_values(module, k, v, real)[0] / scale_of(module)
            if len(scaled) and module.kernel == "softmax":
                tops[b, head] = (scaled @ module.features.T).max()
    out, highest = torch.zeros_like(x), torch.stack(list(tops.values())).max() if tops else None
    for b, row, real in rows(x, mask):
        mixed = []
        for head, q, k, v in heads(module, row):
            top = highest if module.coupled_stabiliser else tops.get((b, head))
            mixed.append(one_head(module, q, *keys_and_values(module, k, v, real), top) if real else q)
        if real:
            out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
    return out


def keys_and_values(module, k, v, real):
    if not module.use_mask:
        return k, v
    if module.zero_padding:
        kept = torch.tensor([[float(j in set(real))] for j in range(len(k))], dtype=k.dtype)
        return k * kept, v * kept
    return k[real], v[real]


def scale_of(module):
    return module.place.head_dim ** (0.5 if module.double_scaling else 0.25)


def one_head(module, q, k, v, top):
    if module.kernel == "relu":
        f_q, f_k = (x if module.features is None else x @ module.features.T for x in (q, k))
        f_q, f_k = (torch.where(x > 0, x, 0.0) + module.eps for x in (f_q, f_k))
    else:
        scale = scale_of(module)
        f_q, f_k = favor_features(q / scale, k / scale, module.features, module.eps, top)
    kernel = f_q @ f_k.T
    return kernel @ v / kernel.sum(dim=-1, keepdim=True)


def favor_features(q, k, features, eps, top):
    scores_q, scores_k = q @ features.T, k @ features.T
    f_q = torch.exp(scores_q - (q * q).sum(1, True) / 2 - scores_q.max(dim=1, keepdim=True).values) + eps
    return f_q, torch.exp(scores_k - (k * k).sum(1, True) / 2 - top) + eps


CASES = [
    {},
    {"num_features": 7},
    {"num_features": 32, "eps": 1e-2},
    {"num_features": 7, "double_scaling": True, "zero_padding": True},
    {"num_features": 7, "coupled_stabiliser": True},
    {"num_features": 7, "kernel": "relu"},
    {"num_features": 0, "kernel": "relu", "eps": 1e-3, "use_mask": False},
]


def limit_of_equal_keys():
    q, k, v = draw(3, 2, 2, 13, 4)
    found = favor_attention(q, k[:, :, :1].expand_as(k), v, features=draw(5, 4, seed=1))
    return distance(v.mean(dim=2, keepdim=True).expand_as(v), found)


def limit_of_large_eps():
    """eps hides every feature, up to 1 / eps."""
    q, k, v = draw(3, 2, 2, 13, 4)
    found = favor_attention(q, k, v, features=draw(5, 4, seed=1), eps=1e9)
    return distance(v.mean(dim=2, keepdim=True).expand_as(v), found)


LIMITS = [
    Limit("equal keys give the mean of the values, as softmax does", limit_of_equal_keys),
    Limit("eps above every feature gives the mean of the values", limit_of_large_eps, tolerance=1e-8),
]


def against_fast_attention(kernel):
    """`FastAttention` scales by d^(-1/4) under either kernel: for relu that is multiplied away."""

    def measure():
        from performer_pytorch import FastAttention

        q, k, v = draw(3, 2, 2, 50, 8)
        features = orthogonal_features(24, 8, torch.Generator().manual_seed(0)).double()
        with torch.random.fork_rng([]):
            theirs = FastAttention(8, nb_features=24, generalized_attention=kernel == "relu").double()
        theirs.projection_matrix.copy_(features)
        scale = 8**0.25 if kernel == "relu" else 1.0
        eps = {"softmax": 1e-4, "relu": 1e-3}[kernel]
        found = favor_attention(q, k, v, features=features, eps=eps, kernel=kernel)
        return distance(theirs(scale * q, scale * k, v), found)

    return measure


def against_nystromformer():
    """Its wrapper around `FastAttention`: queries and keys over d^(1/4), padded keys and values zero."""
    from performer_pytorch import FastAttention

    q, k, v = draw(3, 2, 2, 50, 8)
    features = orthogonal_features(24, 8, torch.Generator().manual_seed(0)).double()
    with torch.random.fork_rng([]):
        theirs = FastAttention(8, nb_features=24).double()
    theirs.projection_matrix.copy_(features)
    found = favor_attention(q, k, v, features=features, double_scaling=True)
    return distance(theirs(q / 8**0.25, k / 8**0.25, v), found)


ORACLES = [
    Oracle("performer-pytorch 1.1.4", "FastAttention, features copied", against_fast_attention("softmax")),
    Oracle(
        "performer-pytorch 1.1.4", "its generalised attention, kernel=relu", against_fast_attention("relu")
    ),
    Oracle("performer-pytorch 1.1.4", "called as Nystromformer does, double_scaling", against_nystromformer),
]

FAULTS = {
    **attention_faults("favor_attention"),
    "no scale": Plant("favor_attention", unscaled(power=0.25, both=True)),
    "wrong eps": Plant("favor_attention", other_eps),
}
