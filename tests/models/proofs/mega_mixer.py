"""Mega as a mixer: the gated attention of `mega`'s reference, and the standard block that makes it `mega`."""

import torch
import torch.nn.functional as F

from models import Place, build
from proofs import mega
from proofs.faults import Plant, swapped, unmasked, unscaled
from proofs.kit import Limit, Oracle, distance, draw, rows
from proofs.mega import MASK, biases_of_scipy, filtered, gated


def reference(module, x, mask=None):
    out = torch.zeros_like(x)
    for b, row, real in rows(x, mask):
        if real:
            update, candidate = gated(module.gated, row, real)
            out[b, real] = update * candidate - update * row[real]
    return out


BACKBONE = ("norm", "prenorm", "activation")
CASES = [{name: value for name, value in own.items() if name not in BACKBONE} for own in mega.CASES]


def standard_block(norm):
    """Parameters of a `mega` copied to the standard block around a `mega_mixer`, norms after residuals."""
    from lra.backbone import StandardBlock
    from lra.layout import Padded
    from lra.schema import BackboneConfig

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        place, own = Place(d_model=16, num_heads=2, max_len=40), {"key_width": 6, "attention": "laplace"}
        layer = {"d_ff": 24, "activation": "silu", "norm": norm, "prenorm": False}
        whole = build("mega", place, **own, **layer).double().eval()
        config = BackboneConfig(d_model=16, **layer)
        block = StandardBlock(build("mega_mixer", place, **own), config).double().eval()
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        names = {"gated": "mixer.gated", "norm": "mixer_norm", "ffn_norm": "ffn_norm", "ffn": "ffn"}
        for ours, theirs in names.items():
            block.get_submodule(theirs).load_state_dict(getattr(whole, ours).state_dict())
        x = draw(3, 37, 16)
        expected, _ = whole(x, MASK, None)
        found, _ = block(x, Padded(3, 37, MASK, x.device), None)
        return distance(expected[MASK], found[MASK])


LIMITS = [
    Limit("in a post-norm standard block it is mega, layer norm", lambda: standard_block("layer")),
    Limit("in a post-norm standard block it is mega, scale norm", lambda: standard_block("scale")),
]


def whole_by_other_libraries():
    """One row of 37 tokens: filters and bias matrix of scipy, attention and gates of torch."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = build("mega_mixer", Place(d_model=8, num_heads=1, max_len=40), key_width=6).double()
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        gate, x = module.gated, draw(1, 37, 8)
        base = gate.hidden(filtered(gate.average, x))
        u, z, r, candidate = (base[..., i:j] for i, j in ((0, 8), (8, 14), (14, 30), (30, 38)))
        q, k = (torch.addcmul(gate.offset[i], F.silu(z), gate.gain[i]) for i in (0, 1))
        bias = biases_of_scipy(gate.table, 37)
        attended = F.scaled_dot_product_attention(q, k, F.silu(gate.value(x)), attn_mask=bias)
        h = F.silu(candidate + gate.out(F.silu(r) * attended))
        return distance(torch.lerp(x, h, u.sigmoid()) - x, module(x))


ORACLES = [
    Oracle(
        "scipy.signal.lfilter, scipy.linalg.toeplitz, torch.nn.functional.scaled_dot_product_attention",
        "the whole mixer, unpadded",
        whole_by_other_libraries,
    )
]


class PlantInMega(Plant):
    """In models/mega.py, whose functions this mechanism calls."""

    def planted(self, name):
        return super().planted("mega")


FAULTS = {
    "no scale": PlantInMega("mega_attention", unscaled()),
    "no mask": PlantInMega("mega_attention", unmasked, check="content_invariance"),
    "k and v swapped": PlantInMega("mega_attention", swapped, {"key_width": 32}),
    "window off by one": PlantInMega("fft_conv", mega.moved_on),
    "wrong eps": "the norms belong to the standard block, and the formula has no other eps",
}
