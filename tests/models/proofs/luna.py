"""Luna: two steps of attention, the feed-forward network and the norms, written out."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from models import Place, build
from models.luna import luna_attention
from proofs.faults import NO_WINDOW, Plant, other_eps, unmasked, unscaled
from proofs.kit import Limit, Oracle, affine, attention, dense_softmax, distance, draw, normed, rows


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
    return module.slots * math.sqrt(width) + torch.tensor(waves, dtype=torch.float32).to(module.slots)


CASES = [
    {},
    {"tie_kv": False, "prenorm": False},
    {"proj_len": 5, "dynamic_projection": True, "sinusoidal": False},
    {"proj_len": 8, "norm": "scale", "activation": "relu", "prenorm": False},
    {"proj_len": 128, "dynamic_projection": True},
    {"norm": "none", "tie_kv": False},
]


def from_the_sequence_itself():
    """The step from X to P with X in the place of P, four heads of width 4."""
    q, k, v = draw(3, 2, 7, 16)
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    heads = [x.unflatten(-1, (4, 4)).transpose(1, 2) for x in (q, k, v)]
    expected = dense_softmax(*heads, mask).transpose(1, 2).flatten(2)
    return distance(expected, luna_attention(q, k, mask, num_heads=4, values=v))


LIMITS = [Limit("with the sequence in place of P a step is softmax attention", from_the_sequence_itself)]


def torch_attention(q, kv, out, *, tie_kv):
    """nn.MultiheadAttention of width 16 and 4 heads with copied projections; `out` None means none."""
    oracle = nn.MultiheadAttention(16, 4, batch_first=True).double().eval()
    weights = [q.weight, *(kv.weight, kv.weight)] if tie_kv else [q.weight, kv.weight]
    biases = [q.bias, *(kv.bias, kv.bias)] if tie_kv else [q.bias, kv.bias]
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat(weights))
        oracle.in_proj_bias.copy_(torch.cat(biases))
        oracle.out_proj.weight.copy_(torch.eye(16) if out is None else out.weight)
        oracle.out_proj.bias.copy_(torch.zeros(16) if out is None else out.bias)
    return lambda query, context, padded: oracle(query, context, context, padded, need_weights=False)[0]


def against_torch(tie_kv, prenorm):
    """Both outputs of a layer: two torch attentions and layer norms, put together as the paper does."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        place = Place(d_model=16, num_heads=4, max_len=30, num_layers=2)
        luna = build("luna", place, proj_len=5, d_ff=24, tie_kv=tie_kv, prenorm=prenorm).double().eval()
        pack = torch_attention(luna.pack_q, luna.pack_kv, None, tie_kv=tie_kv)
        unpack = torch_attention(luna.unpack_q, luna.unpack_kv, luna.out, tie_kv=tie_kv)
        x, p = draw(2, 13, 16), luna.init_carry(2)
        mask = torch.arange(13) < torch.tensor([13, 4])[:, None]
        norm = partial(F.layer_norm, normalized_shape=(16,))
        before, after = (norm, lambda t: t) if prenorm else (lambda t: t, norm)
        y_p = pack(before(p), before(x), ~mask)
        x_1, p_1 = after(unpack(before(x), y_p, None) + x), after(y_p + p)
        expected = after(luna.ff.down(F.relu(luna.ff.up(before(x_1)))) + x_1)
        found, carry = luna(x, mask, p)
    return max(distance(expected[mask], found[mask]), distance(p_1, carry))


ORACLES = [
    Oracle(
        "torch.nn.MultiheadAttention",
        f"two of them with copied weights, {'tied' if tie_kv else 'two'} projections of keys and values, "
        f"norms {'before' if prenorm else 'after'}, X and P",
        partial(against_torch, tie_kv, prenorm),
    )
    for tie_kv, prenorm in ((True, False), (False, False), (True, True))
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
