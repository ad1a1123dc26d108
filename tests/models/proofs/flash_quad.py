"""FLASH-Quad: gates, scores and squares written out for the real tokens of a row."""

import math

import torch

from models import Place, build
from models.flash_quad import flash_quad_attention
from proofs.faults import NO_WINDOW, Plant, other_eps, swapped, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, normed, rows


def reference(module, x, mask=None, carry=None):
    """-> (x, None)."""
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if not real:
            continue
        x_b = row[real]
        hidden = affine(module.hidden, normed(module.norm, x_b) if module.prenorm else x_b)
        hidden = hidden / (1 + torch.exp(-hidden))
        e = module.out.weight.shape[1]
        gate, v, shared = hidden[:, :e], hidden[:, e : 2 * e], hidden[:, 2 * e :]
        q, k = (module.gain[n] * shared + module.offset[n] for n in (0, 1))
        if module.rotate:
            q, k = (turned(part, real) for part in (q, k))
        scores = q @ k.T / (x.shape[1] if module.count_padding else len(real))
        scores = scores + bias_of(module, real)
        attended = torch.where(scores > 0, scores, 0.0) ** 2 @ v
        mixed = x_b + affine(module.out, gate * attended)
        out[b, real] = mixed if module.prenorm else normed(module.norm, mixed)
    return out, None


def turned(x, positions):
    """Numbers n and n + width / 2 as one complex number, times exp(i p 10000^(-2 n / width))."""
    half = x.shape[1] // 2
    angles = [[p * 10_000 ** (-n / half) for n in range(half)] for p in positions]
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * x.new_tensor(angles))
    return torch.cat([pairs.real, pairs.imag], dim=1)


def bias_of(module, real):
    """One number for each pair of real tokens, from the distance of their positions."""
    learned = module.position_bias
    if learned is None:
        return 0.0
    steps = [[i - j for j in real] for i in real]
    if hasattr(learned, "table"):
        middle = (len(learned.table) - 1) // 2
        return learned.table[torch.tensor(steps, device=learned.table.device) + middle]
    a, e = (vector[0] for vector in learned.vectors)
    half = len(a) // 2
    frequency = a.new_tensor([10_000 ** (-n / half) for n in range(half)])
    turn = a.new_tensor(steps)[..., None] * frequency
    along = a[:half] * e[:half] + a[half:] * e[half:]  # of the pair that is turned by 0
    across = a[:half] * e[half:] - a[half:] * e[:half]
    return (along * torch.cos(turn) + across * torch.sin(turn)).sum(dim=-1)


CASES = [
    {},
    {"key_width": 6, "position_bias": "toeplitz", "norm": "layer", "prenorm": False},
    {"key_width": 6, "position_bias": "none", "norm": "layer"},
    {
        "key_width": 5,
        "position_bias": "none",
        "rotate": False,
        "expansion": 3,
        "count_padding": True,
        "norm": "none",
    },
]

MASK = torch.arange(37) < torch.tensor([37, 12, 1])[:, None]


def constant_scores():
    """Queries and keys zero and a bias of c everywhere: the dense kernel is c^2 for every pair."""
    v = draw(3, 37, 10)
    zero, bias = torch.zeros(3, 37, 4, dtype=v.dtype), torch.full((37, 37), 0.3, dtype=v.dtype)
    expected = (0.09 * (v * MASK[..., None]).sum(dim=1, keepdim=True)).expand_as(v)
    return distance(expected, flash_quad_attention(zero, zero, v, MASK, bias=bias))


def second_order_kernel():
    """Where all scores are positive the kernel is (q . k)^2 / L^2, and the sum over keys comes first."""
    q, k, v = draw(3, 37, 4).abs(), draw(3, 37, 4, seed=1).abs(), draw(3, 37, 10, seed=2)
    real = MASK.to(v.dtype)
    moments = torch.einsum("bjs,bjt,bje->bste", k, k, v * real[..., None])
    expected = torch.einsum("bis,bit,bste->bie", q, q, moments) / real.sum(dim=1)[:, None, None] ** 2
    return distance(expected, flash_quad_attention(q, k, v, MASK))


LIMITS = [
    Limit("the dense kernel of one value, for scores that are all equal", constant_scores),
    Limit("the dense kernel (q . k)^2, for scores that are all positive", second_order_kernel),
]


def flash_pytorch(mask=None, **own):
    """Weights copied, its T5 bias made zero, no residual; it divides by the padded length."""
    from flash_pytorch import GAU

    with torch.random.fork_rng(devices=[]):
        place = Place(d_model=16, num_heads=1, max_len=40)
        own |= {"key_width": 6, "position_bias": "none", "rotate": False, "norm": "layer"}
        module = build("flash_quad", place, **own).double().eval()
        oracle = GAU(dim=16, query_key_dim=6, expansion_factor=2.0, add_residual=False).double().eval()
    module.gain.data, module.offset.data = draw(2, 6, seed=1), draw(2, 6, seed=2)
    e, weight, bias = 32, module.hidden.weight.data, module.hidden.bias.data
    swap = torch.cat([torch.arange(e, 2 * e), torch.arange(e)])  # it has values before the gate
    oracle.to_hidden[0].weight.data, oracle.to_hidden[0].bias.data = weight[swap], bias[swap]
    oracle.to_qk[0].weight.data, oracle.to_qk[0].bias.data = weight[2 * e :], bias[2 * e :]
    oracle.offsetscale.gamma.data, oracle.offsetscale.beta.data = module.gain.data, module.offset.data
    oracle.to_out[0].weight.data, oracle.to_out[0].bias.data = module.out.weight.data, module.out.bias.data
    oracle.rel_pos_bias.relative_attention_bias.weight.data.zero_()
    x = draw(3, 37, 16)
    real = torch.ones_like(MASK) if mask is None else mask
    return distance(oracle(x, mask=mask)[real], (module(x, mask, None)[0] - x)[real])


def toeplitz_of_scipy():
    from scipy.linalg import toeplitz

    with torch.random.fork_rng(devices=[]):
        place = Place(d_model=16, num_heads=1, max_len=40)
        learned = build("flash_quad", place, key_width=6, position_bias="toeplitz").double().position_bias
    table = learned.table.detach()
    expected = toeplitz(table[39 : 39 + 37], table[39 - 36 : 40].flip(0))
    return distance(torch.from_numpy(expected), learned(37))


ORACLES = [
    Oracle("FLASH-pytorch 0.1.9", "GAU, weights copied, no bias, no padding", flash_pytorch),
    Oracle(
        "FLASH-pytorch 0.1.9",
        "count_padding, weights copied, no bias, padded",
        lambda: flash_pytorch(MASK, count_padding=True),
    ),
    Oracle("scipy.linalg.toeplitz", "position_bias=toeplitz", toeplitz_of_scipy),
]


def longer_queries(args, kwargs):
    """As if the division by the length were of another power."""
    return [args[0] * math.sqrt(args[0].shape[1]), *args[1:]], kwargs


FAULTS = {
    "no scale": Plant("flash_quad_attention", longer_queries),
    "no mask": Plant("flash_quad_attention", unmasked, check="content_invariance"),
    "k and v swapped": Plant("flash_quad_attention", swapped, {"key_width": 32}),
    "window off by one": NO_WINDOW,
    "wrong eps": Plant("make_norm", other_eps, {"norm": "layer"}),
}
