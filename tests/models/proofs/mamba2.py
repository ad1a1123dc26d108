"""Mamba-2: the recurrence of every head, token by token, in each direction."""

import torch
import torch.nn.functional as F

from models.mamba2 import ssd
from models.scan import decayed_attention
from proofs.faults import NO_SCALE, Plant, other_eps, swapped, unmasked
from proofs.kit import Limit, Oracle, affine, distance, draw, quiet, rows, silu, with_drawn_weights


def one_way(module, which, x, BC, step, order, real):
    """{position: output [h e]} of one row, walked in `order`; parameters of set `which`."""
    wide = torch.cat([x, BC], dim=-1)
    taps, states = module.conv_weight[which], module.d_state
    H = torch.zeros(module.num_heads, states, x.shape[-1] // module.num_heads, dtype=x.dtype)
    found = {}
    for when, position in enumerate(order):
        if position not in real:
            continue
        total = module.conv_bias[which]
        for back in range(min(taps.shape[-1], when + 1)):
            if order[when - back] in real:
                total = total + taps[:, back] * wide[order[when - back]]
        u, B, C = silu(total).split([x.shape[-1], states, states])
        u = u.view(module.num_heads, -1)
        dt = torch.log1p(torch.exp(step[position] + module.dt_bias[which]))
        decay = torch.exp(-dt * torch.exp(module.A_log[which]))
        H = decay[:, None, None] * H + dt[:, None, None] * B[None, :, None] * u[:, None, :]
        found[position] = (H * C[None, :, None]).sum(dim=1) + module.D[which][:, None] * u
    return found


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    states, num_heads, inner = module.d_state, module.num_heads, module.inner
    for b, row, real in rows(x, mask):
        projected = affine(module.in_proj, row)
        z, u, rest = projected[:, :inner], projected[:, inner : 2 * inner], projected[:, 2 * inner :]
        ways = [(0, list(range(len(row))))]
        if module.directions != "forward":
            ways.append((1 if module.directions == "untied" else 0, list(range(len(row)))[::-1]))
        found = []
        for which, order in ways:
            own = rest[:, which * (2 * states + num_heads) :]
            BC, step = own[:, : 2 * states], own[:, 2 * states : 2 * states + num_heads]
            found.append(one_way(module, which, u, BC, step, order, set(real)))
        for i in real:
            y = sum(way[i] for way in found).flatten() * silu(z[i])
            y = y / torch.sqrt((y * y).mean() + module.eps) * module.norm_weight
            out[b, i] = affine(module.out_proj, y)
    return out


CASES = [
    {"d_state": 4},
    {"d_state": 4, "directions": "tied", "head_dim": 4},
    {"d_state": 3, "directions": "forward", "head_dim": 8, "expand": 1, "eps": 1e-2},
]


def streams(length=150):
    x, BC = draw(2, length, 3, 4), draw(2, 2, length, 5, seed=1)
    return x, BC[0], BC[1], -draw(2, length, 3, seed=2).abs()


def limit_of_no_decay():
    x, B, C, log_decay = streams()
    expected = torch.einsum("bis,bjs,bjhe,ij->bihe", C, B, x, torch.ones(150, 150).double().tril())
    return distance(expected, ssd(x, B, C, torch.zeros_like(log_decay)))


def limit_of_decayed_attention():
    x, B, C, log_decay = streams()
    q, k = (part.unsqueeze(2).expand(-1, -1, 3, -1) for part in (C, B))
    return distance(decayed_attention(q, k, x, log_decay.unsqueeze(-1)), ssd(x, B, C, log_decay))


LIMITS = [
    Limit("without decay: causal linear attention with C, B and x as q, k and v", limit_of_no_decay),
    Limit(
        "one B and C for all heads: gated linear attention with one decay a head", limit_of_decayed_attention
    ),
]


@quiet("transformers")
def against_transformers():
    """directions=forward; the package computes in float32 here and there, whatever its weights are."""
    from transformers.models.mamba2 import modeling_mamba2 as package

    from models import Place, build

    sizes = {"num_heads": 4, "head_dim": 8, "hidden_size": 16, "state_size": 6, "expand": 2, "n_groups": 1}
    config = package.Mamba2Config(**sizes, chunk_size=32, layer_norm_epsilon=1e-5, num_hidden_layers=1)
    with torch.random.fork_rng([]):
        theirs = with_drawn_weights(package.Mamba2Mixer(config, layer_idx=0))
        place = Place(d_model=16, num_heads=2, max_len=100, bias=False)
        ours = build("mamba2", place, directions="forward", d_state=6, head_dim=8).double()
    with torch.no_grad():
        ours.in_proj.weight.copy_(theirs.in_proj.weight)
        ours.out_proj.weight.copy_(theirs.out_proj.weight)
        ours.conv_weight[0] = theirs.conv1d.weight[:, 0].flip(-1)
        ours.conv_bias[0] = theirs.conv1d.bias
        for mine, other in ((ours.A_log, theirs.A_log), (ours.D, theirs.D), (ours.dt_bias, theirs.dt_bias)):
            mine[0] = other
        ours.norm_weight.copy_(theirs.norm.weight)
        x = draw(2, 100, 16)
        return distance(theirs(x), ours(x))


def against_scipy():
    """One head with a constant step is a filter: H_t = r H_{t-1} + B x_t, seen through C."""
    from scipy.signal import dlsim

    rates, length = 0.9, 100
    x, B, C = draw(1, length, 1, 3), draw(4), draw(4, seed=1)
    system = tuple(
        part.numpy() for part in (rates * torch.eye(4).double(), B[:, None], C[None], torch.zeros(1, 1))
    )
    # dlsim gives C H_t before the input of t: the input moved on by one is seen one step later
    after = torch.cat([x[0, :, 0], torch.zeros(1, 3).double()])
    expected = [torch.from_numpy(dlsim((*system, 1), after[:, e].numpy())[1][1:, 0]) for e in range(3)]
    same = [part.expand(1, length, -1) for part in (B, C)]
    log_decay = torch.full((1, length, 1), rates, dtype=torch.float64).log()
    return distance(torch.stack(expected, dim=-1), ssd(x, *same, log_decay)[0, :, 0])


ORACLES = [
    Oracle(
        "transformers 5.23.0, models/mamba2",
        "Mamba2Mixer, its weights, directions=forward; it sums states in float32",
        against_transformers,
        tolerance=2e-6,
    ),
    Oracle("scipy 1.17.1, signal.dlsim", "a constant step: the linear system (r I, B, C)", against_scipy),
]


def late(args, kwargs):
    """The decay of each token acts one token later."""
    args[3] = F.pad(args[3], (0, 0, 1, 0))[:, :-1]
    return args, kwargs


FAULTS = {
    "no scale": NO_SCALE,
    "no mask": Plant("both_directions", unmasked, {"d_state": 4}, check="content_invariance"),
    "k and v swapped": Plant("ssd", swapped, {"d_state": 4}),  # B and C: the keys and the queries
    "window off by one": Plant("ssd", late, {"d_state": 4}),
    "wrong eps": Plant("gated_norm", other_eps, {"d_state": 4}),
}
