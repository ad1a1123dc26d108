"""DeltaNet: a memory in which the value under a key is replaced, not added to.

Paper    Yang et al., NeurIPS 2024, arXiv 2406.06484, sections 3.1 to 3.3; the rule is that of Schlag et al.,
         ICML 2021, arXiv 2102.11174
Computes S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(D)
         per head and direction, with   q, k, v = f(conv(W x)),   conv: each channel, its last 4 inputs,
         beta = sigmoid(W_b x);   f of v is silu, that of q and k is feature_map (silu, relu, elu: elu + 1,
         identity) over its length qk_norm (l2, l1)
         out = W_o (rms(o of the sequence) + rms(o of the reversed sequence))
         which is the paper's layer on both, added: the token itself counts twice
         tied     one set of parameters
         untied   each direction with its own conv, W_b and weight of rms
         forward  the causal original
Cost     time O(L D (C + D + E)), memory O(L (C + D + E) + L D E / C) per head; D and E are expand_k and
         expand_v times the head width, C = 64 tokens of a chunk
Exact    no; with orthonormal keys and beta = 1 it is linear attention without a normaliser
Padding  W x and beta are zero there: the state stays, the convolution reads zeros
Differs  two directions (paper: causal); biases as the place says, zero at first (paper: none); maps W start
         as torch starts them (authors: normal, 0.02, made for a width of 2048: at 64 to 128 the output would
         start at a fifth to a third of this); l1 is eps plus the sum of absolute values (code: the sum, of
         positive features); neg_eigval=True doubles beta (Grazzi et al., arXiv 2411.12537); conv and f in the
         dtype of W x; kernel=fla, or auto on a GPU in half precision, runs the authors' kernels
"""
# b batch, l length, h heads, d head dim (keys), e head dim (values), s sets of parameters

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, register
from models.delta_rule import delta_rule, linear_map, queries_keys_values, rms_norm, short_filters, width_of
from models.directions import both_directions, forward_alone, known_directions, packed_directions
from models.fla_kernels import checked, traits_of
from models.long_row import LongRow
from models.scan import CHUNK, Starts


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1; of parts of a tensor, torch's compiler expects another layout from F.elu than it gets."""
    return F.relu(x) + x.clamp_max(0).exp()


FEATURE_MAPS = {"silu": F.silu, "relu": F.relu, "elu": elu_plus_one, "identity": lambda x: x}
NORMS = ("l2", "l1")


@register("deltanet")
class DeltaNet(Mixer):
    """Projections, short convolutions and norm around `delta_rule`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "tied",
        feature_map: str = "silu",
        qk_norm: str = "l2",
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        kernel_size: int = 4,
        neg_eigval: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__(place, projections=False)
        for given, option, allowed in (
            (feature_map, "feature_map", FEATURE_MAPS),
            (qk_norm, "qk_norm", NORMS),
        ):
            if given not in allowed:
                raise ValueError(
                    f"unknown {option} '{given}' for deltanet; choose from: {', '.join(allowed)}"
                )
        self.directions = known_directions(directions, "deltanet")
        self.kernel = checked(kernel, "deltanet")
        self.traits = traits_of(self.traits, kernel)
        self.feature_map, self.qk_norm = feature_map, qk_norm
        self.largest_beta = 2.0 if neg_eigval else 1.0
        self.d = width_of(place, "deltanet", expand_k=expand_k)
        self.e = width_of(place, "deltanet", expand_v=expand_v)
        heads, sets = place.num_heads, 2 if directions == "untied" else 1
        keys, values = heads * self.d, heads * self.e
        self.project = linear_map(place, place.d_model, 2 * keys + values)
        self.rates = linear_map(place, place.d_model, sets * heads)
        self.out = linear_map(place, values, place.d_model)
        self.conv = short_filters("deltanet", sets, 2 * keys + values, kernel_size)  # [s 2hd+he w]
        self.norm = nn.Parameter(torch.ones(sets, self.e))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        there, back = self.streams(x)
        if self.directions == "forward":
            mixed = forward_alone(self._recurrence, there, mask)
        else:
            there, back = both_directions(self._recurrence, there, mask, back_streams=back)
            mixed = there + back
        return self.out(mixed.flatten(2).to(x.dtype))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        there, back = self.streams(x)
        row = LongRow.of(cu_seqlens, x.shape[0], max_len, chunk=CHUNK, gap=self.conv.shape[-1] - 1)
        mixed = packed_directions(self._recurrence, there, row, directions=self.directions, back_streams=back)
        return self.out(mixed.flatten(1).to(x.dtype))

    def streams(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x: [... d_model] -> u [... 2hd+he], beta [... h], and the same for the way back."""
        u = self.project(x)
        rates = self.rates(x).unflatten(-1, (-1, self.place.num_heads))
        beta = self.largest_beta * rates.sigmoid()  # [... s h]
        return (u, beta[..., 0, :]), (u, beta[..., -1, :])

    def _recurrence(self, u: Tensor, beta: Tensor, starts: Starts | None = None) -> Tensor:
        """rms(o): rows [s*b l ...], those of each set of parameters together -> [s*b l h e]."""
        u = u.unflatten(0, (len(self.conv), -1))  # [s b l 2hd+he]
        options = {"feature_map": FEATURE_MAPS[self.feature_map], "norm": self.qk_norm}
        q, k, v = queries_keys_values(
            u, self.conv[:, None], width=self.d, num_heads=self.place.num_heads, **options
        )
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        o = delta_rule(q, k, v, beta, scale=self.d**-0.5, kernel=self.kernel, starts=starts)
        o = o.unflatten(0, (len(self.conv), -1))
        return rms_norm(o, self.norm[:, None, None, None]).flatten(0, 1)

    def state_size(self, length: int) -> int:
        return (1 if self.directions == "forward" else 2) * self.place.num_heads * self.d * self.e
