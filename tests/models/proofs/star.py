"""Star-Transformer: token by token, each with its list of five keys, and the relay with all tokens."""

import math

import torch
from torch import nn

from models import Place, build
from models.star import relay_attention, ring_attention
from proofs.faults import Plant, late, other_eps, swapped, unmasked, unscaled
from proofs.kit import Limit, Oracle, affine, attention, dense_softmax, distance, draw, normed, rows


def reference(module, x, mask=None, carry=None):
    """-> (x, relay); the relay starts as a mean if no carry is given, and is None after the last layer."""
    h, d = module.place.num_heads, module.place.head_dim
    last = module.place.layer_index + 1 == module.place.num_layers
    out, relays = torch.zeros_like(x), []

    def attend(name, query, context):
        """One query [width] to a list of vectors [n width]."""
        q = affine(getattr(module, f"{name}_q"), query[None])
        kv = affine(getattr(module, f"{name}_kv"), context)
        k, v = kv[:, : h * d], kv[:, h * d :]
        heads = [slice(i * d, (i + 1) * d) for i in range(h)]
        mixed = torch.cat([attention(q[:, s], k[:, s], v[:, s]) for s in heads], dim=-1)
        mixed = affine(getattr(module, f"{name}_out"), mixed)[0]
        return normed(getattr(module, f"{name}_norm"), torch.where(mixed > 0, mixed, 0.0))

    for b, row, real in rows(x, mask):
        inputs = tokens = row[real]
        relay = carry[b] if carry is not None else inputs.sum(dim=0) / max(1, len(real))
        for cycle in range(module.num_cycles):
            updated = []
            for i in range(len(real)):
                neighbours = [tokens[i - 1], tokens[i], tokens[(i + 1) % len(real)]]
                updated.append(attend("ring", tokens[i], torch.stack([*neighbours, inputs[i], relay])))
            tokens = torch.stack(updated) if updated else tokens
            if cycle + 1 < module.num_cycles or not last:
                relay = attend("relay", relay, torch.cat([relay[None], tokens]))
        out[b, real] = tokens
        relays.append(relay)
    return out, None if last else torch.stack(relays)


CASES = [{}, {"num_cycles": 1, "norm": "none"}, {"num_cycles": 3, "norm": "scale"}]


def three_tokens():
    """Scores with input and relay are -10^4: the last entry of every query is 1, of every other key 0."""
    q, k, v = (x.transpose(1, 2) for x in draw(3, 2, 2, 3, 8))  # [b l h d]
    q[..., -1], k[..., -1] = 1.0, 0.0
    hidden = torch.zeros_like(k)
    hidden[..., -1] = -1e4 * math.sqrt(8)
    found = ring_attention(q, k, v, (hidden, v), (hidden[:, :1], v[:, :1]))
    expected = dense_softmax(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return distance(expected, found)


def relay_alone():
    q, k, v = draw(3, 2, 2, 9, 8)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    expected = dense_softmax(q, k, v, mask)[:, :, 0]
    return distance(expected, relay_attention(q[:, :, 0], k.transpose(1, 2), v.transpose(1, 2), mask))


LIMITS = [
    Limit("a ring of three tokens that does not see input and relay is softmax attention", three_tokens),
    Limit("the relay sees tokens by softmax attention", relay_alone),
]


def torch_attention(module, name):
    """nn.MultiheadAttention with the projections of one of the two attentions."""
    q, kv, out = (getattr(module, f"{name}_{part}") for part in ("q", "kv", "out"))
    oracle = nn.MultiheadAttention(16, 4, batch_first=True).double().eval()
    oracle.in_proj_weight.copy_(torch.cat([q.weight, kv.weight]))
    oracle.in_proj_bias.copy_(torch.cat([q.bias, kv.bias]))
    oracle.out_proj.load_state_dict(out.state_dict())
    return lambda query, context, mask: oracle(query, context, context, attn_mask=mask, need_weights=False)[0]


def against_torch():
    """Three cycles of one row with holes: keys in one row [tokens; inputs; relay], a mask of pairs."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        place = Place(d_model=16, num_heads=4, max_len=30, num_layers=2)
        star = build("star", place, num_cycles=3).double().eval()
        x = draw(1, 9, 16)
        real = torch.tensor([[True, True, False, True, True, True, False, True, False]])
        found, carry = star(x, real, None)
        ring, relay_to = torch_attention(star, "ring"), torch_attention(star, "relay")
        x = tokens = x[real][None]
        n, relay = 6, x.mean(dim=1, keepdim=True)
        i, j = torch.arange(n)[:, None], torch.arange(n)
        apart = (i - j) % n
        hidden = torch.cat(
            [(apart > 1) & (apart < n - 1), i != j, torch.zeros(n, 1, dtype=torch.bool)], dim=1
        )
        for _ in range(3):
            mixed = ring(tokens, torch.cat([tokens, x, relay], dim=1), hidden)
            tokens = nn.functional.layer_norm(mixed.relu(), (16,))
            mixed = relay_to(relay, torch.cat([relay, tokens], dim=1), None)
            relay = nn.functional.layer_norm(mixed.relu(), (16,))
    return max(distance(tokens[0], found[real]), distance(relay[:, 0], carry))


ORACLES = [
    Oracle(
        "torch.nn.MultiheadAttention",
        "a dense mask of band, own input and relay, copied weights, three cycles, a mask with holes",
        against_torch,
    )
]


FAULTS = {
    "no scale": Plant("ring_attention", unscaled()),
    "no mask": Plant("ring_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("ring_attention", swapped),
    "window off by one": Plant("ring_attention", late(1, 2)),  # keys and values, around the ring
    "wrong eps": Plant("make_norm", other_eps),
}
