"""YOSO: the explicit matrix of collision probabilities, or of counted collisions, with its gradient."""

import math

import torch

from proofs.faults import NO_SCALE, NO_WINDOW, Plant, swapped, unmasked
from proofs.kit import Limit, Oracle, by_head, distance, draw


def unit(x):
    return x / torch.sqrt((x**2).sum(dim=-1, keepdim=True))


@by_head
def reference(module, head, q, k, v, real):
    q, k, bits = unit(q), unit(k[real]), module.bits
    cosines = q @ k.T
    if module.expectation:
        chance = (1 - torch.acos(cosines) / math.pi) ** bits
    else:
        planes = module.fixed_directions[head].double().T.split(bits)
        signs = [((q.detach() @ p.T) > 0, (k.detach() @ p.T) > 0) for p in planes]
        chance = sum((a[:, None] == b[None]).all(dim=-1).double() for a, b in signs) / len(signs)
    if not (module.expectation and module.exact_gradient):  # its value, and the bound as its slope
        chance = chance.detach() * (1 + bits / 2 * (cosines - cosines.detach()))
    mixed = chance @ v[real]
    size = mixed.norm(dim=-1, keepdim=True)
    out = mixed / torch.where(size == 0, 1.0, size)  # a query may meet no key
    if module.conv_weight is not None:
        kernel, shifted = module.conv_weight[head, 0, :, 0], torch.zeros_like(v)
        for i in real:
            near = [(j - i + len(kernel) // 2, j) for j in real if abs(j - i) <= len(kernel) // 2]
            shifted[i] = sum(kernel[t] * v[j] for t, j in near)
        out = out + shifted
    return out


CASES = [
    {},
    {"bits": 16},
    {"bits": 3, "exact_gradient": True, "kernel_size": 5},
    {"expectation": False, "bits": 3, "num_hashes": 7, "hash_seed": 2},
    {"expectation": False, "bits": 2, "num_hashes": 4, "redraw_every": 0, "kernel_size": 3},
]


def one_direction():
    from models.yoso import yoso_attention

    v, planes = draw(2, 2, 20, 8, seed=1), draw(2, 8, 12, seed=2)
    q = draw(2, 2, 1, 8, seed=3) * draw(2, 2, 20, 1, seed=4).abs()
    mask = torch.arange(20) < torch.tensor([20, 9])[:, None]
    total = (v * mask[:, None, :, None]).sum(dim=2, keepdim=True)
    found = yoso_attention(q, 3 * q, v, mask, bits=4, planes=planes)
    return distance(unit(total).expand_as(v), found)


def one_bit():
    """A kernel with a name of its own: arc-cosine of degree 0 is 1 - angle / pi."""
    from models.yoso import yoso_attention

    q, k, v = draw(2, 2, 20, 8, seed=1), draw(2, 2, 20, 8, seed=2), draw(2, 2, 20, 8, seed=3)
    apart, together = (unit(q)[:, :, :, None] + sign * unit(k)[:, :, None] for sign in (-1, 1))
    angle = 2 * torch.atan2(apart.norm(dim=-1), together.norm(dim=-1))
    return distance(unit((1 - angle / math.pi) @ v), yoso_attention(q, k, v, bits=1))


LIMITS = [
    Limit("one bit: the arc-cosine kernel of degree 0, from angles by atan2, outputs of length one", one_bit),
    Limit("queries and keys of one direction, sampled: the sum of values, of length one", one_direction),
]


def transformers_layer(gradients):
    from transformers.models.yoso.configuration_yoso import YosoConfig
    from transformers.models.yoso.modeling_yoso import YosoSelfAttention

    from models import Place, build

    module = build("yoso", Place(d_model=16, num_heads=2, max_len=40), bits=9, kernel_size=3)
    module = module.double().eval()
    config = YosoConfig(
        hidden_size=16, num_attention_heads=2, hash_code_len=9, conv_window=3, use_expectation=True
    )
    layer = YosoSelfAttention(config).double().eval()
    with torch.no_grad():
        for part, linear in enumerate((layer.query, layer.key, layer.value)):
            linear.weight.copy_(module.qkv.weight[part * 16 :][:16])
            linear.bias.copy_(module.qkv.bias[part * 16 :][:16])
        module.out.weight.copy_(torch.eye(16))
        module.out.bias.zero_()
        layer.conv.weight.copy_(torch.ones_like(layer.conv.weight))
        module.conv_weight.copy_(torch.ones_like(module.conv_weight))
    found, x = [], draw(2, 40, 16, seed=5).requires_grad_()
    convolved = torch.ones(2, 40, dtype=torch.float64)  # it multiplies the convolution by the mask it adds
    for out in (module(x), layer(x, convolved)[0]):
        found.append(torch.autograd.grad((out * draw(2, 40, 16, seed=6)).sum(), x)[0] if gradients else out)
    return distance(found[1], found[0])


ORACLES = [
    Oracle(
        "transformers 5.23 (YosoSelfAttention)",
        "expectation and convolution, weights copied",
        lambda: transformers_layer(False),
    ),
    Oracle(
        "transformers 5.23 (YosoSelfAttention)",
        "gradient by the input, with the paper's bound",
        lambda: transformers_layer(True),
    ),
]

FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("yoso_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("yoso_attention", swapped),
    "window off by one": NO_WINDOW,
    "wrong eps": "the formula has no eps; only the length of a zero vector is guarded",
}
