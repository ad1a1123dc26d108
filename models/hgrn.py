"""HGRN: an elementwise recurrence whose forget gates have a floor that rises from layer to layer.

Paper    Qin et al. 2023, arXiv 2311.04823, section 3
Computes h_i = l_i exp(1j t) h_{i-1} + (1 - l_i) c_i,   l_i = f + (1 - f) sigmoid(x_i W_l + b),
         c = silu(x W_c) with a real and an imaginary part, t learned; f is 0 in the first layer, and in layer
         k > 0 the sum of the first k rows of a softmax over layers, of one matrix that all layers share
         (lower_bound=False: 0 everywhere); out = (layer norm of [Re h, Im h] * silu(x W_g)) W_o
         real     recurrence=real has no t and no imaginary part
         tied     h of the sequence and of the reversed sequence are added: the token itself counts twice
         theta    the same with a t of its own for the way back
         untied   the same with t, W_l, W_c of its own for the way back
         forward  the causal original
Cost     time O(L D log L) in log2(L) steps, memory O(L D)
Exact    no
Padding  padded tokens have c = 0, l = 1, t = 0: they leave the state as it was
Differs  norm and gate are those of the released code (paper: layer norm of sigmoid(x W_g) * h); the released
         runs on LRA are directions=theta
"""
# b batch, l length, t packed rows, w width of the state (complex or real)

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, register
from models.directions import DIRECTIONS, both_directions, forward_alone, packed_directions
from models.long_row import LongRow
from models.scan import Starts, scan
from models.ssm import tagged

EPS = 1e-5
BASE = 10_000.0  # of the rotations at the start
RECURRENCES = ("complex", "real")
WAYS = (*DIRECTIONS, "theta")


