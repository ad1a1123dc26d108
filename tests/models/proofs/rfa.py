"""Random feature attention: the kernel as the mean cosine of projected differences, matrices written out."""

import math

import torch

from models.rfa import fourier_attention
from proofs.faults import Plant, attention_faults, changed, other_eps
from proofs.kit import Limit, by_head, distance, draw

# The mechanism multiplies sines and cosines; cos(a - b) = cos a cos b + sin a sin b is the other side.


def unit(x):
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True))


def mean_cosine(q, k, w):
    """[lq lk]: the mean over rows of w of cos(w . (q_i - k_j))."""
    return torch.cos((q[:, None] - k[None]) @ w.T).mean(dim=-1)


@by_head
def reference(module, head, q, k, v, real):
    matrices = module.drawn if module.training and module.redraw_every else module.pool
    w = matrices[head] * module.widths[head]
    kernel = mean_cosine(unit(q), unit(k[real]), w)
    return kernel @ v[real] / torch.clamp(kernel.sum(dim=-1, keepdim=True), min=module.eps)


CASES = [{}, {"num_features": 5, "num_draws": 2, "eps": 1e-1}, {"temperature": 0.7, "redraw_every": 0}]


def limit_of_dense_kernel():
    q, k, v = draw(3, 2, 2, 13, 4)
    w, mask = draw(2, 5, 4, seed=1), torch.arange(13) % 3 != 1
    out = []
    for b in range(2):
        for h in range(2):
            kernel = mean_cosine(unit(q[b, h]), unit(k[b, h]), w[h]) * mask
            out.append(kernel @ v[b, h] / kernel.sum(dim=-1, keepdim=True).clamp(min=1e-2))
    found = fourier_attention(q, k, v, mask.expand(2, 13), projections=w)
    return distance(torch.stack(out).view_as(v), found)


def limit_of_a_whole_grid():
    """For d = 1, u is 1 or -1, and the mean of cos(w_r x) over normal quantiles w_r is exp(-x^2 / 2)."""
    q, k, v = draw(3, 1, 1, 9, 1)
    level = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    w = (math.sqrt(2) * torch.erfinv(2 * level - 1)).view(1, -1, 1)
    expected = torch.softmax(q.sign() * k.sign().mT, dim=-1) @ v
    return distance(expected, fourier_attention(q, k, v, projections=w))


LIMITS = [
    Limit("dense attention with the mean of cosines, a mask with holes", limit_of_dense_kernel),
    Limit("softmax of u_i . u_j with projections on normal quantiles", limit_of_a_whole_grid, tolerance=1e-4),
]

NO_ORACLE = (
    "no installable package has it: fla and x-transformers lack it, fast-transformers needs a compiler, and "
    "the authors' code is an extension of fairseq"
)

FAULTS = {
    **attention_faults("fourier_attention"),
    "no scale": Plant("fourier_attention", changed(projections=lambda w: w / 4**0.5)),
    "wrong eps": Plant("fourier_attention", other_eps, {"eps": 1.0}),
}
