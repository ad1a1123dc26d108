"""What the conformance suite works on: one mechanism at small size, its inputs, and the result of a check."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import ModuleType

import torch
from torch import Tensor, nn

from lra.schema import BackboneConfig
from models.common import Block, Place, Traits, create, own_parameters

# b batch, l length, d model width

# Lengths at which claims are measured: shorter and longer than common windows, blocks and landmark counts.
SIZES = (7, 100, 520)
# float64 rounding through one layer stays below 1e-11; a leak that could matter is above 1e-7.
EXACT = 1e-9
POISON = 1e4  # what padding and filler rows are given, to see that it reaches nothing
BACKBONE_SETTINGS = {
    "act_dropout": 0.0,
    **{f.name: getattr(BackboneConfig(), f.name) for f in fields(BackboneConfig)},
}


@dataclass(frozen=True)
class Outcome:
    """What one check found; `measured` and `tolerance` are None where the answer is not a number."""

    status: str  # pass | fail | n/a
    detail: str = ""
    measured: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Check:
    """One claim about one mechanism, and whether it holds."""

    name: str
    group: str
    claim: str
    status: str
    detail: str = ""
    measured: float | None = None
    tolerance: float | None = None


def check(group: str, claim: str) -> Callable[[Callable[[Subject], Outcome]], Callable[[Subject], Check]]:
    """Makes a check of a measurement; a mechanism that raises during it has failed it."""

    def wrap(measure: Callable[[Subject], Outcome]) -> Callable[[Subject], Check]:
        @functools.wraps(measure)
        def run(subject: Subject) -> Check:
            with quiet_seed(subject.device):
                try:
                    found = measure(subject)
                except Exception as error:  # whatever it raises is the finding
                    found = failed(f"{type(error).__name__}: {_first_lines(str(error))}")
            return Check(
                measure.__name__, group, claim, found.status, found.detail, found.measured, found.tolerance
            )

        run.is_check = True
        return run

    return wrap


@contextmanager
def quiet_seed(device: str) -> Iterator[None]:
    """Inside, random numbers start from a fixed seed; outside, it is as if none had been drawn."""
    with torch.random.fork_rng([] if device == "cpu" else [device]):
        torch.manual_seed(0)
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, operations without a deterministic algorithm raise, and memory that nobody wrote holds NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on a GPU
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def checks_in(module: ModuleType) -> list[Callable[[Subject], Check]]:
    """The checks that a file defines, in its order."""
    return [value for value in vars(module).values() if getattr(value, "is_check", False) is True]


def _first_lines(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."


def passed(detail: str = "") -> Outcome:
    return Outcome("pass", detail)


def failed(detail: str) -> Outcome:
    return Outcome("fail", detail)


def not_applicable(detail: str) -> Outcome:
    return Outcome("n/a", detail)


def within(measured: float, tolerance: float, detail: str = "") -> Outcome:
    """Passes if the number is from 0 to the tolerance."""
    return Outcome("pass" if 0 <= measured <= tolerance else "fail", detail, measured, tolerance)


def as_claimed(trait: str, claimed: bool, measured: float, detail: str = "") -> Outcome:
    """A claim of invariance must hold, and a claimed exception must be seen: both directions are measured."""
    found = Outcome("pass", f"{trait}={claimed}" + (f"; {detail}" if detail else ""), measured, EXACT)
    if claimed and not measured <= EXACT:
        return replace(
            found, status="fail", detail=f"claims {trait}=True, yet outputs move; {detail}".rstrip("; ")
        )
    if not claimed and not EXACT < measured < float("inf"):
        return replace(found, status="fail", detail=f"claims {trait}=False, yet no input tried shows it")
    return found


@dataclass(frozen=True)
class Subject:
    """A mechanism to check: its class, the arguments given to it, and the size it is built at."""

    name: str
    cls: type
    own: Mapping[str, object] = field(default_factory=dict)
    max_len: int = 1024
    d_model: int = 16
    num_heads: int = 2
    device: str = "cpu"

    @property
    def is_block(self) -> bool:
        return issubclass(self.cls, Block)

    @functools.cached_property
    def traits(self) -> Traits:
        """The claims of an instance: options may change those of the class."""
        with quiet_seed(self.device):
            return self.probe().first.traits

    def repeatable(self) -> AbstractContextManager[None]:
        """Inside, equal calls give equal bits: on a CPU anyway, on a GPU with deterministic algorithms."""
        return nullcontext() if self.device == "cpu" else deterministic()

    def with_own(self, own: Mapping[str, object]) -> Subject:
        """The same mechanism with some arguments changed."""
        return replace(self, own={**self.own, **own})

    def arguments(self) -> dict[str, object]:
        """The given arguments and, as the harness gives them, backbone settings; no dropout, small d_ff."""
        usual = {**BACKBONE_SETTINGS, "d_ff": 2 * self.d_model, **self.own}
        asked_for = own_parameters(self.cls)
        passed_on = {name: value for name, value in usual.items() if name in asked_for}
        without_dropout = {name: 0.0 for name in asked_for if "dropout" in name and name not in self.own}
        return {**self.own, **passed_on, **without_dropout}

    def probe(
        self,
        *,
        max_len: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        stirred: bool = True,
        **place: object,
    ) -> Probe:
        """The mechanism in eval mode, its initial state decided by `seed`.

        `stirred` adds noise to every parameter, so that one initialised to zero hides nothing.
        """
        torch.manual_seed(seed)
        shared: dict = {}
        depth = 2 if self.is_block else 1
        sizes = {
            "d_model": self.d_model,
            "num_heads": self.num_heads,
            "max_len": max_len or self.max_len,
            **place,
        }
        places = [Place(layer_index=i, num_layers=depth, shared=shared, **sizes) for i in range(depth)]
        probe = Probe([create(self.cls, place, **self.arguments()) for place in places])
        if stirred:
            stir(probe, seed)
        return probe.to(self.device, dtype).eval()

    def inputs(
        self, batch_size: int, length: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Standard normal [b l d], the same numbers on every device and in every precision."""
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(batch_size, length, self.d_model, generator=generator, dtype=torch.float64)
        return x.to(self.device, dtype)

    def lengths(self, *wanted: int) -> tuple[int, ...]:
        """The wanted lengths that fit, made square for a mechanism that reads an image."""
        if self.traits.uses_grid:
            wanted = tuple(int(length**0.5) ** 2 for length in wanted)
        return tuple(sorted({min(length, self.max_len) for length in wanted}))

    def prefix(self, real: list[int] | tuple[int, ...], length: int) -> Tensor:
        """Mask [b l] with the first `real[i]` positions of row i True."""
        return torch.arange(length, device=self.device) < torch.tensor(real, device=self.device)[:, None]