def hgru(
    log_decay: Tensor,
    update: Tensor,
    mask: Tensor | None = None,
    *,
    directions: str = "tied",
    back: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """h of the module docstring: log_decay, update [b l w], complex or real, mask [b l] bool, True = real
    -> [b l w]; `back`: both for the way back, if they are others.
    """

    def recurrence(log_decay: Tensor, update: Tensor) -> Tensor:
        return scan(log_decay.exp(), update)

    if directions == "forward":
        return forward_alone(recurrence, (log_decay, update), mask)
    there, returned = both_directions(recurrence, (log_decay, update), mask, back_streams=back)
    return there + returned


def hgru_packed(
    log_decay: Tensor,
    update: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    directions: str = "tied",
    back: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`hgru` within each packed sequence: log_decay, update [t w] -> [t w]."""

    def recurrence(log_decay: Tensor, update: Tensor, starts: Starts) -> Tensor:
        decay = log_decay.exp().masked_fill(starts.mask(update, 1), 0)
        return scan(decay, update, reach=starts.reach)

    row = LongRow.of(cu_seqlens, update.shape[0], max_len)
    return packed_directions(recurrence, (log_decay, update), row, directions=directions, back_streams=back)


def floor_of_layer(logits: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """log f and log(1 - f) of layer > 0: logits [layers w] -> [w] each."""
    shares = logits.log_softmax(dim=0)
    return shares[:layer].logsumexp(dim=0), shares[layer:].logsumexp(dim=0)


def gates(logit: Tensor, floor: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """log l and 1 - l from x W_l + b [... w] and the floor of its layer, None for zero."""
    if floor is None:
        return F.logsigmoid(logit), (-logit).sigmoid()
    log_floor, log_rest = floor
    share = log_rest.exp() * (-logit).sigmoid()
    near_one = torch.log1p(-share.clamp_max(0.5))  # there the sum of logs would lose the digits of 1 - l
    log_decay = torch.logaddexp(log_floor, log_rest + F.logsigmoid(logit))
    return torch.where(share < 0.5, near_one, log_decay), share


def normed(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class Streams(nn.Module):
    """What one direction of the recurrence is made of: x [... d_model] -> log decay, update [... w]."""

    def __init__(self, place: Place, width: int, parts: int) -> None:
        super().__init__()
        self.width, self.parts = width, parts
        self.input = nn.Linear(place.d_model, parts * width, bias=place.bias)
        self.decay = nn.Linear(place.d_model, width, bias=place.bias)
        if parts == 2:
            self.theta = first_angles(width)

    def forward(self, x: Tensor, floor: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        content, logit = at_least_fp32(self.input(x), self.decay(x))
        log_decay, share = gates(logit, floor)
        content = F.silu(content).unflatten(-1, (self.parts, self.width)) * share.unsqueeze(-2)
        if self.parts == 1:
            return log_decay, content.squeeze(-2)
        return turned(log_decay, self.theta), torch.complex(content[..., 0, :], content[..., 1, :])


def first_angles(width: int) -> nn.Parameter:
    """10000^(-2 i / w), i = 0 ... w - 1."""
    return tagged(nn.Parameter(BASE ** (-2 * torch.arange(width) / width)))


def turned(log_decay: Tensor, theta: Tensor) -> Tensor:
    """log l + 1j t."""
    return torch.complex(log_decay, theta.to(log_decay.dtype).expand_as(log_decay))


@register("hgrn")
class HGRN(Mixer):
    """Projections, gates, norm and output gate around `hgru`."""

    traits = Traits(uses_order=True, packed=True)

    def __init__(
        self,
        place: Place,
        *,
        directions: str = "tied",
        recurrence: str = "complex",
        lower_bound: bool = True,
    ) -> None:
        super().__init__(place, projections=False)
        for given, name, allowed in (
            (directions, "directions", WAYS),
            (recurrence, "recurrence", RECURRENCES),
        ):
            if given not in allowed:
                raise ValueError(f"unknown {name} '{given}' for hgrn; choose from: {', '.join(allowed)}")
        if directions == "theta" and recurrence == "real":
            raise ValueError("hgrn has no theta with recurrence=real; choose directions=tied or untied")
        if lower_bound and not 0 <= place.layer_index < place.num_layers:
            raise ValueError(
                f"hgrn shares its lower bounds among num_layers={place.num_layers} layers; "
                f"got layer_index={place.layer_index}"
            )
        self.directions = directions
        width, parts = place.num_heads * place.head_dim, 2 if recurrence == "complex" else 1
        self.there = Streams(place, width, parts)
        self.back = Streams(place, width, parts) if directions == "untied" else None
        self.theta_back = first_angles(width) if directions == "theta" else None
        self.floors = None  # the first layer's is zero, whatever the matrix
        if lower_bound and place.layer_index:
            if "hgrn" not in place.shared:
                place.shared["hgrn"] = tagged(nn.Parameter(torch.zeros(place.num_layers, width)))
            self.floors = place.shared["hgrn"]
        inner = parts * width
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.norm_bias = nn.Parameter(torch.zeros(inner))
        self.gate = nn.Linear(place.d_model, inner, bias=place.bias)
        self.out = nn.Linear(inner, place.d_model, bias=place.bias)
        self.state = inner * (1 if directions == "forward" else 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mixed(hgru, x, mask)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self.mixed(hgru_packed, x, cu_seqlens, max_len)

    def mixed(self, mix: Callable[..., Tensor], x: Tensor, *where: Tensor | int | None) -> Tensor:
        """x: [... d_model], where: what `mix` knows the sequences by -> [... d_model]."""
        floor = None
        if self.floors is not None:
            floor = floor_of_layer(*at_least_fp32(self.floors), self.place.layer_index)
        log_decay, update = self.there(x, floor)
        back = None
        if self.back is not None:
            back = self.back(x, floor)
        elif self.theta_back is not None:
            back = turned(log_decay.real, self.theta_back), update
        state = mix(log_decay, update, *where, directions=self.directions, back=back)
        if state.is_complex():
            state = torch.cat([state.real, state.imag], dim=-1)
        state = normed(state.to(x.dtype), self.norm_weight, self.norm_bias, eps=EPS)
        return self.out(state * F.silu(self.gate(x)))

    def state_size(self, length: int) -> int:
        return self.state
