"""Gated DeltaNet: a memory that decays, and in which the value under a key is replaced, not added to.

Paper    Yang et al., ICLR 2025, arXiv 2412.06464, eq. 10 and section 3.4
Computes S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(D)
         per head and direction, with   q, k, v = silu(conv(W x)),   conv: each channel, its last 4 inputs,
         q and k over their length,   beta = sigmoid(W_b x),   g = -exp(a) softplus(W_a x + dt)
         out = W_o (silu(W_g x) * (rms(o of the sequence) + rms(o of the reversed sequence)))
         which is the paper's layer on both, added: the token itself counts twice
         tied     one set of parameters
         untied   each direction with its own conv, W_b, W_a, a, dt and weight of rms
         forward  the causal original
Cost     time O(L D (C + D + E)), memory O(L (C + D + E) + L D E / C) per head; E = expand_v D, C = 64 tokens
         of a chunk
Exact    no; with orthonormal keys, beta = 1 and g = 0 it is linear attention without a normaliser
Padding  W x, beta and g are zero there: the state stays, the convolution reads zeros
Differs  two directions (paper: causal); heads as wide as the place says (paper: all keys together 0.75 of the
         model width); biases as the place says, zero at first (paper: none); the maps W start as torch starts
         them (authors: normal, 0.02, made for a width of 2048: at 64 to 128 the output would have a deviation
         of 0.01 to 0.03, and o^2 a mean no larger than the eps of rms); exp(a) at least 1e-4 at first (paper:
         evenly from 0 to 16); neg_eigval=True doubles beta (Grazzi et al., arXiv 2411.12537); conv and silu
         in the dtype of W x; kernel=fla, or auto on a GPU in half precision, runs the authors' kernels
"""
# b batch, l length, h heads, d head dim (keys), e head dim (values), s sets of parameters

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.delta_rule import delta_rule, linear_map, queries_keys_values, rms_norm, short_filters, width_of
from models.directions import both_directions, forward_alone, known_directions, packed_directions
from models.fla_kernels import checked, traits_of
from models.long_row import LongRow
from models.scan import CHUNK, Starts
from models.ssm import step_bias, tagged

DECAYS, LEAST_DECAY = (0.0, 16.0), 1e-4  # exp(A) at first
STEPS = (1e-3, 1e-1)  # softplus(dt) at first


def log_decays(raw: Tensor, log_rate: Tensor, step_bias: Tensor) -> Tensor:
    """g = -exp(A) softplus(W_a x + dt), at most 0: raw = W_a x and the others broadcast."""
    raw, log_rate, step_bias = at_least_fp32(raw, log_rate, step_bias)
    return -log_rate.exp() * F.softplus(raw + step_bias)


@register("gated_deltanet")
class GatedDeltaNet(Mixer):
    """Projections, short convolutions, norm and gate around `delta_rule`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "tied",
        expand_v: float = 2.0,
        kernel_size: int = 4,
        neg_eigval: bool = False,
        kernel: str = "auto",
        ssm_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(place, projections=False)
        if not 0 <= ssm_lr_scale < math.inf:
            raise ValueError(f"gated_deltanet needs ssm_lr_scale >= 0, got {ssm_lr_scale}")
        self.directions = known_directions(directions, "gated_deltanet")
        self.kernel = checked(kernel, "gated_deltanet")
        self.traits = traits_of(self.traits, kernel)
        self.largest_beta = 2.0 if neg_eigval else 1.0
        self.d = place.head_dim
        self.e = width_of(place, "gated_deltanet", expand_v=expand_v)
        heads, sets = place.num_heads, 2 if directions == "untied" else 1
        keys, values = heads * self.d, heads * self.e
        self.project = linear_map(place, place.d_model, 2 * keys + values)
        self.rates = linear_map(place, place.d_model, sets * 2 * heads)
        self.gate = linear_map(place, place.d_model, values)
        self.out = linear_map(place, values, place.d_model)
        self.conv = short_filters("gated_deltanet", sets, 2 * keys + values, kernel_size)  # [s 2hd+he w]
        low, high = DECAYS
        rate = (low + (high - low) * torch.rand(sets, heads)).clamp_min(LEAST_DECAY)
        self.log_rate = tagged(nn.Parameter(rate.log()), lr_scale=ssm_lr_scale)  # A
        self.step_bias = tagged(nn.Parameter(step_bias((sets, heads), *STEPS)), lr_scale=ssm_lr_scale)  # dt
        self.norm = nn.Parameter(torch.ones(sets, self.e))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        there, back = self.streams(x)
        if self.directions == "forward":
            mixed = forward_alone(self._recurrence, there, mask)
        else:
            there, back = both_directions(self._recurrence, there, mask, back_streams=back)
            mixed = there + back
        return self.out((mixed.flatten(2) * F.silu(self.gate(x))).to(x.dtype))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        there, back = self.streams(x)
        row = LongRow.of(cu_seqlens, x.shape[0], max_len, chunk=CHUNK, gap=self.conv.shape[-1] - 1)
        mixed = packed_directions(self._recurrence, there, row, directions=self.directions, back_streams=back)
        return self.out((mixed.flatten(1) * F.silu(self.gate(x))).to(x.dtype))

    def streams(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x: [... d_model] -> u [... 2hd+he], beta, log decay [... h], and the same for the way back."""
        u = self.project(x)
        raw = self.rates(x).unflatten(-1, (-1, 2, self.place.num_heads))  # [... s 2 h]
        beta = self.largest_beta * raw[..., 0, :].sigmoid()
        decay = log_decays(raw[..., 1, :], self.log_rate, self.step_bias)
        return (u, beta[..., 0, :], decay[..., 0, :]), (u, beta[..., -1, :], decay[..., -1, :])

    def _recurrence(self, u: Tensor, beta: Tensor, log_decay: Tensor, starts: Starts | None = None) -> Tensor:
        """rms(o): rows [s*b l ...], those of each set of parameters together -> [s*b l h e]."""
        u = u.unflatten(0, (len(self.conv), -1))  # [s b l 2hd+he]
        q, k, v = queries_keys_values(u, self.conv[:, None], width=self.d, num_heads=self.place.num_heads)
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        options = {"scale": self.d**-0.5, "kernel": self.kernel, "starts": starts}
        o = delta_rule(q, k, v, beta, log_decay, **options)
        o = o.unflatten(0, (len(self.conv), -1))
        return rms_norm(o, self.norm[:, None, None, None]).flatten(0, 1)

    def state_size(self, length: int) -> int:
        return (1 if self.directions == "forward" else 2) * self.place.num_heads * self.d * self.e
