"""Luna: two steps of attention, the feed-forward network and the norms, written out."""

import math

import torch

from proofs.faults import NO_WINDOW, Plant, other_eps, unmasked, unscaled
from proofs.kit import affine, attention, normed, rows


def reference(module, x, mask=None, carry=None):
    """-> (x, P); P starts from the module's slots if no carry is given, and is None after the last layer."""
    num_heads, d = module.place.num_heads, module.place.head_dim
    if carry is None:
        carry = first_slots(module).expand(x.shape[0], -1, -1)
    out_x, out_p = torch.zeros_like(x), []

    def many_heads(q, kv):
        k, v = (kv, kv) if module.tie_kv else (kv[:, : num_heads * d], kv[:, num_heads * d :])
        parts = [slice(h * d, (h + 1) * d) for h in range(num_heads)]
        return torch.cat([attention(q[:, p], k[:, p], v[:, p]) for p in parts], dim=-1)

    def feed_forward(x):
        hidden = affine(module.ff.up, x)
        if module.ff.activation is torch.nn.functional.relu:
            hidden = torch.where(hidden > 0, hidden, 0.0)
        else:  # gelu: x Phi(x)
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return affine(module.ff.down, hidden)

    for b, row, real in rows(x, mask):
        x_b, p = row[real], carry[b]
        x_in, p_in = (normed(module.norm_x, x_b), normed(module.norm_p, p)) if module.prenorm else (x_b, p)
        if real:
            y_p = many_heads(affine(module.pack_q, p_in), affine(module.pack_kv, x_in))
            y_p = y_p if num_heads * d == x.shape[-1] else affine(module.pack_out, y_p)
            seen = y_p[: len(real)] if module.dynamic_projection else y_p
            y_x = affine(
                module.out, many_heads(affine(module.unpack_q, x_in), affine(module.unpack_kv, seen))
            )
        else:
            y_p, y_x = torch.zeros_like(p), torch.zeros_like(x_b)
        if module.prenorm:
            x_b, p = x_b + y_x, p + y_p
            x_b = x_b + feed_forward(normed(module.norm_ff, x_b))
        else:
            x_b, p = normed(module.norm_x, x_b + y_x), normed(module.norm_p, p + y_p)
            x_b = normed(module.norm_ff, x_b + feed_forward(x_b))
        out_x[b, real] = x_b
        out_p.append(p)
    return out_x, None if module.place.layer_index + 1 == module.place.num_layers else torch.stack(out_p)


def first_slots(module):
    """The learned P, scaled and with sinusoidal positions (float32 in the module) if it has them."""
    if module.slot_positions is None:
        return module.slots
    num_slots, width = module.slots.shape
    half = math.ceil(width / 2)
    waves = [
        [
            math.sin(p / 10_000 ** (i / half)) if i < half else math.cos(p / 10_000 ** ((i - half) / half))
            for i in range(width)
        ]
        for p in range(num_slots)
    ]
    return module.slots * math.sqrt(width) + torch.tensor(waves, dtype=torch.float32).double()


CASES = [
    {},
    {"tie_kv": False, "prenorm": False},
    {"proj_len": 5, "dynamic_projection": True, "sinusoidal": False},
    {"proj_len": 8, "norm": "scale", "activation": "relu", "prenorm": False},
    {"norm": "none", "tie_kv": False},
]


def swapped_by_name(args, kwargs):
    args[1], kwargs["values"] = kwargs["values"], args[1]
    return args, kwargs


FAULTS = {
    "no scale": Plant("luna_attention", unscaled()),
    "no mask": Plant("luna_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("luna_attention", swapped_by_name, {"tie_kv": False}),
    "window off by one": NO_WINDOW,
    "wrong eps": Plant("make_norm", other_eps),
}
