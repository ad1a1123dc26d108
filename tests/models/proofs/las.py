"""LaS attention: decayed scores, their softmax over real keys, and the mean of neighbouring weights."""

import math
import warnings

import torch

from models.las import las_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, by_head, dense_softmax, distance, draw, normalised


@by_head
def reference(module, head, q, k, v, real):
    d, decay, reach = q.shape[-1], module.decay[head].item(), module.smoothing // 2
    out = torch.zeros_like(v)
    shares = [[1 / module.smoothing if abs(j - t) <= reach else 0.0 for t in real] for j in real]
    near = q.new_tensor(shares).reshape(len(real), len(real))  # of each weight, to each key
    for i in real:
        decayed = k.new_tensor([math.exp(-decay * abs(i - j)) for j in real])
        out[i] = near @ normalised(decayed * (k[real] @ q[i]) / math.sqrt(d)) @ v[real]
    return out


CASES = [{}, {"smoothing": 1}, {"smoothing": 5, "smallest_decay": 0.05, "largest_decay": 0.3}]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def without_decay_and_mean():
    q, k, v = draw(3, 3, 2, 37, 8)
    found = las_attention(q, k, v, MASK, decay=torch.zeros(2), smoothing=1)
    return distance(dense_softmax(q, k, v, MASK), found)


LIMITS = [Limit("decays 0 and smoothing=1", without_decay_and_mean)]


def flex_attention():
    """The decay as a score_mod; values, averaged by torch's pooling, in place of averaged weights."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    q, k, v = draw(3, 1, 2, 37, 8)
    decay = torch.tensor([0.0, 0.1], dtype=torch.float64)
    mean = torch.nn.AvgPool1d(3, stride=1, padding=1)

    def decayed(score, b, h, i, j):
        return score * torch.exp(-decay[h] * (i - j).abs())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it runs uncompiled here, and says so
        expected = flex(q, k, mean(v.flatten(0, 1).mT).mT.unflatten(0, (1, 2)), score_mod=decayed)
    return distance(expected, las_attention(q, k, v, decay=decay, smoothing=3))


def pooled_weights():
    """Torch's pooling of the weights themselves, decayed by a Toeplitz matrix of scipy."""
    from scipy.linalg import toeplitz

    q, k, v = draw(3, 3, 1, 37, 8)
    decay = torch.from_numpy(toeplitz([math.exp(-0.1 * n) for n in range(37)]))
    scores = (decay * (q @ k.mT) / math.sqrt(8)).masked_fill(~MASK[:, None, None, :], -math.inf)
    weights = torch.nn.functional.avg_pool1d(scores.softmax(dim=-1).flatten(0, 2)[:, None], 3, 1, 1)
    expected = weights.view(3, 1, 37, 37) @ (v * MASK[:, None, :, None])
    return distance(
        expected, las_attention(q, k, v, MASK, decay=torch.tensor([0.1], dtype=v.dtype), smoothing=3)
    )


ORACLES = [
    Oracle("torch FlexAttention", "decay as a score_mod, no padding", flex_attention),
    Oracle("scipy.linalg.toeplitz and torch avg_pool1d", "the mean taken of weights, padded", pooled_weights),
]

FAULTS = {
    **attention_faults("las_attention"),
    "window off by one": Plant("las_attention", changed(smoothing=lambda p: p + 2)),
}
