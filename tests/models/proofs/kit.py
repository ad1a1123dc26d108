"""What a proof is written with: the parts that formulas share, limits, oracles.

Nothing here, and nothing in a reference, comes from `models`. Padding is not masked but left out: the real
tokens of a row are picked first, so that a reference is defined at real positions alone.
"""

import cmath
import importlib.util
import logging
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

# x [l width] one row, real: its list of real positions, q, k, v [l d] of one head

NORM_EPS = 1e-5
SINGLE = 1e-5  # tolerance for an oracle that computes in float32
PACKAGES = (
    "transformers",
    "performer-pytorch",
    "linformer",
    "nystrom-attention",
    "local-attention",
    "reformer-pytorch",
    "routing-transformer",
    "sinkhorn-transformer",
    "FLASH-pytorch",
    "fla-core",
    "scipy",
)


@dataclass(frozen=True)
class Limit:
    """A case in which the mechanism equals softmax or the dense kernel.

    `measure` gives the relative error.
    """

    claim: str
    measure: Callable[[], float]
    tolerance: float = 1e-9  # float64 rounding


@dataclass(frozen=True)
class Oracle:
    """An independent public implementation; `measure` gives the relative error.

    `source` is the package with its version, `claim` what was compared and how weights came over. Those of
    PACKAGES that the source names must be installed, and those in `packages`.
    """

    source: str
    claim: str
    measure: Callable[[], float]
    tolerance: float = 1e-9
    packages: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Distributions without which it cannot be measured."""
        return tuple(dict.fromkeys([*(n for n in PACKAGES if n in self.source), *self.packages]))


def distance(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest expected value; infinite if shapes differ or a NaN is there."""
    if expected.shape != found.shape or not (expected.isfinite().all() and found.isfinite().all()):
        return math.inf
    expected, found = expected.detach().double(), found.detach().double()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, decided by `seed`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with an explicit score matrix. q, k, v: [b h l d], mask: [b l] bool -> [b h l d]."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ v


def rows(x, mask):
    """(index, row [l width], real positions) of a batch."""
    for b in range(x.shape[0]):
        real = range(x.shape[1]) if mask is None else [i for i in range(x.shape[1]) if mask[b, i]]
        yield b, x[b], list(real)


def affine(linear, x):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def silu(x):
    return x / (1 + torch.exp(-x))


def rotated(x, base):
    """Pair i of position p, read as a complex number, times exp(1j p base^(-2i/d)) (2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    turns = [
        [cmath.exp(1j * p * base ** (-2 * i / x.shape[-1])) for i in range(half)] for p in range(x.shape[0])
    ]
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def heads(module, x):
    """q, k, v of one row for each head; the projection holds all queries, then all keys, then all values."""
    d, all_heads = module.place.head_dim, affine(module.qkv, x)
    for head in range(module.place.num_heads):
        q, k, v = (
            all_heads[:, (part * module.place.num_heads + head) * d :][:, :d] for part in range(3)
        )  # [l d] each
        if module.place.rotary_base is not None:
            q, k = rotated(q, module.place.rotary_base), rotated(k, module.place.rotary_base)
        yield head, q, k, v


def normalised(scores):
    """exp(scores) over its row sums."""
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return weights / weights.sum(dim=-1, keepdim=True)


def attention(q, k, v):
    return normalised(q @ k.T / math.sqrt(q.shape[-1])) @ v


def by_head(one_head):
    """A reference from `one_head(module, head, q, k, v, real) -> [l d]`, defined at real positions."""

    def reference(module, x, mask=None):
        out = torch.zeros_like(x)
        for b, row, real in rows(x, mask):
            mixed = [one_head(module, head, q, k, v, real) for head, q, k, v in heads(module, row)]
            if real:
                out[b, real] = affine(module.out, torch.cat(mixed, dim=-1)[real])
        return out

    return reference


def normed(norm, x):
    """Layer norm, root-mean-square norm with one scale, or none."""
    if hasattr(norm, "bias"):
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + NORM_EPS)
        return centred / spread * norm.weight + norm.bias
    if hasattr(norm, "scale"):
        return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + NORM_EPS) * norm.scale
    return x


def file_of(package, path, *, without=()):
    """One file of an installed package as a module of its own; ImportError if it is not there.

    The package itself is not imported: one that needs a GPU compiler at import often has plain files too.
    Modules in `without` are stood in for; whatever is taken from them is a decorator that changes nothing.
    """
    found = importlib.util.find_spec(package)
    file = Path(found.submodule_search_locations[0], path) if found else None
    if file is None or not file.is_file():
        raise ImportError(f"no {path} in an installed package {package}")
    stands_in = {name: ModuleType(name) for name in without}
    for module in stands_in.values():
        module.__getattr__ = lambda name: lambda function: function
    spec = importlib.util.spec_from_file_location(f"lone_{package}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stands_in):
        spec.loader.exec_module(module)
    return module


def with_drawn_weights(package_layer):
    """A package's layer in float64, its parameters small normal numbers instead of what it starts from."""
    layer = package_layer.double().eval()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=seed))
    return layer


@contextmanager
def quiet(package: str = "transformers"):
    """Inside, transformers logs errors alone: that it computes without its GPU kernels is what is wanted."""
    importlib.import_module(f"{package}.utils.logging").get_logger(package)  # sets its level, once
    logger = logging.getLogger(package)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def flex(q: Tensor, k: Tensor, v: Tensor, sees) -> Tensor:
    """torch's FlexAttention, uncompiled, with `sees(b, h, i, j)` of index tensors as its mask: [b h l d]."""
    from torch.nn.attention import flex_attention as package

    sizes = {"B": q.shape[0], "H": q.shape[1], "Q_LEN": q.shape[2], "KV_LEN": k.shape[2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends to compile
        seen = package.create_block_mask(sees, **sizes, device="cpu")
        return package.flex_attention(q, k, v, block_mask=seen)


def attention_where(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """`attention` of query i to the keys where seen[i] is True, zeros for a query that sees none."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.max()) * seen
    sums = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(sums == 0, 1.0, sums) @ v
