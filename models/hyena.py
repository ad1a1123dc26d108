"""Hyena: long convolutions and gates in turn, the kernels given by a small network of the distance.

Paper    Poli et al. 2023, arXiv 2302.10866, definition 3.1 and sections 3.2-3.3
Computes v, x^1, ..., x^N = short convolutions of projections of the input;  z^1 = v,
         z^{n+1} = x^n * (h^n conv z^n + D^n z^n),   out = W z^{N+1} + c
         h^n_t = (exp(-a |t|/(max_len - 1)) + shift) network(features of |t|), a from slow to fast over the
         width; the network has sines of `frequency` (learned) times its linear maps in place of activations,
         its features are |t|/(max_len - 1) and sine and cosine of 0, 1, ..., bands - 1 periods of max_len
         normalise  the network over the sum of its absolute values over the width + eps, at each distance
         untied the last map of the network has outputs of its own for each direction; tied h_{-t} = h_t;
         forward no way back. The token itself counts once. The short convolution is centred, forward: causal
Cost     time O(N L log(L) D), memory O(N L D)
Exact    yes
Padding  projections and the input of every convolution are zeroed at padding; a hole keeps distances
Differs  two-sided (paper: causal); N long convolutions, as in the paper (released code of order N has N - 1:
         the first is left out), so normalise is on (released: an option, off): without it outputs grow
         with the length, to a root mean square of 60 at 16,384 tokens of unit size; it sums over one filter
         and direction (released: over all, no eps); features are fixed (released: learned at a rate of 1e-5),
         their 0 periods are 1e-4, as released; bias=false is honoured by the projections, while short
         convolutions and network keep their biases
"""
# b batch, l length, d width, n order, k taps, s directions, f features, w hidden width

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import known_directions, short_conv
from models.fft_conv import fft_conv, sides
from models.ssm import tagged

DECAY_TO = 1e-2  # what the window falls to, at 0.3 of max_len in the last feature and 1.5 in the first
SLOW, FAST = -math.log(DECAY_TO) / 1.5, -math.log(DECAY_TO) / 0.3
NORM_EPS = 1e-6


def features(distance: Tensor, max_len: int, bands: int) -> Tensor:
    """[k] -> [k 1 + 2 bands]: the distance as a share of the largest, and a cosine and sine of each band."""
    share = distance / max(1, max_len - 1)
    periods = torch.linspace(1e-4, bands - 1, bands, device=distance.device, dtype=distance.dtype)
    angle = 2 * math.pi / max_len * distance[:, None] * periods
    return torch.cat([share[:, None], angle.cos(), -angle.sin()], dim=-1)


def filters(
    inputs: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    frequency: Tensor,
    *,
    shift: float = 0.0,
    normalise: bool = False,
    eps: float = NORM_EPS,
) -> Tensor:
    """inputs: [k f], weights: [w f], [w w] ..., [s n d w], biases: [w] but for the last -> [s n d k].

    The products are of float64, which neither autocast nor TF32 rounds: `frequency` and the next sine
    multiply an error of the first by hundreds.
    """
    (like,) = at_least_fp32(weights[-1])
    inputs, frequency = inputs.double(), frequency.double()
    *weights, last = (weight.double() for weight in weights)
    hidden = inputs
    for weight, bias in zip(weights, biases, strict=True):
        hidden = torch.sin(frequency * (hidden @ weight.mT + bias.double()))
    kernels = (last @ hidden.mT).to(like.dtype)
    if normalise:
        kernels = kernels / (kernels.abs().sum(dim=-2, keepdim=True) + eps)
    rates = torch.linspace(SLOW, FAST, last.shape[-2], device=last.device, dtype=torch.float64)
    return kernels * (torch.exp(-rates[:, None] * inputs[:, 0]) + shift).to(like.dtype)


