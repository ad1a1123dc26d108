"""Triton kernels of fla-core for the recurrences of models/scan.py, where a GPU can run them.

The choice is the mechanism's own parameter `kernel`: torch takes what is written here in torch; fla takes
these kernels and raises where they cannot run; auto takes them for half precision on a CUDA device (autocast
included), if fla-core imports there, widths are even and torch neither compiles nor is asked to be
deterministic. They are an optional dependency, and they take their products and, in the forward pass, keep
the states of chunks in half precision, which the torch forms do in float32.
"""

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from models.common import Traits

# b batch, l length, h heads, d, e head dims (keys, values)

KERNELS = ("auto", "torch", "fla")
HALF = (torch.bfloat16, torch.float16)
PACKED = "of packed sequences its kernels read the lengths on the host"
WIDEST = 256  # keys of a head: fla's delta rules hold a state of no more rows
OPERATIONS = {
    "chunk_gla": "fla.ops.gla",
    "chunk_simple_gla": "fla.ops.simple_gla",
    "chunk_delta_rule": "fla.ops.delta_rule",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
}

log = logging.getLogger("lra.models.fla_kernels")  # below `lra`: a run's log collects that

_choices: list[dict[str, str | None]] = [{}]  # as `choices` gives them, the innermost last


def checked(kernel: str, name: str) -> str:
    """`kernel` as it is; ValueError for mechanism `name` if there is none of that name."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel '{kernel}' for {name}; choose from: {', '.join(KERNELS)}")
    return kernel


@contextmanager
def choices() -> Iterator[dict[str, str | None]]:
    """What is chosen inside, anew: what the log says of it -> the package whose kernels run, None for torch.

    What an inner one collects is not the outer one's. The list is the process's: autograd chooses again in
    threads of its own where a forward pass is repeated.
    """
    made: dict[str, str | None] = {}
    _choices.append(made)
    try:
        yield made
    finally:
        _choices[:] = [other for other in _choices if other is not made]


def taken(made: dict[str, str | None]) -> str | None:
    """The package whose kernels ran at least once by these choices, with its version; None if torch alone."""
    return next((package for package in made.values() if package), None)


def chosen(kernel: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor, one_decay: bool = False) -> bool:
    """True if a recurrence over these is fla's to compute, widths last; `one_decay` if all key dimensions of
    a head share a decay that each token sets (not one that is the same for all tokens).

    kernel=fla raises RuntimeError where fla-core cannot run at all and ValueError for tensors it cannot take.
    """
    checked(kernel, "a recurrence")
    if kernel == "torch":
        return False
    if torch.compiler.is_compiling():  # the kernels are opaque to the compiler
        if kernel == "fla":
            raise RuntimeError("kernel=fla cannot be compiled by torch; use kernel=auto, or do not compile")
        return False
    device = q.device
    missing, unfit = unavailable(device), unsuited(q, k, v, *others)
    if not missing and torch.are_deterministic_algorithms_enabled():
        missing = "deterministic algorithms are asked for, and it picks its own by timing them"
    if one_decay and not missing:
        missing = without_gradients(device)
    if kernel == "fla":
        if missing:
            raise RuntimeError(f"kernel=fla cannot run: {missing}; use kernel=auto or kernel=torch")
        if unfit:
            raise ValueError(f"kernel=fla cannot run: {unfit}; use kernel=auto or kernel=torch")
    reason = missing or unfit
    _tell(device, reason)
    return not reason


def not_packed(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Packed sequences are computed in torch; says so if `kernel` would take fla's for padded ones.

    fla's kernels read the lengths on the host, to know how many blocks to start: no step with them can be
    captured, and the device waits.
    """
    if kernel == "torch" or torch.compiler.is_compiling():
        return
    if kernel == "fla":
        raise ValueError(
            f"kernel=fla cannot run: {PACKED}; use kernel=auto or kernel=torch, or layout=padded"
        )
    _tell(q.device, unavailable(q.device) or unsuited(q, k, v) or PACKED)


def traits_of(traits: Traits, kernel: str) -> Traits:
    """The traits of a mechanism with a packed path: with kernel=fla it has none."""
    return traits.but(PACKED, packed=False) if kernel == "fla" else traits


