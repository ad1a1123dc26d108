"""Search: the candidates' own references, added up with weights from explicit sums."""

import importlib
import math

import torch

from models import Place, build
from models.search import candidate_weights
from proofs.faults import NO_EPS, NO_WINDOW, Plant, swapped
from proofs.kit import Limit, distance, draw

NOT_ITS_OWN = "padding is its candidates' matter, and each is proven"


def share(module):
    """The weight of each candidate, number by number."""
    vectors, m = module.embeddings, module.embeddings.shape[1]
    queries, keys = vectors @ module.w_q, vectors @ module.w_k
    scores = []
    for i in range(len(vectors)):
        seen = [torch.exp((queries[i] * key).sum() / math.sqrt(m)) for key in keys]
        context = sum(weight * vector for weight, vector in zip(seen, vectors, strict=True)) / sum(seen)
        scores.append(torch.exp((vectors[i] + context).sum() / math.sqrt(m)))
    return [score / sum(scores) for score in scores]


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for weight, (name, mixer) in zip(share(module), module.candidates.items(), strict=True):
        out = out + weight * importlib.import_module(f"proofs.{name}").reference(mixer, x, mask)
    return out


CASES = [
    {},
    {
        "candidates": ["linear", "global_mean", "local"],
        "embedding_width": 3,
        "settings": {"local": {"window": 4}},
    },
]


def limit_of_one_candidate():
    """One embedding far above the others leaves that candidate alone."""
    module = build("search", Place(d_model=8, num_heads=2, max_len=20), candidates=["softmax", "linear"])
    module = module.double()
    with torch.no_grad():
        module.embeddings.copy_(torch.tensor([[400.0], [0.0]]).expand(2, 16))
        module.w_q.zero_()
        x = draw(2, 20, 8)
        return distance(module.candidates["softmax"](x), module(x))


def limit_of_equals():
    w_q, w_k = draw(5, 5, seed=1), draw(5, 5, seed=2)
    same = draw(4, 5)[:1].expand(4, 5)
    return distance(torch.full((4,), 0.25).double(), candidate_weights(same, w_q, w_k))


LIMITS = [
    Limit("one candidate with all the weight is that candidate", limit_of_one_candidate),
    Limit("equal embeddings give equal weights", limit_of_equals),
]

NO_ORACLE = "the paper that inspired it released no code"


def unscaled(args, kwargs):
    args[1] = args[1] * math.sqrt(args[1].shape[0])
    return args, kwargs


FAULTS = {
    "no scale": Plant("candidate_weights", unscaled),
    "no mask": NOT_ITS_OWN,
    "k and v swapped": Plant("candidate_weights", swapped),  # its queries and keys
    "window off by one": NO_WINDOW,
    "wrong eps": NO_EPS,
}
