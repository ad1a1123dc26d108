"""Triton kernels of fla-core for the recurrences of models/scan.py, where a GPU can run them.

The choice is the mechanism's own parameter `kernel`: torch takes what is written here in torch; fla takes
these kernels and raises where they cannot run; auto takes them for half precision on a CUDA device (autocast
included), if fla-core imports there and torch is not compiling. They are an optional dependency, and they
compute in half precision what the torch forms compute in float32.
"""

import functools
import importlib
import logging
from importlib.util import find_spec

import torch
from torch import Tensor

# b batch, l length, h heads, d, e head dims (keys, values)

KERNELS = ("auto", "torch", "fla")
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # keys of a head: fla's delta rules hold a state of no more rows
OPERATIONS = {
    "chunk_gla": "fla.ops.gla",
    "chunk_simple_gla": "fla.ops.simple_gla",
    "chunk_delta_rule": "fla.ops.delta_rule",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
}

log = logging.getLogger(__name__)


def checked(kernel: str, name: str) -> str:
    """`kernel` as it is; ValueError for mechanism `name` if there is none of that name."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel '{kernel}' for {name}; choose from: {', '.join(KERNELS)}")
    return kernel


def chosen(kernel: str, *tensors: Tensor, one_decay: bool = False) -> bool:
    """True if a recurrence over these (queries first) is fla's to compute; `one_decay` if it has one decay
    for all dimensions of a head that differs from token to token.

    kernel=fla raises RuntimeError where fla-core cannot run at all and ValueError for tensors it cannot take.
    """
    checked(kernel, "a recurrence")
    if kernel == "torch":
        return False
    if torch.compiler.is_compiling():  # the kernels are opaque to the compiler
        if kernel == "fla":
            raise RuntimeError("kernel=fla cannot be compiled by torch; use kernel=auto, or do not compile")
        return False
    device = tensors[0].device
    missing, unfit = unavailable(device), unsuited(*tensors)
    if one_decay and not missing:
        missing = without_gradients(device)
    if kernel == "fla":
        if missing:
            raise RuntimeError(f"kernel=fla cannot run: {missing}; use kernel=auto or kernel=torch")
        if unfit:
            raise ValueError(f"kernel=fla cannot run: {unfit}; use kernel=auto or kernel=torch")
        return True
    reason = missing or unfit
    _tell(device, f"torch, because {reason}" if reason else "the kernels of fla-core")
    return not reason


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


def unsuited(*tensors: Tensor) -> str:
    """Why fla's kernels cannot take these tensors, empty if they can."""
    dtypes = [torch.float64 for x in tensors if x.dtype == torch.float64] or [precision(tensors[0])]
    if dtypes[0] not in HALF:
        given = str(dtypes[0]).removeprefix("torch.")
        return f"it needs bfloat16 or float16, or autocast to one, and got {given}"
    if tensors[0].shape[-1] > WIDEST:
        return f"it needs heads of at most {WIDEST} key dimensions, and got {tensors[0].shape[-1]}"
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
def _tell(device: torch.device, what: str) -> None:
    log.info("recurrences on %s: %s", device, what)


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