@functools.cache
def unavailable(device: torch.device) -> str:
    """Why fla-core cannot run on a device, empty if it can; asked once per process and device."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and tensors are on '{device.type}'"
    for package, install in (("triton", "triton"), ("fla", "fla-core")):
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{install} is not installed ({error})"
    try:
        for name in OPERATIONS:
            operation(name)
    except Exception as error:  # it looks at drivers and versions as it is imported: whatever it raises
        return f"fla-core does not import ({type(error).__name__}: {error})"
    return ""


@functools.cache
def without_gradients(device: torch.device) -> str:
    """Why fla-core refuses the gradients of one decay a head, empty if it does not: some versions of Triton
    compile them wrongly on Hopper GPUs (fla-org/flash-linear-attention, issue 640), and it raises there.
    """
    fla = importlib.import_module("fla.utils")
    faulty = getattr(fla, "TRITON_ABOVE_3_4_0", False) and not getattr(fla, "TRITON_ABOVE_3_7_1", True)
    if not (getattr(fla, "IS_NVIDIA_HOPPER", False) and faulty) or find_spec("tilelang"):
        return ""
    return "fla-core has no gradients of one decay a head on this GPU with this Triton (it needs 3.7.1)"


def unsuited(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> str:
    """Why fla's kernels cannot take these tensors, empty if they can."""
    double = any(x.dtype == torch.float64 for x in (q, k, v, *others))
    dtype = torch.float64 if double else precision(q)
    if dtype not in HALF:
        given = str(dtype).removeprefix("torch.")
        return f"it needs bfloat16 or float16, or autocast to one, and got {given}"
    keys, values = q.shape[-1], v.shape[-1]
    if keys > WIDEST:
        return f"it needs heads of at most {WIDEST} key dimensions, and got {keys}"
    if keys % 2 or values % 2:
        return f"it needs heads of even widths, and got {keys} for keys and {values} for values"
    return ""


def precision(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: the dtype of autocast, or its own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def operation(name: str):
    """A function of fla-core."""
    return getattr(importlib.import_module(OPERATIONS[name]), name)


@functools.cache
def package() -> str:
    """fla-core and its version."""
    try:
        return f"fla-core {metadata.version('fla-core')}"
    except metadata.PackageNotFoundError:  # there under another name, as its sources
        return "fla-core"


def _tell(device: torch.device, against: str) -> None:
    """Keeps and logs, once for each `choices`, that fla's kernels run, or what is against them."""
    what = f"torch, because {against}" if against else f"the kernels of {package()}"
    said = f"recurrences on {device}: {what}"
    if said not in _choices[-1]:
        _choices[-1][said] = None if against else package()
        log.info(said)


def decayed_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float = 1.0) -> Tensor:
    """`models.scan.decayed_attention` times scale: q, k [b l h d], v [b l h e], log_decay that, or one for
    all d [b l h 1], or one for all d and tokens [h] -> [b l h e] in the dtype of v. Products in half
    precision; log decays and their sums stay float32.
    """
    half = precision(q)
    if log_decay.dim() == 1:
        run, decay = operation("chunk_simple_gla"), {"g_gamma": log_decay.float()}
    elif log_decay.shape[-1] == 1:
        run, decay = operation("chunk_simple_gla"), {"g": log_decay.float().squeeze(-1)}
    else:
        run, decay = operation("chunk_gla"), {"g": log_decay.float()}
    out, _ = run(q=q.to(half), k=k.to(half), v=v.to(half), scale=scale, **decay)
    return out.to(v.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """o_i = scale S_i^T q_i with S_i = exp(g_i) (1 - beta_i k_i k_i^T) S_{i-1} + beta_i k_i v_i^T.

    q, k: [b l h d], v: [b l h e], beta and log_decay g (None: zero): [b l h] or [b l h 1] -> [b l h e] in the
    dtype of v. k as given: norm it before. Products in half precision; log decays and their sums float32.
    """
    half = precision(q)
    q, k, beta = q.to(half), k.to(half), _by_head(beta).to(half)
    if log_decay is None:
        run, more = operation("chunk_delta_rule"), {}
    else:
        run, more = operation("chunk_gated_delta_rule"), {"g": _by_head(log_decay).float()}
    out, _ = run(q=q, k=k, v=v.to(half), beta=beta, scale=scale, **more)
    return out.to(v.dtype)


def _by_head(x: Tensor) -> Tensor:
    """[b l h 1] or [b l h] -> [b l h]."""
    return x.squeeze(-1) if x.dim() == 4 else x
