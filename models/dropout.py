"""Dropout of tokens, whose random bits compiled code on a GPU draws by a hash of few operations.

torch's dropout draws by Philox: in compiled code ten rounds an element, of whose four numbers one is used,
so that time goes to arithmetic where it should go to memory. The hash here is three multiplications of a
position and a key that is drawn once a call. The compiler fuses it with what surrounds it, and the backward
pass computes masks again instead of reading them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multipliers of triple32 (C. Wellons, github.com/skeeto/hash-prospector), as signed 32-bit numbers.
FIRST, SECOND, THIRD = 0xED5AD4BB - 2**32, 0xAC4C1B51 - 2**32, 0x31848BAB
SPREAD = 0x9E3779B1 - 2**32  # of the bits of a key: the golden ratio of 2^32


class Dropout(nn.Dropout):
    """nn.Dropout that draws its random bits as `dropout` does; it has no state."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element is zero with probability p, else x / (1 - p); torch's except in compiled code on a GPU."""
    if torch.compiler.is_compiling() and x.is_cuda and 0 < p < 1 and x.numel() < 2**31:
        return hashed_dropout(x, p)  # without a compiler it would be a dozen kernels
    return F.dropout(x, p)


def hashed_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout by `kept`, with a new key; 0 < p < 1, fewer than 2^31 elements."""
    return Hashed.apply(x, new_key(x.device), p)


class Hashed(torch.autograd.Function):
    """Dropout of x by a key.

    The gradient numbers elements from 1, to the same masks: the compiler takes equal numbering for one
    tensor, which it will not compute in two places far apart, and keeps masks in memory instead.
    """

    @staticmethod
    def forward(ctx, x: Tensor, key: Tensor, p: float) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(key)
        return torch.where(kept(key, x.shape, p), x * (1 / (1 - p)), 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (key,) = ctx.saved_tensors
        return torch.where(kept(key, grad.shape, ctx.p, first=1), grad * (1 / (1 - ctx.p)), 0), None, None


def new_key(device: torch.device) -> Tensor:
    """[2] int32 from torch's generator of the device.

    Drawn by `rand`, which the compiler neither merges with another draw nor inlines: of `randint` it does the
    latter, and each element would draw the key again.
    """
    return (torch.rand(2, device=device, dtype=torch.float32) * 2**24).to(torch.int32) * SPREAD


def kept(key: Tensor, shape: torch.Size, p: float, *, first: int = 0) -> Tensor:
    """Bool of a shape, True with probability 1 - p rounded to 2^-32: a hash of key [2] int32 and position.

    All in int32, which wraps; shifts of it are arithmetic, hence the masks. What triple32 does last changes
    lower bits only. `first` is the number that the first element has while numbers are drawn up; the result
    does not depend on it. Elements 1 to 16 and 2^5 to 2^18 apart (powers of two) have correlations below 3e-4
    for p of 0.1 and 0.5 over 30 keys of 2^21 elements, 2.3 of their standard errors.
    """
    numbers = torch.arange(first, first + math.prod(shape), device=key.device, dtype=torch.int32)
    state = (numbers - first).view(shape) ^ key[0]
    state = (state ^ (state >> 17 & 0x7FFF)) * FIRST + key[1]
    state = (state ^ (state >> 11 & 0x1FFFFF)) * SECOND
    state = (state ^ (state >> 15 & 0x1FFFF)) * THIRD
    return state >= threshold(p)


def threshold(p: float) -> int:
    """The signed 32-bit number that a share p of all such numbers is below."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31
