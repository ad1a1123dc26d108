"""Routing Transformer: every cluster's queries and keys picked by sorting, then averaged token by token."""

from functools import partial
from unittest import mock

import torch

from proofs.faults import Plant, attention_faults, changed, other_eps
from proofs.kit import Limit, Oracle, attention, by_head, dense_softmax, distance, draw

EPS = 1e-5


def unit(x, eps=EPS):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + eps)


@by_head
def reference(module, head, q, k, v, real):
    real, out = list(real) if module.use_mask else list(range(len(q))), torch.zeros_like(v)
    if not real:
        return out
    if head < module.num_local_heads:
        size = module.local_window
        for i in real:
            keys = [j for j in real if abs(i // size - j // size) <= 1]
            out[i] = attention(q[i : i + 1], k[keys], v[keys])[0]
        return out
    q, k = unit(q), unit(k)
    times = torch.zeros_like(q[:, :1])
    for centroid in module.centroids[head - module.num_local_heads]:
        queries, keys = (chosen(x.detach() @ centroid, real, module.window) for x in (q, k))
        where = torch.tensor(queries, device=q.device)
        out = out.index_put((where,), out[queries] + attention(q[queries], k[keys], v[keys]))
        times[queries] += 1
    return out / times.clamp_min(1)


def chosen(products, real, window):
    """The tokens of the largest products, compared in float32; the earlier one of two that are equal."""
    products = products.float().tolist()
    return sorted(real, key=lambda i: (-products[i], i))[:window]


CASES = [
    {},
    {"num_clusters": 5, "window": 7, "num_local_heads": 0},
    {"num_clusters": 3, "window": 20, "local_window": 4, "decay": 0.5, "commitment": 0.0},
    {"num_clusters": 4, "window": 9, "centroid_seed": 2, "use_mask": False},
]


def one_cluster():
    from models.routing import routing_attention

    q, k, v = draw(2, 2, 40, 8, seed=1), draw(2, 2, 40, 8, seed=2), draw(2, 2, 40, 8, seed=3)
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    found = routing_attention(q, k, v, mask, centroids=draw(2, 1, 8), window=40)
    expected = dense_softmax(unit(q), unit(k), v, mask)
    real = mask[:, None].expand(2, 2, 40)
    return distance(expected[real], found[real])


LIMITS = [Limit("one cluster as large as the sequence: softmax of normalised queries and keys", one_cluster)]


def package_clusters():
    """Its choice, attention inside clusters and average; it routes by q / |q|, in the same order."""
    from routing_transformer import routing_transformer as package

    from models.routing import routing_attention

    q, k, v = draw(2, 2, 60, 8, seed=4), draw(2, 2, 60, 8, seed=5), draw(2, 2, 60, 8, seed=6)
    centroids = unit(draw(2, 5, 8, seed=7))
    layer = package.KmeansAttention(num_clusters=5, window_size=12, num_heads=2, head_dim=8).double().eval()
    layer.kmeans.means.copy_(centroids)
    layer.kmeans.initted.fill_(True)
    exactly = partial(package.scatter_mean, eps=1e-300)  # its 1e-5 would make every mean smaller
    with torch.random.fork_rng(), torch.no_grad(), mock.patch.object(package, "scatter_mean", exactly):
        expected, _ = layer(unit(q, 0.0), unit(k, 0.0), v)
    return distance(expected, routing_attention(q, k, v, centroids=centroids, window=12, eps=0.0))


ORACLES = [
    Oracle(
        "routing-transformer 1.6.1 (KmeansAttention)",
        "routing by given centroids, attention inside clusters and the average over them, without a mask",
        package_clusters,
    )
]

ROUTED = {"num_clusters": 5, "window": 7, "num_local_heads": 0}
FAULTS = {
    **attention_faults("routing_attention", **ROUTED),
    "no scale": Plant("routing_attention", changed(scale=lambda s: 1.0), ROUTED),
    "window off by one": Plant("routing_attention", changed(window=lambda w: w + 1), ROUTED),
    "wrong eps": Plant("routing_attention", other_eps, ROUTED),
}
