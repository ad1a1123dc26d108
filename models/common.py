"""What every mechanism stands on: its place in a model, its traits, projections, masks and packed
segments.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.packed import Segments

# b batch, h heads, l length, t packed tokens, d head dim (keys), e head dim (values)


@dataclass(frozen=True)
class Place:
    """Where in a model a mechanism stands; what it may size its parameters by.

    `max_len` is the longest padded length it will ever see, a [CLS] token included. `shared` is one dict per
    model, for parameters that layers share. `d_head` None means d_model // num_heads. `rotary_base` set means
    that q/k/v mechanisms rotate queries and keys by position (Su et al. 2021, arXiv 2104.09864).
    """

    d_model: int
    num_heads: int
    max_len: int
    layer_index: int = 0
    num_layers: int = 1
    shared: dict = field(default_factory=dict, compare=False)
    d_head: int | None = None
    bias: bool = True
    rotary_base: float | None = None

    @property
    def head_dim(self) -> int:
        """Width of one head; ValueError if the heads do not divide the model width."""
        if self.d_head is not None:
            return self.d_head
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} does not split into num_heads={self.num_heads} equal heads; "
                f"choose a divisor of {self.d_model} or set d_head"
            )
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class Traits:
    """What a mechanism claims about itself; the conformance suite checks each claim in both directions.

    content_invariant   what stands at padded positions never reaches a real output
    length_invariant    more padding never changes a real output
    batch_invariant     a row's output does not depend on the rows beside it
    fixed_length        parameters are sized by `max_len`, so weights of one limit do not fit another
    needs_prefix_mask   raises ValueError for a mask that is not a prefix of True
    packed              has a `forward_packed` of its own
    stochastic_eval     two evaluations of one input differ
    uses_grid           reads the sequence as an image of rows and columns
    capturable          its training step can be captured in a CUDA graph
    uses_order          the output depends on the order of the tokens (False: permutation equivariant)
    quadratic_memory    peak memory of a training step grows with the square of the length (False: at most
                        2.3 times when the length doubles, from 4,096 to 16,384)
    surrogate_gradient  gradients are not derivatives of the outputs, but what the paper trains with instead
    because             trait name -> reason, for every answer that is unusual
    """

    content_invariant: bool = True
    length_invariant: bool = True
    batch_invariant: bool = True
    fixed_length: bool = False
    needs_prefix_mask: bool = False
    packed: bool = False
    stochastic_eval: bool = False
    uses_grid: bool = False
    capturable: bool = True
    uses_order: bool = False
    quadratic_memory: bool = False
    surrogate_gradient: bool = False
    because: Mapping[str, str] = field(default_factory=dict)

    def but(self, reason: str, **claims: bool) -> "Traits":
        """These traits with some claims changed, all for one reason: those of an instance with an option
        set.
        """
        return dataclasses.replace(self, because={**self.because, **dict.fromkeys(claims, reason)}, **claims)

    def exceptions(self) -> dict[str, str]:
        """The claims that differ from the usual answer, each with its reason."""
        usual = Traits()
        return {
            f.name: self.because.get(f.name, "")
            for f in dataclasses.fields(self)
            if f.name not in ("because", "packed", "uses_order")
            and getattr(self, f.name) != getattr(usual, f.name)
        }


_REGISTRY: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: makes a mechanism known under `name`, which is also the name of its file and its
    YAML.
    """

    def add(cls: type) -> type:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(
                f"two mechanisms are called '{name}': {_REGISTRY[name]} and {cls}; rename one of them"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def registered() -> dict[str, type]:
    return _REGISTRY


def own_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The keyword arguments a mechanism's constructor takes beyond its place, by name."""
    signature = inspect.signature(cls.__init__).parameters
    return {n: p for n, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def create(cls: type, place: Place, **own) -> "Mixer | Block":
    unknown = sorted(set(own) - set(own_parameters(cls)))
    if unknown:
        allowed = ", ".join(own_parameters(cls)) or "none"
        raise TypeError(f"{cls.__name__} has no parameter {', '.join(map(repr, unknown))}; it has: {allowed}")
    return cls(place, **own)


class Mechanism(nn.Module):
    """The hooks that mixers and blocks share. All are optional but the forward."""

    name: str = ""
    traits = Traits()

    def aux_loss(self) -> Tensor | None:
        """A scalar added to the training loss, of the last forward; None if the mechanism has none."""
        return None

    def training_update(self, step: int) -> None:
        """Called before training step `step` (0, 1, ...); writes buffers in place, never replaces a
        tensor.
        """

    def findings(self) -> dict[str, float] | None:
        """What training has found out about this layer, for the record of the run; None where nothing is
        sought.
        """
        return None

    def state_size(self, length: int) -> int | None:
        """Numbers one layer keeps to mix a sequence of `length` tokens; None where the idea does not
        apply.
        """
        return None


class Mixer(Mechanism):
    """Fills the attention place of the standard block: x [b l d_model], mask [b l] -> [b l d_model].

    A q/k/v mechanism overrides `attend`, and `attend_packed` with the trait `packed`; another overrides
    `forward` (and `forward_packed`) and calls `Mixer.__init__` with `projections=False`.
    """

    def __init__(self, place: Place, *, projections: bool = True) -> None:
        super().__init__()
        self.place = place
        if projections:
            inner = place.num_heads * place.head_dim
            self.qkv = nn.Linear(place.d_model, 3 * inner, bias=place.bias)
            self.out = nn.Linear(inner, place.d_model, bias=place.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v: [b h l d], mask: [b l] bool, True = real, or None -> [b h l d]."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither attend nor forward")

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """q, k, v: [t h d], segments as in `forward_packed` -> [t h d]."""
        raise NotImplementedError(f"{type(self).__name__} claims a packed path but has none")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.place.num_heads, -1))  # [b l 3 h d]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.place.rotary_base is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = (rotate(part, positions, base=self.place.rotary_base) for part in (q, k))
        mixed = self.attend(q, k, v, mask)  # [b h l d]
        return self.merge(mixed.transpose(1, 2).flatten(2), x)

    def merge(self, mixed: Tensor, x: Tensor) -> Tensor:
        """mixed: [... h*d], the heads side by side, x: what `forward` got -> [... d_model]; gates go here."""
        return self.out(mixed)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """x: [t d_model]; sequence i is x[cu_seqlens[i]:cu_seqlens[i + 1]], none longer than max_len -> [t
        d_model].

        Rows past cu_seqlens[-1] are filler: their outputs are finite, reach nothing and mean nothing.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.place.num_heads, -1))  # [t 3 h d]
        q, k, v = qkv.unbind(1)
        if self.place.rotary_base is not None:
            positions = Segments.of(cu_seqlens, x.shape[0]).position
            q, k = (
                rotate(part.transpose(0, 1), positions, base=self.place.rotary_base).transpose(0, 1)
                for part in (q, k)
            )
        return self.merge(self.attend_packed(q, k, v, cu_seqlens, max_len).flatten(1), x)


class Block(Mechanism):
    """A whole layer: x [b l d_model], mask [b l], carry -> (x, carry); normalisation and residuals are its
    own. With the trait `packed` it overrides `forward_packed` too.

    Constructor arguments that have the name of a backbone setting (`d_ff`, `dropout`, `norm`, ...) get its
    value.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def init_carry(self, batch_size: int) -> Tensor | None:
        """What the first layer gets as carry; None for blocks that hand nothing on."""
        return None

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def forward_packed(
        self, x: Tensor, cu_seqlens: Tensor, max_len: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x: [t d_model], its sequences and filler rows as in `Mixer.forward_packed`, carry as in `forward`,
        which has a part for every sequence, those without rows included -> (x [t d_model], carry).
        """
        raise NotImplementedError(f"{type(self).__name__} claims a packed path but has none")


def at_least_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor in float32, or as it is if it is float64 already."""
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Inside, products keep the dtype of their operands: no autocast on the device of `x`."""
    with torch.autocast(x.device.type, enabled=False):
        yield


def head_products(x: Tensor, weight: Tensor) -> Tensor:
    """Each head of x times a matrix of its own: x [... h l d], weight [h d f] -> [... h l f].

    One product a head: of one batched product the weight's gradient, a sum over all rows, would keep no more
    multiprocessors of a GPU busy than there are heads.
    """
    return torch.stack([part @ w for part, w in zip(x.unbind(-3), weight.unbind(0), strict=True)], dim=-3)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis among positions where mask is True; rows with no such position give zeros.

    scores: [... n], mask: bool, broadcastable to scores. Computed in at least float32, returned in that
    dtype.
    """
    (scores,) = at_least_fp32(scores)
    if mask is None:
        return scores.softmax(dim=-1)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) * mask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Explicit softmax attention: the limit that many mechanisms are tested against.

    q, k, v: [b h l d], mask: [b l] bool -> [b h l d]; scale defaults to d ** -0.5 (Vaswani et al. 2017, eq.
    1).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :])
    return torch.einsum("bhij,bhjd->bhid", weights.to(v.dtype), v)


def rotate(x: Tensor, positions: Tensor, *, base: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864, eq. 34): x [... l d] with positions [l] -> [... l d].

    Pairs are (x_i, x_{i + d/2}); d must be even.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(
            f"rotary positions need an even head width, got {x.shape[-1]}; change num_heads or d_head"
        )
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # [l d/2]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
