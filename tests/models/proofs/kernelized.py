"""Kernelized attention: the distance of every query to every key."""

import torch

from models.kernelized import kernelized_attention
from proofs.faults import Plant, attention_faults, unscaled
from proofs.kit import Limit, Oracle, by_head, dense_softmax, distance, draw


@by_head
def reference(module, head, q, k, v, real):
    width, out = module.scale_width or q.shape[-1], torch.zeros_like(v)
    for i in real:
        out[i] = torch.exp(-((q[i] - k[real]) ** 2).sum(dim=1) / (2 * width**0.5)) @ v[real]
    return out


CASES = [{}, {"scale_width": 32}]


def keys_of_one_norm():
    q, k, v = (draw(2, 2, 13, 8, seed=i) for i in range(3))
    k = 2 * k / k.norm(dim=-1, keepdim=True)
    mask = torch.arange(13) < torch.tensor([13, 5])[:, None]
    sums, total = (kernelized_attention(q, k, x, mask) for x in (v, torch.ones_like(v)))
    real = mask[:, None, :, None].expand_as(v)
    return distance(dense_softmax(q, k, v, mask)[real], (sums / total)[real])


LIMITS = [Limit("keys of one norm, divided by the sum of its weights: softmax", keys_of_one_norm)]


def torch_cdist():
    q, k, v = (draw(2, 2, 40, 8, seed=i) for i in range(3))
    weights = torch.exp(-(torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * 8**0.5))
    return distance(weights @ v, kernelized_attention(q, k, v))


ORACLES = [Oracle(f"torch {torch.__version__.split('+')[0]}", "the weights from torch.cdist", torch_cdist)]

FAULTS = {
    **attention_faults("kernelized_attention"),
    "no scale": Plant("kernelized_attention", unscaled(power=0.25, both=True)),
    "wrong eps": "the formula divides by nothing",
}
