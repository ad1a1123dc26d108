"""Mamba: the recurrence of every channel, token by token, in each direction."""

import torch
import torch.nn.functional as F

from models.mamba import selective_scan
from models.mamba2 import ssd
from proofs.faults import NO_SCALE, Plant, swapped, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, quiet, rows, silu, with_drawn_weights


def one_way(module, which, x, order, real):
    """{position: output [d]} of one row, walked in `order`; parameters of set `which`."""
    taps, rank, states = module.conv_weight[which], module.dt_proj.shape[-1], module.A_log.shape[-1]
    h, found = torch.zeros(x.shape[-1], states, dtype=x.dtype), {}
    for when, position in enumerate(order):
        if position not in real:
            continue
        total = module.conv_bias[which]
        for back in range(min(taps.shape[-1], when + 1)):
            if order[when - back] in real:
                total = total + taps[:, back] * x[order[when - back]]
        u = silu(total)
        low, B, C = (module.x_proj[which] @ u).split([rank, states, states])
        dt = torch.log1p(torch.exp(module.dt_proj[which] @ low + module.dt_bias[which]))[:, None]
        h = torch.exp(-dt * torch.exp(module.A_log[which])) * h + dt * B * u[:, None]
        found[position] = h @ C + module.D[which] * u
    return found


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        inner, z = affine(module.in_proj, row).chunk(2, dim=-1)
        ways = [(0, list(range(len(row))))]
        if module.directions != "forward":
            ways.append((1 if module.directions == "untied" else 0, list(range(len(row)))[::-1]))
        found = [one_way(module, which, inner, order, set(real)) for which, order in ways]
        for i in real:
            out[b, i] = affine(module.out_proj, sum(way[i] for way in found) * silu(z[i]))
    return out


CASES = [
    {},
    {"directions": "tied", "d_state": 3, "dt_rank": 3},
    {"directions": "forward", "d_state": 4, "expand": 1},
]


def streams(length=150, channels=6):
    x, BC = draw(1, 2, length, channels), draw(2, 1, 2, length, 5, seed=1)
    return x, BC[0], BC[1], draw(1, 2, length, channels, seed=2).abs()


def limit_of_no_decay():
    x, B, C, dt = streams()
    expected = torch.einsum("rbis,rbjs,rbjd,ij->rbid", C, B, x, torch.ones(150, 150).double().tril())
    return distance(expected, selective_scan(x, B, C, 0 * dt, torch.ones(1, 5, 6).double()))


def limit_of_mamba2():
    """Equal rates of all states and of the channels of a head are one decay a head."""
    x, B, C, dt = streams()
    rate = draw(3, seed=4).abs()
    by_head = dt[..., ::2]
    channels = rate.repeat_interleave(2).expand(1, 5, 6).contiguous()
    found = selective_scan(x, B, C, by_head.repeat_interleave(2, dim=-1), channels)
    expected = ssd(x[0].unflatten(-1, (3, 2)), B[0], C[0], -by_head[0] * rate)
    return distance(expected.flatten(-2), found[0])


LIMITS = [
    Limit("without decay: causal linear attention with C, B and x as q, k and v", limit_of_no_decay),
    Limit("one rate and step a head: the recurrence of mamba2", limit_of_mamba2),
]


@quiet("transformers")
def against_transformers():
    """directions=forward; the package computes in float32 here and there, whatever its weights are."""
    from transformers.models.mamba import modeling_mamba as package

    from models import Place, build

    config = package.MambaConfig(
        hidden_size=16, state_size=6, expand=2, num_hidden_layers=1, time_step_rank=3
    )
    with torch.random.fork_rng([]):
        theirs = with_drawn_weights(package.MambaMixer(config, layer_idx=0))
        place = Place(d_model=16, num_heads=2, max_len=100, bias=False)
        ours = build("mamba", place, directions="forward", d_state=6, dt_rank=3).double()
    with torch.no_grad():
        ours.in_proj.weight.copy_(theirs.in_proj.weight)
        ours.out_proj.weight.copy_(theirs.out_proj.weight)
        ours.conv_weight[0] = theirs.conv1d.weight[:, 0].flip(-1)
        for mine, other in (
            (ours.conv_bias, theirs.conv1d.bias),
            (ours.x_proj, theirs.x_proj.weight),
            (ours.dt_proj, theirs.dt_proj.weight),
            (ours.dt_bias, theirs.dt_proj.bias),
            (ours.A_log, theirs.A_log),
            (ours.D, theirs.D),
        ):
            mine[0] = other
        x = draw(2, 100, 16)
        return distance(theirs(x), ours(x))


def against_scipy():
    """One channel with a constant step, B and C is a filter with a pole for each state."""
    from scipy.signal import lfilter

    x, B, C = draw(1, 1, 100, 1), draw(3), draw(3, seed=1)
    rate, dt = torch.tensor([1.0, 0.3, 4.0]).double(), 0.1
    poles = (-dt * rate).exp()
    parts = [
        lfilter([(b * c).item()], [1.0, -p.item()], x[0, 0, :, 0].numpy())
        for b, c, p in zip(B, C, poles, strict=True)
    ]
    same = [part.expand(1, 1, 100, -1) for part in (B, C)]
    found = selective_scan(x, *same, torch.full_like(x, dt), rate[None, :, None])
    return distance(torch.from_numpy(sum(parts)), found[0, 0, :, 0])


ORACLES = [
    Oracle(
        "transformers 5.23.0, models/mamba",
        "MambaMixer, its weights, directions=forward; it takes rates and B in float32",
        against_transformers,
        tolerance=2e-6,
    ),
    Oracle("scipy 1.17.1, signal.lfilter", "a constant step, B and C: one pole a state", against_scipy),
]


def late(args, kwargs):
    """The decay of each token acts one token later."""
    args[3] = F.pad(args[3], (0, 0, 1, 0))[..., :-1, :]
    return args, kwargs


FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("both_directions", unmasked, check="content_invariance"),
    "k and v swapped": Plant("selective_scan", swapped),  # B and C: the keys and the queries
    "window off by one": Plant("selective_scan", late),
    "wrong eps": "the formula has no eps",
}
