"""Skyformer: explicit kernels of pairs, landmarks picked one by one, the inverse by the printed iteration."""

import functools

import torch

from models.skyformer import skyformer_attention
from proofs.faults import Plant, attention_faults, changed, unscaled
from proofs.kit import Limit, Oracle, affine, distance, draw, heads, rows


def mixed_bits(x):
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B % 2**32
    return x ^ x >> 16


@functools.cache
def number(counter, drawn, seed, layer):
    """The random integer below 2^32 of one counter."""
    key = mixed_bits((drawn + 0x9E3779B9) % 2**32)
    for part in (seed % 2**32, seed // 2**32 % 2**32, layer):
        key = mixed_bits(key ^ part)
    return mixed_bits(mixed_bits(counter) ^ key)


def draw_of(module):
    """What decides a module's numbers: draw (0 in evaluation), seed, layer."""
    drawn = int(module.draw.index) if module.training else 0
    return drawn, module.draw.seed, module.place.layer_index


def chosen(module, real):
    """Positions of the landmarks among queries, and of those among keys."""
    half, own = module.num_landmarks // 2, draw_of(module)
    if module.distinct:
        ranked = [sorted(real, key=lambda p: -number(2 * p + kind, *own)) for kind in (0, 1)]  # noqa: B023
        return [positions[:half] for positions in ranked]
    ranks = [[number(2 * i + kind, *own) * len(real) // 2**32 for i in range(half)] for kind in (0, 1)]
    return [[real[r] for r in kind] for kind in ranks]


def kernel(x, y):
    return torch.exp(-((x[:, None] - y[None]) ** 2).sum(dim=-1) / 2)


def reference(module, x, mask=None):
    out, parts = torch.zeros_like(x), {}
    for b, row, real in rows(x, mask):
        for head, q, k, v in heads(module, row):
            if not real:
                continue
            scale = (module.scale_width or q.shape[-1]) ** 0.25
            q, k, (of_q, of_k) = q / scale, k / scale, chosen(module, real)
            s = torch.cat([q[of_q], k[of_k]])
            m = kernel(s, s) + module.gamma * torch.eye(len(s), dtype=x.dtype)
            d = torch.diag(1 / torch.sqrt(m.sum(dim=1)))
            parts[b, head] = (d @ m @ d, kernel(q, s) @ d, d @ kernel(s, k[real]) @ v[real])
    norms = {key: a.sum(dim=0).max() for key, (a, _, _) in parts.items()}
    if module.coupled_start and norms:
        norms = dict.fromkeys(norms, torch.stack(list(norms.values())).max())
    for b, _, real in rows(x, mask):
        mixed = []
        for head in range(module.place.num_heads if real else 0):
            a, left, right = parts[b, head]
            z, eye = a.T / norms[b, head], torch.eye(len(a), dtype=a.dtype)
            for _ in range(module.num_iterations):
                az = a @ z
                z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
            mixed.append(left @ z @ right)
        if real:
            out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
    return out


CASES = [
    {},
    {"num_landmarks": 8, "landmark_seed": 5},
    {"num_landmarks": 16, "distinct": True},
    {"num_landmarks": 6, "gamma": 0.01, "num_iterations": 3, "scale_width": 32},
    {"num_landmarks": 8, "coupled_start": True},
]


def every_token(gamma):
    def measure():
        q, k, v = (scale * draw(2, 2, 24, 8, seed=i) for i, scale in enumerate((2.0, 2.0, 1.0)))
        mask = torch.arange(24) < torch.tensor([24, 5])[:, None]
        numbers = torch.randperm(48, generator=torch.Generator().manual_seed(3)).view(2, 24)
        options = {"num_landmarks": 64, "distinct": True, "num_iterations": 60, "gamma": gamma}
        found = skyformer_attention(q, k, v, mask, numbers=numbers, **options)
        dense = torch.exp(-(torch.cdist(q, k) ** 2) / (2 * 8**0.5)) * mask[:, None, None, :] @ v
        real = mask[:, None, :, None].expand_as(dense)
        return distance(dense[real], found[real])

    return measure


LIMITS = [
    Limit(
        f"every token a landmark, masked, gamma={gamma:.0e}: the dense Gaussian kernel",
        every_token(gamma),
        tolerance=max(10 * gamma**2, 1e-9),  # off by gamma^2 C^(-1) where queries meet keys
    )
    for gamma in (1e-2, 1e-3, 1e-6)
]


def solved_by_torch():
    q, k, v = (draw(2, 2, 40, 8, seed=i) for i in range(3))
    numbers = torch.randint(2**32, (2, 6), generator=torch.Generator().manual_seed(3))
    found = skyformer_attention(q, k, v, numbers=numbers, num_landmarks=12, num_iterations=30)
    of_q, of_k = (numbers * 40 // 2**32).unbind(0)
    s = torch.cat([q[:, :, of_q], k[:, :, of_k]], dim=2)
    c_qs, c_ss, c_sk = (
        torch.exp(-(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * 8**0.5))
        for x, y in ((q, s), (s, s), (s, k))
    )
    expected = c_qs @ torch.linalg.solve(c_ss + 0.1 * torch.eye(12, dtype=torch.float64), c_sk @ v)
    return distance(expected, found)


ORACLES = [
    Oracle(
        f"torch {torch.__version__.split('+')[0]}",
        "kernels from torch.cdist, the inverse from torch.linalg.solve, landmarks injected",
        solved_by_torch,
    )
]

FAULTS = {
    **attention_faults("skyformer_attention", num_landmarks=8),
    "no scale": Plant("skyformer_attention", unscaled(power=0.25, both=True), {"num_landmarks": 8}),
    "wrong eps": Plant("skyformer_attention", changed(gamma=lambda g: 2 * g), {"num_landmarks": 8}),
}