def hyena(
    v: Tensor,
    kernels: Tensor,
    backs: Tensor | None,
    gates: Sequence[Tensor],
    skip: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """v: [b l d], kernels, backs: [n d k], backs None if it does not look ahead, gates: n of [b l d], skip:
    [n d], mask: [b l] bool -> [b l d].
    """
    for n, gate in enumerate(gates):
        if mask is not None:
            v = v.masked_fill(~mask[..., None], 0)
        v = gate * (fft_conv(v, kernels[n], None if backs is None else backs[n]) + v * skip[n])
    return v


@register("hyena")
class Hyena(Mixer):
    """Projections and short convolutions around `hyena`, and the network of its filters."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        order: int = 2,
        d_filter: int = 64,
        filter_layers: int = 2,
        bands: int = 16,
        frequency: float = 14.0,
        shift: float = 0.0,
        normalise: bool = True,
        kernel_size: int = 3,
        directions: str = "untied",
        filter_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(place, projections=False)
        if order < 1 or bands < 1 or d_filter < 1 or filter_layers < 0:
            raise ValueError(
                f"hyena needs order, bands and d_filter >= 1 and filter_layers >= 0, got order={order}, "
                f"bands={bands}, d_filter={d_filter}, filter_layers={filter_layers}"
            )
        self.directions = known_directions(directions, "hyena")
        if kernel_size < 1:
            raise ValueError(f"hyena needs kernel_size >= 1, got {kernel_size}")
        if kernel_size % 2 == 0 and directions != "forward":
            raise ValueError(
                f"hyena centres a short kernel of odd size unless directions=forward, got {kernel_size=}"
            )
        if not 0 < frequency < math.inf or not math.isfinite(shift):
            raise ValueError(
                f"hyena needs frequency > 0 and a finite shift, got frequency={frequency}, shift={shift}"
            )
        self.order, self.bands, self.shift, self.normalise = order, bands, shift, normalise
        d, streams = place.d_model, (order + 1) * place.d_model
        self.streams = nn.Linear(d, streams, bias=place.bias)
        self.short_weight, self.short_bias = uniform(kernel_size, (streams, kernel_size), (streams,))
        self.skip = nn.Parameter(torch.randn(order, d))
        self.out = nn.Linear(d, d, bias=place.bias)

        self.frequency = nn.Parameter(torch.full((d_filter,), frequency))
        widths = [1 + 2 * bands] + [d_filter] * filter_layers
        layers = [uniform(width, (d_filter, width), (d_filter,)) for width in widths]
        kernels = (2 if directions == "untied" else 1, order, d, d_filter)
        self.filter_weights = nn.ParameterList([w for w, _ in layers] + uniform(d_filter, kernels))
        self.filter_biases = nn.ParameterList([bias for _, bias in layers])
        for parameter in (self.frequency, *self.filter_weights, *self.filter_biases):
            tagged(parameter, lr_scale=filter_lr_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        streams = self.streams(x)
        if mask is not None:
            streams = streams.masked_fill(~mask[..., None], 0)
        v, *gates = self.short(streams).chunk(self.order + 1, dim=-1)
        kernel, back = sides(self.kernels(x.shape[1]), self.directions)
        return self.out(hyena(v, kernel, back, gates, self.skip, mask))

    def short(self, streams: Tensor) -> Tensor:
        """The short convolution; one that looks both ways is a causal one of what stands `ahead`."""
        ahead = 0 if self.directions == "forward" else self.short_weight.shape[-1] // 2
        streams = F.pad(streams, (0, 0, 0, ahead)) if ahead else streams
        return short_conv(streams, self.short_weight, self.short_bias)[:, ahead:]

    def kernels(self, length: int) -> Tensor:
        """The filters at distances 0 ... length - 1, [s n d length]."""
        distance = torch.arange(length, device=self.skip.device, dtype=torch.float64)
        inputs = features(distance, self.place.max_len, self.bands)
        network = (self.filter_weights, self.filter_biases, self.frequency)
        return filters(inputs, *network, shift=self.shift, normalise=self.normalise)

    def state_size(self, length: int) -> int:
        return self.order * length * self.place.d_model  # what each convolution has seen


def uniform(fan_in: int, *shapes: tuple[int, ...]) -> list[nn.Parameter]:
    """Parameters drawn as those of torch's linear and convolution layers are."""
    bound = fan_in**-0.5
    return [nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes]
