"""SGConv: a long kernel of few weights, each scale twice as long and as coarse as the one before.

Paper    Li et al. 2023, arXiv 2210.09298, section 3
Computes y_i = sum_{j <= i} K_{i-j} x_j + sum_{j > i} B_{j-i-1} x_j + D x_i   for each feature, and
         out = a * sigmoid(b),   [a, b] = W GELU(y) + c
         K = [u_0(w_0) a^{n-1}, u_1(w_1) a^{n-2}, ..., u_{n-1}(w_{n-1})] / Z, times (t + 1)^{-power} at tap t,
         each w_s has kernel_dim weights, u_s upsamples linearly by 2^{max(0, s-1) + finest}, the number
         n = 1 + ceil(log2(max_len / kernel_dim)) - finest of pieces reaches max_len, and a goes from
         decay_min to decay_max over the features
         untied K and B are learned apart; tied B_j = K_{j+1}; forward no B. The token itself counts once
Cost     time O(L log(L) D), memory O(L D), parameters O(log(L) D)
Exact    yes
Padding  padded rows are zeroed before the convolution; a hole keeps the distances around it
Differs  Z, the norm of the initial kernel, is taken at construction and saved (released: at the first
         forward); power is one constant (released: a power for each feature, drawn between decay_min and
         decay_max, learned or fixed, and no decay from piece to piece); of the released ways to join pieces
         only this one, not sum (all pieces added up), nearest (upsampled without interpolation) and hankel
         (one piece times eigenvectors); kernels keep the weight decay of the run, as in the released code; no
         dropout between GELU and W, which keeps its bias with bias=false
"""
# b batch, l length, d width, k taps, s directions, n scales, w weights of a piece

import math

import torch
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.directions import known_directions
from models.fft_conv import fft_conv, sides
from models.ssm import Output, tagged

KERNEL_INITS = ("randn", "cos")


def multiscale_kernel(
    pieces: Tensor, norm: Tensor | float, decay: Tensor, length: int, *, finest: int = 0, power: float = 0.0
) -> Tensor:
    """pieces: [n s d w], norm: [s d 1], decay: [d] -> the first `length` taps, fewer if there are not as
    many, [s d length].
    """
    (pieces,) = at_least_fp32(pieces)
    decay, taps, made = decay.to(pieces.dtype)[:, None], [], 0
    for scale, piece in enumerate(pieces.unbind(0)):
        if made < length:
            factor = 2 ** (max(0, scale - 1) + finest)
            taps.append(upsampled(piece * decay ** (len(pieces) - 1 - scale), factor))
            made += taps[-1].shape[-1]
    kernel = torch.cat(taps, dim=-1)[..., :length] / norm
    if power:
        distance = torch.arange(1, kernel.shape[-1] + 1, device=kernel.device, dtype=kernel.dtype)
        kernel = kernel * distance**-power
    return kernel


def upsampled(piece: Tensor, factor: int) -> Tensor:
    """Linear interpolation [... w] -> [... w*factor], the ends held: F.interpolate without align_corners,
    whose gradient is not deterministic on a GPU.
    """
    at = (torch.arange(factor, device=piece.device, dtype=piece.dtype) + 0.5) / factor - 0.5
    weights = torch.stack([(-at).clamp(min=0), 1 - at.abs(), at.clamp(min=0)])  # of left, own, right
    left, right = piece[..., :1], piece[..., -1:]
    near = [torch.cat([left, piece[..., :-1]], dim=-1), piece, torch.cat([piece[..., 1:], right], dim=-1)]
    with full_precision(piece):
        return (torch.stack(near, dim=-1) @ weights).flatten(-2)


def sgconv(
    x: Tensor, kernel: Tensor, back: Tensor | None, skip: Tensor, mask: Tensor | None = None
) -> Tensor:
    """x: [b l d], kernel, back: [d k], back None if it does not look ahead, skip: [d], mask: [b l] bool ->
    [b l d].
    """
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    return fft_conv(x, kernel, back) + x * skip


@register("sgconv")
class SGConv(Mixer):
    """`sgconv` with a kernel of pieces, and the layer's output stage."""

    traits = Traits(
        fixed_length=True,
        uses_order=True,
        because={"fixed_length": "the kernel has as many pieces as reach max_len"},
    )

    def __init__(
        self,
        place: Place,
        *,
        kernel_dim: int = 64,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        finest: int = 0,
        power: float = 0.0,
        kernel_init: str = "randn",
        directions: str = "untied",
        output: str = "glu",
        kernel_lr_scale: float = 0.1,
    ) -> None:
        super().__init__(place, projections=False)
        if kernel_dim < 1:
            raise ValueError(f"sgconv needs kernel_dim >= 1, got {kernel_dim}")
        if not 0 < decay_min <= decay_max < math.inf:
            raise ValueError(
                f"sgconv needs 0 < decay_min <= decay_max, got decay_min={decay_min}, decay_max={decay_max}"
            )
        if finest < 0 or not 0 <= power < math.inf:
            raise ValueError(f"sgconv needs finest >= 0 and power >= 0, got finest={finest}, power={power}")
        if kernel_init not in KERNEL_INITS:
            raise ValueError(
                f"unknown kernel_init '{kernel_init}' for sgconv; choose from: {', '.join(KERNEL_INITS)}"
            )
        self.directions = known_directions(directions, "sgconv")
        self.decay_range, self.finest, self.power = (decay_min, decay_max), finest, power
        scales = max(1, 1 + math.ceil(math.log2(place.max_len / kernel_dim)) - finest)
        shape = (scales, 2 if directions == "untied" else 1, place.d_model, kernel_dim)
        pieces = nn.Parameter(torch.randn(shape) if kernel_init == "randn" else cosines(shape))
        self.pieces = tagged(pieces, lr_scale=kernel_lr_scale, weight_decay=True)
        whole = kernel_dim * 2 ** (scales - 1 + finest)
        initial = multiscale_kernel(self.pieces.detach(), 1.0, self.decay, whole, finest=finest, power=power)
        self.register_buffer("kernel_norm", initial.norm(dim=-1, keepdim=True))
        self.skip = nn.Parameter(torch.randn(place.d_model))
        self.output = Output(place.d_model, place.d_model, kind=output, name="sgconv")

    @property
    def decay(self) -> Tensor:
        device = self.pieces.device
        return torch.linspace(*self.decay_range, self.place.d_model, device=device, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[1] > self.place.max_len:
            raise ValueError(
                f"sgconv was built for at most {self.place.max_len} positions and got {x.shape[1]}; "
                "raise max_len or shorten the input"
            )
        options = {"finest": self.finest, "power": self.power}
        kernels = multiscale_kernel(self.pieces, self.kernel_norm, self.decay, x.shape[1], **options)
        return self.output(sgconv(x, *sides(kernels, self.directions), self.skip, mask))

    def state_size(self, length: int) -> int:
        return length * self.place.d_model  # such a kernel has no shorter summary of what it has seen


def cosines(shape: tuple[int, int, int, int]) -> Tensor:
    """Pieces [n s d w] of 0, 1, ... d - 1 whole periods, in an order of their own at each scale."""
    scales, s, d, w = shape
    periods = torch.arange(d)[:, None] * torch.linspace(0, 2 * math.pi, w)
    return torch.stack([periods.cos()[torch.randperm(d)].expand(s, -1, -1) for _ in range(scales)])
