"""Each mechanism once more, in float64, from its formula: slow, and with nothing taken from `models`.

A reference gets the mechanism's own module for its parameters and computes row by row. Padding is not masked
but left out: the real tokens of a row are picked first, so outputs exist at real positions alone.
`CASES` lists the arguments under which a mechanism is compared with its reference.
"""

import cmath
import math
from itertools import product

import torch

# x [l width] one row, real: its list of real positions, q, k, v [l d] of one head


def rows(x, mask):
    """(index, row [l width], real positions) of a batch."""
    for b in range(x.shape[0]):
        real = range(x.shape[1]) if mask is None else [i for i in range(x.shape[1]) if mask[b, i]]
        yield b, x[b], list(real)


def affine(linear, x):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def rotated(x, base):
    """Pair i of position p, read as a complex number, times exp(1j p base^(-2i/d)) (2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    turns = [
        [cmath.exp(1j * p * base ** (-2 * i / x.shape[-1])) for i in range(half)] for p in range(x.shape[0])
    ]
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def heads(module, x):
    """q, k, v of one row for each head; the projection holds all queries, then all keys, then all values."""
    d, all_heads = module.place.head_dim, affine(module.qkv, x)
    for head in range(module.place.num_heads):
        q, k, v = (
            all_heads[:, (part * module.place.num_heads + head) * d :][:, :d] for part in range(3)
        )  # [l d] each
        if module.place.rotary_base is not None:
            q, k = rotated(q, module.place.rotary_base), rotated(k, module.place.rotary_base)
        yield head, q, k, v


def normalised(scores):
    """exp(scores) over its row sums."""
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return weights / weights.sum(dim=-1, keepdim=True)


def attention(q, k, v):
    return normalised(q @ k.T / math.sqrt(q.shape[-1])) @ v


def by_head(one_head):
    """A reference from `one_head(module, head, q, k, v, real) -> [l d]`, defined at real positions."""

    def reference(module, x, mask=None):
        out = torch.zeros_like(x)
        for b, row, real in rows(x, mask):
            mixed = [one_head(module, head, q, k, v, real) for head, q, k, v in heads(module, row)]
            if real:
                out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
        return out

    return reference


@by_head
def softmax(module, head, q, k, v, real):
    return attention(q, k[real], v[real])


def positive(x):
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


@by_head
def linear(module, head, q, k, v, real):
    kernel = positive(q) @ positive(k[real]).T
    return kernel @ v[real] / torch.clamp(kernel.sum(dim=-1, keepdim=True), min=module.eps)


@by_head
def performer(module, head, q, k, v, real):
    d, k, v = q.shape[-1], k[real], v[real]
    q, k = q / d**0.25, k / d**0.25
    scores_q, scores_k = q @ module.features.T, k @ module.features.T
    f_q = (
        torch.exp(scores_q - (q * q).sum(1, True) / 2 - scores_q.max(dim=1, keepdim=True).values) + module.eps
    )
    f_k = torch.exp(scores_k - (k * k).sum(1, True) / 2 - scores_k.max()) + module.eps
    kernel = f_q @ f_k.T
    return kernel @ v / kernel.sum(dim=-1, keepdim=True)


@by_head
def linformer(module, head, q, k, v, real):
    e, f = (p[head if p.shape[0] > 1 else 0][:, real] for p in (module.proj_k, module.proj_v))
    return attention(q, e @ k[real], f @ v[real])


@by_head
def local(module, head, q, k, v, real):
    w, out = module.window, torch.zeros_like(q)
    near = {
        "sliding": lambda i, j: abs(i - j) <= w // 2,
        "block": lambda i, j: i // w == j // w,
        "neighbours": lambda i, j: abs(i // w - j // w) <= 1,
    }[module.pattern]
    for i in real:
        keys = [j for j in real if near(i, j)]
        out[i] = attention(q[i : i + 1], k[keys], v[keys])[0]
    return out


def landmarks(module, q, k, real):
    """Means of queries and keys over the real tokens of each segment that has any; none for short rows."""
    m, length = module.num_landmarks, q.shape[0]
    size = math.ceil(length / m)
    segments = [[i for i in real if i // size == s] for s in range(m)]
    return [torch.stack([x[s].mean(dim=0) for s in segments if s]) for x in (q, k)]


def nystrom(module, x, mask=None):
    out, parts = torch.zeros_like(x), []
    for b, row, real in rows(x, mask):
        for head, q, k, _ in heads(module, row):
            if real and len(q) > module.num_landmarks:
                q_mean, k_mean = landmarks(module, q, k, real)
                parts.append((b, head, normalised(q_mean @ k_mean.T / math.sqrt(q.shape[-1]))))
    norms = {(b, head): (a.sum(dim=0).max(), a.sum(dim=1).max()) for b, head, a in parts}
    if module.coupled_start and norms:
        together = [torch.stack([n[i] for n in norms.values()]).max() for i in (0, 1)]
        norms = {key: together for key in norms}
    inverses = {}
    for b, head, a in parts:
        z, eye = a.T / (norms[b, head][0] * norms[b, head][1]), torch.eye(len(a), dtype=a.dtype)
        for _ in range(module.num_iterations):
            z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
        inverses[b, head] = z
    for b, row, real in rows(x, mask):
        mixed = []
        for head, q, k, v in heads(module, row):
            if not real:
                continue
            if (b, head) in inverses:
                q_mean, k_mean = landmarks(module, q, k, real)
                scale = math.sqrt(q.shape[-1])
                one = normalised(q @ k_mean.T / scale) @ inverses[b, head]
                one = one @ normalised(q_mean @ k[real].T / scale) @ v[real]
            else:
                one = attention(q, k[real], v[real])
            if module.conv_weight is not None:
                one = one + convolved(module.conv_weight[head, 0, :, 0], v, real)
            mixed.append(one)
        if real:
            out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
    return out


def convolved(weight, v, real):
    """Position i gets sum_t weight_t v_(i + t - centre) over the real positions i + t - centre."""
    centre, present = len(weight) // 2, set(real)
    out = []
    for i in range(len(v)):
        taken = [t for t in range(len(weight)) if i + t - centre in present]
        terms = [weight[t] * v[i + t - centre] for t in taken]
        out.append(torch.stack(terms).sum(dim=0) if terms else torch.zeros_like(v[0]))
    return torch.stack(out)


def fnet(module, x, mask=None):
    def fourier(n):
        return torch.tensor(
            [[cmath.exp(-2j * math.pi * j * k / n) for k in range(n)] for j in range(n)],
            dtype=torch.complex128,
        ).reshape(n, n)

    out = torch.zeros_like(x)
    over_length, over_width = fourier(x.shape[1]), fourier(x.shape[2])
    for b, row, real in rows(x, mask):
        if real:
            out[b, real] = (over_length[:, real] @ row[real].to(torch.complex128) @ over_width).real[real]
    return out


def identity(module, x, mask=None):
    return torch.zeros_like(x)


def global_mean(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if real:
            mean = sum(affine(module.value, row[i]) for i in real) / len(real)
            out[b, real] = affine(module.out, mean)
    return out


NORM_EPS = 1e-5


def normed(norm, x):
    """Layer norm, root-mean-square norm with one scale, or none."""
    if hasattr(norm, "bias"):
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + NORM_EPS)
        return centred / spread * norm.weight + norm.bias
    if hasattr(norm, "scale"):
        return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + NORM_EPS) * norm.scale
    return x


def luna(module, x, mask=None, carry=None):
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


REFERENCES = {
    "fnet": fnet,
    "global_mean": global_mean,
    "identity": identity,
    "linear": linear,
    "linformer": linformer,
    "local": local,
    "luna": luna,
    "nystrom": nystrom,
    "performer": performer,
    "softmax": softmax,
}

CASES = {
    "softmax": [{"kernel": "fused"}, {"kernel": "math"}],
    "linear": [{}, {"eps": 1e-2}],
    "performer": [{}, {"num_features": 7}, {"num_features": 32, "eps": 1e-2}],
    "linformer": [{}, *({"proj_len": 8, "share": share} for share in ("none", "heads", "kv", "layers"))],
    "nystrom": [
        {},
        {"num_landmarks": 4},
        {"num_landmarks": 5, "conv_kernel": 0},
        {"num_landmarks": 3, "num_iterations": 2, "conv_kernel": 3},
        {"num_landmarks": 4, "coupled_start": True},
    ],
    "luna": [
        {},
        {"tie_kv": False, "prenorm": False},
        {"proj_len": 5, "dynamic_projection": True, "sinusoidal": False},
        {"proj_len": 8, "norm": "scale", "activation": "relu", "prenorm": False},
        {"norm": "none", "tie_kv": False},
    ],
    "local": [
        {},
        *({"window": w, "pattern": p} for w, p in product((4, 5, 16), ("sliding", "block", "neighbours"))),
    ],
}


def cases(name):
    return CASES.get(name, [{}])


def run(name, probe, x, mask):
    """The reference of mechanism `name` on the layers of a conformance probe, called as the probe is."""
    reference = REFERENCES[name]
    if len(probe.layers) == 1:
        return reference(probe.layers[0], x, mask)
    carry = None
    for layer in probe.layers:
        x, carry = reference(layer, x, mask, carry)
    return x
