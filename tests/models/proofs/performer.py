"""Performer: the explicit matrix of feature products, stabilisers taken over the real keys alone."""

import torch

from proofs.faults import Plant, attention_faults, other_eps, unscaled
from proofs.kit import by_head


@by_head
def reference(module, head, q, k, v, real):
    d, k, v = q.shape[-1], k[real], v[real]
    q, k = q / d**0.25, k / d**0.25
    scores_q, scores_k = q @ module.features.T, k @ module.features.T
    f_q = (
        torch.exp(scores_q - (q * q).sum(1, True) / 2 - scores_q.max(dim=1, keepdim=True).values) + module.eps
    )
    f_k = torch.exp(scores_k - (k * k).sum(1, True) / 2 - scores_k.max()) + module.eps
    kernel = f_q @ f_k.T
    return kernel @ v / kernel.sum(dim=-1, keepdim=True)


CASES = [{}, {"num_features": 7}, {"num_features": 32, "eps": 1e-2}]

FAULTS = {
    **attention_faults("favor_attention"),
    "no scale": Plant("favor_attention", unscaled(power=0.25, both=True)),
    "wrong eps": Plant("favor_attention", other_eps),
}
