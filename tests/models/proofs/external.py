"""External attention: both normalisations one after the other, over the real positions and over the slots."""

import torch

from models.external import external_attention
from proofs.faults import NO_WINDOW, Plant
from proofs.kit import Oracle, affine, distance, draw, rows


def reference(module, x, mask=None):
    out, d = torch.zeros_like(x), module.place.head_dim
    for b, row, real in rows(x, mask):
        if not real:
            continue
        f, mixed = affine(module.query, row)[real], []
        for head in range(module.place.num_heads):
            weights = []
            for slot in module.keys:
                over_positions = torch.exp(f[:, head * d : (head + 1) * d] @ slot)
                weights.append(over_positions / over_positions.sum())
            a = torch.stack(weights, dim=1)  # [l s]
            mixed.append((a / a.sum(dim=1, keepdim=True)) @ module.values)
        out[b, real] = affine(module.out, torch.cat(mixed, dim=-1))
    return out


CASES = [{}, {"num_slots": 5}]

NO_LIMIT = "its keys and values are parameters: no size of memory makes it attention among tokens"


def torch_layers():
    with torch.random.fork_rng([]):
        keys = torch.nn.Linear(8, 64, bias=False, dtype=torch.float64)
        values = torch.nn.Linear(64, 8, bias=False, dtype=torch.float64)
    x = 3 * draw(2, 3, 50, 8)
    weights = torch.nn.Softmax(dim=2)(keys(x))
    expected = values(torch.nn.functional.normalize(weights, p=1, dim=3, eps=0.0))
    return distance(expected, external_attention(x, keys=keys.weight, values=values.weight.T))


ORACLES = [
    Oracle(
        f"torch {torch.__version__.split('+')[0]}",
        "the paper's algorithm from nn.Linear, nn.Softmax and F.normalize(p=1), weights copied",
        torch_layers,
    )
]


def scaled(args, kwargs):
    """The softmax has no scale; one that is put in is the mistake here."""
    args[0] = args[0] * args[0].shape[-1] ** -0.5
    return args, kwargs


def unmasked(args, kwargs):
    args[1] = None
    return args, kwargs


def swapped(args, kwargs):
    return args, {**kwargs, "keys": kwargs["values"], "values": kwargs["keys"]}


FAULTS = {
    "no scale": Plant("external_attention", scaled),
    "no mask": Plant("external_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("external_attention", swapped),
    "window off by one": NO_WINDOW,
    "wrong eps": "both divisions are one softmax, which divides by at least 1",
}
