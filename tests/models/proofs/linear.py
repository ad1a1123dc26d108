"""Linear attention: the explicit matrix of kernel values over its row sums."""

import torch

from proofs.faults import NO_SCALE, Plant, attention_faults, other_eps
from proofs.kit import by_head


def positive(x):
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


@by_head
def reference(module, head, q, k, v, real):
    kernel = positive(q) @ positive(k[real]).T
    return kernel @ v[real] / torch.clamp(kernel.sum(dim=-1, keepdim=True), min=module.eps)


CASES = [{}, {"eps": 1e-2}]

FAULTS = {
    **attention_faults("linear_attention"),
    "no scale": NO_SCALE,
    "wrong eps": Plant("linear_attention", other_eps),
}