class Probe(nn.Module):
    """A mechanism called alike whatever it is: (x, mask) -> x.

    A mixer is one layer. A block is two, so that what the first hands to the second is seen in the output.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def first(self) -> nn.Module:
        return self.layers[0]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not isinstance(self.first, Block):
            return self.first(x, mask)
        carry = self.first.init_carry(x.shape[0])
        for layer in self.layers:
            x, carry = layer(x, mask, carry)
        return x

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """The same over packed rows: x [t d] -> [t d]."""
        if not isinstance(self.first, Block):
            return self.first.forward_packed(x, cu_seqlens, max_len)
        carry = self.first.init_carry(cu_seqlens.shape[0] - 1)
        for layer in self.layers:
            x, carry = layer.forward_packed(x, cu_seqlens, max_len, carry)
        return x


@torch.no_grad()
def stir(module: nn.Module, seed: int) -> None:
    """Adds normal noise of the size of a usual initialisation to every parameter."""
    generator = torch.Generator().manual_seed(2000 + seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.add_((noise * spread).to(parameter))


def change(before: Tensor, after: Tensor, real: Tensor | None = None) -> float:
    """Largest difference at real positions over the largest value there; NaN or infinite where one is."""
    if real is not None:
        before, after = before[real], after[real]
    if before.numel() == 0:
        return 0.0
    before, after = before.detach().double(), after.detach().double()
    difference = (after - before).abs().max()
    return (difference / before.abs().max().clamp_min(1e-300)).item() if difference != 0 else 0.0


def largest(values: list[float]) -> float:
    """The maximum, where one NaN makes the whole NaN."""
    return torch.tensor([0.0, *values], dtype=torch.float64).max().item()


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, persistent or not, by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()
