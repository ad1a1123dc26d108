"""PolaFormer: two explicit matrices of signed kernel values, and the convolution token by token."""

import torch

from models.polaformer import polar_attention, short_convolution
from proofs.faults import Plant, attention_faults, changed, other_eps
from proofs.kit import Limit, Oracle, affine, distance, draw, file_of, heads, rows


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        mixed = [one_head(module, head, q, k, v, real) for head, q, k, v in heads(module, row)]
        mixed = torch.cat(mixed, dim=-1)
        if module.gate is not None:
            mixed = mixed * affine(module.gate, row)
        if real:
            out[b, real] = affine(module.out, mixed[real])
    return out


def one_head(module, head, q, k, v, real):
    d = v.shape[1]
    scale = torch.log(1 + torch.exp(module.scale[head]))
    scale = torch.where(scale < 0.01, 0.01, scale)
    power = 1 + module.alpha / (1 + torch.exp(-module.power[head]))
    same, other = kernels(q / scale, k[real] / scale, power)
    halves = [(same, v[real, : d // 2]), (other, v[real, d // 2 :])]
    out = torch.cat(
        [kernel @ part / (kernel.sum(1, True) + len(real) * module.eps) for kernel, part in halves], dim=1
    )
    return out + convolved(module, v, real) if module.kernel_size else out


def kernels(q, k, power):
    """Of each channel, |q|^p |k|^p counts for `same` where the signs agree, for `other` where they do not."""
    product = q[:, None] * k[None]
    size = torch.where(product == 0, 0.0, product.abs()) ** power
    return tuple(torch.where(kept, size, 0.0).sum(dim=-1) for kept in (product > 0, product < 0))


def convolved(module, v, real):
    centre, out = module.kernel_size // 2, torch.zeros_like(v)
    for i in real:
        taps = [(t, i + t - centre) for t in range(module.kernel_size) if i + t - centre in real]
        out[i] = module.conv_bias + sum(module.conv_weight[t] * v[j] for t, j in taps)
    return out


CASES = [
    {},
    {"kernel_size": 0, "gate": False},
    {"kernel_size": 3, "alpha": 1e-2, "eps": 1e-1},
    {"kernel_size": 7, "alpha": 1.5, "gate": False},
]


def limit_of_plain_product():
    """A channel counts |q k| where signs agree or not: (|q k| + q k) / 2 and (|q k| - q k) / 2."""
    q, k, v = draw(3, 2, 2, 13, 4)
    mask, ones = torch.arange(13) % 3 != 1, torch.ones(2, 4, dtype=torch.float64)
    same, other = ((q.abs() @ k.abs().mT + sign * q @ k.mT) / 2 * mask for sign in (1, -1))
    parts = [(same, v[..., :2]), (other, v[..., 2:])]
    count = mask.sum()
    expected = torch.cat([w @ p / (w.sum(dim=-1, keepdim=True) + count * 1e-6) for w, p in parts], dim=-1)
    return distance(expected, polar_attention(q, k, v, mask.expand(2, 13), scale=ones, power=ones))


def limit_of_equal_keys():
    q, k, v = draw(3, 2, 2, 13, 4)
    ones = torch.ones(2, 4, dtype=torch.float64)
    found = polar_attention(q, k[:, :, :1].expand_as(k), v, scale=ones, power=3 * ones, eps=1e-30)
    mean = v.mean(dim=2, keepdim=True).expand_as(v)
    both = ((q * k[:, :, :1]).amax(dim=-1) > 0) & ((q * k[:, :, :1]).amin(dim=-1) < 0)
    return distance(mean[both], found[both])


LIMITS = [
    Limit(
        "power 1: dense attention with (|q| . |k| + q . k) / 2 and (|q| . |k| - q . k) / 2",
        limit_of_plain_product,
    ),
    Limit("equal keys give the mean of the values, as softmax does", limit_of_equal_keys),
]


def against_fla_and_torch():
    """Sums over keys by a public file for features made here, and torch's depthwise convolution."""
    naive = file_of("fla", "ops/linear_attn/naive.py")
    q, k, v = draw(3, 64, 2, 4)  # [l h d]
    power, scale, weight, bias = (
        draw(2, 4, seed=1).abs() + 1,
        draw(2, 4, seed=2).abs() + 1,
        draw(5, 4),
        draw(4),
    )
    q_parts, k_parts = ([(sign * x / scale).clamp(min=0) ** power for sign in (1, -1)] for x in (q, k))
    halves = []
    for order, part in ((1, v[..., :2]), (-1, v[..., 2:])):
        features = torch.cat(q_parts[::order], dim=-1), torch.cat(k_parts, dim=-1), part
        turned = [torch.stack([x.roll(63 - i, dims=0) for i in range(64)]) for x in features]
        values, ones = turned[2], torch.ones_like(turned[2])
        mixed, sums = (
            naive.naive_chunk_linear_attn(*turned[:2], x, scale=1.0)[:, -1] for x in (values, ones)
        )
        halves.append(mixed / (sums + 64e-6))
    expected = torch.cat(halves, dim=-1).transpose(0, 1)
    convolution = torch.nn.functional.conv1d(v.permute(1, 2, 0), weight.T[:, None], bias, padding=2, groups=4)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = polar_attention(q, k, v, scale=scale, power=power) + short_convolution(v, weight, bias)
    return distance(expected + convolution.mT, found[0])


ORACLES = [
    Oracle(
        "fla-core 0.6.0, ops/linear_attn/naive.py, and torch", "sums and convolution", against_fla_and_torch
    )
]

FAULTS = {
    **attention_faults("polar_attention"),
    "no scale": Plant("polar_attention", changed(scale=lambda s: 2 * s)),
    "window off by one": Plant(
        "short_convolution", lambda args, kwargs: ([args[0], args[1].roll(1, dims=0), *args[2:]], kwargs)
    ),
    "wrong eps": Plant("polar_attention", other_eps, {"eps": 1e-2}),
}
