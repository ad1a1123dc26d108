"""TNN: a Toeplitz matrix for each feature, its entries a small network of the signed offset, and a gate.

Paper    Qin et al. 2023, arXiv 2305.04749, sections 3.2-3.4
Computes out = W (u * T v) + c,   u, v = silu of projections to expand * d_model features,
         (T v)_i = sum_j gamma^{|i-j|} t(i - j) v_j   for each feature; t is a network of `rpe_layers` + 2
         linear maps, x / rms(x) and ReLU before each but the first, of i - j itself (par_type=1)
         learned_decay  gamma + (1 - gamma) sigmoid(g) in place of gamma, one g for each feature
         tied one network for offsets of both signs (the paper's); forward j <= i alone. The token itself
         counts once
Cost     time O(L log(L) D), memory O(L D)
Exact    yes
Padding  padded rows of v are zeroed; a hole keeps the distances around it
Differs  only the one-dimensional form (tno2d, of the released runs on images, knows the grid); no norm after
         the gate (an option of the released code, off by default); tied and forward alone, as published;
         bias=false is honoured by the projections, while the network keeps its biases
"""
# b batch, l length, d width, e expanded width, k offsets, w width of the network

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import known_directions
from models.fft_conv import fft_conv

NORM_EPS = 1e-8
INIT_STD = 0.02  # of the projections, weights and biases


def rms_normed(x: Tensor, *, eps: float = NORM_EPS) -> Tensor:
    """x / (root mean square + eps) over the last axis, no parameters."""
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps)


def coefficients(
    offsets: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], log_gamma: Tensor
) -> Tensor:
    """gamma^|i-j| t(i-j). offsets: [... k], weights: [w 1], [w w] ..., [e w], biases: [w] ..., [e],
    log_gamma: float64, [e] or [1] -> [... e k].

    Made in float64, which neither autocast nor TF32 rounds: TF32 has no odd offset above 2,048, and an error
    of log_gamma is multiplied by the offset.
    """
    (like,) = at_least_fp32(weights[-1])
    weights, biases = ([part.double() for part in parts] for parts in (weights, biases))
    offsets = offsets.double()[..., None]
    hidden = F.linear(offsets, weights[0], biases[0])
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        hidden = F.linear(F.relu(rms_normed(hidden)), weight, bias)
    return (hidden * torch.exp(offsets.abs() * log_gamma)).to(like.dtype).mT


def gated_toeplitz(
    v: Tensor, past: Tensor, future: Tensor | None, u: Tensor, mask: Tensor | None = None
) -> Tensor:
    """u * T v. u, v: [b l e], past: [e k] of offsets 0, 1, ..., future: [e k] of -1, -2, ... or None, mask:
    [b l] bool -> [b l e].
    """
    if mask is not None:
        v = v.masked_fill(~mask[..., None], 0)
    return u * fft_conv(v, past, future)


@register("tnn")
class TNN(Mixer):
    """Projections around `gated_toeplitz`, and the network of its entries."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        expand: int = 1,
        d_rpe: int = 32,
        rpe_layers: int = 3,
        gamma: float = 0.999,
        learned_decay: bool = False,
        directions: str = "tied",
    ) -> None:
        super().__init__(place, projections=False)
        if expand < 1 or d_rpe < 1 or rpe_layers < 0:
            raise ValueError(
                f"tnn needs expand and d_rpe >= 1 and rpe_layers >= 0, got expand={expand}, d_rpe={d_rpe}, "
                f"rpe_layers={rpe_layers}"
            )
        if not 0 < gamma <= 1:
            raise ValueError(f"tnn needs 0 < gamma <= 1, got {gamma}")
        if learned_decay and gamma == 1:
            raise ValueError("tnn learns a decay between gamma and 1, got gamma=1; choose one below")
        self.directions = known_directions(directions, "tnn", ("tied", "forward"))
        self.gamma, width = gamma, expand * place.d_model
        self.streams = nn.Linear(place.d_model, 2 * width, bias=place.bias)
        self.out = nn.Linear(width, place.d_model, bias=place.bias)
        for parameter in (*self.streams.parameters(), *self.out.parameters()):
            nn.init.normal_(parameter, std=INIT_STD)
        widths = [1] + [d_rpe] * (rpe_layers + 1) + [width]
        layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in zip(widths, widths[1:], strict=False)]
        self.rpe_weights = nn.ParameterList([layer.weight for layer in layers])
        self.rpe_biases = nn.ParameterList([layer.bias for layer in layers])
        self.decay = nn.Parameter(torch.randn(width)) if learned_decay else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        u, v = F.silu(self.streams(x)).chunk(2, dim=-1)
        return self.out(gated_toeplitz(v, *self.kernels(x.shape[1]), u, mask))

    def kernels(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The entries at offsets 0 ... length - 1 and, looking ahead, at -1 ... -length, [e length] each."""
        past = torch.arange(length, device=self.rpe_weights[0].device)
        offsets = past[None] if self.directions == "forward" else torch.stack([past, -1 - past])
        made = coefficients(offsets, self.rpe_weights, self.rpe_biases, self.log_decays())
        return made[0], None if self.directions == "forward" else made[1]

    def log_decays(self) -> Tensor:
        """log of gamma, or of gamma + (1 - gamma) sigmoid(g) = 1 - (1 - gamma) sigmoid(-g), in float64."""
        if self.decay is None:
            device = self.rpe_weights[0].device
            return torch.full((1,), math.log(self.gamma), device=device, dtype=torch.float64)
        return torch.log1p((self.gamma - 1) * torch.sigmoid(-self.decay.double()))

    def state_size(self, length: int) -> int:
        return length * self.out.in_features  # what the sum over all offsets has seen
