"""What mechanisms of landmarks and samples share: a Gaussian kernel, an inverse by iteration, choices that a
seed decides.
"""

import math
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from models.row_products import runs_kernels

# b batch, l length, m landmarks, s samples, d head dim, c matrices, k iterations

BITS = 32  # of a random number
KEEP = 2**BITS - 1
OFFSET = 0x9E3779B9  # 0 scrambled is 0, so draws start elsewhere

# An iterate's norm is at most about 3.25 ** (num_iterations / 2), which so many keep well inside float16.
SAFE_ITERATIONS = 8
KERNEL_ROWS = 64  # of a matrix: the kernel's registers hold no more, and torch's larger products are fast


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x_i - y_j|^2 / 2) of x [... n d] and y [... m d] -> [... n m], never above 1."""
    halves = [z.square().sum(dim=-1) / 2 for z in (x, y)]
    exponent = x @ y.mT  # in place from here on: nothing but the result is kept for gradients
    exponent = exponent.sub_(halves[0].unsqueeze(-1)).sub_(halves[1].unsqueeze(-2))
    exponent.detach().clamp_(max=0)  # above 0 by rounding alone, so gradients pass as if it were exact
    return exponent.exp_()


def iterated_inverse(a: Tensor, norm: Tensor, num_iterations: int, *, exact: bool = True) -> Tensor:
    """The Moore-Penrose inverse of a [... m m], approximately, by the iteration of Razavi et al. 2014.

    It starts from A^T / norm; norm: [...], no less than the largest eigenvalue of A A^T. Rows and columns of
    zeros stay zero. Matrices of float32 on a CUDA GPU, up to KERNEL_ROWS wide, go through
    models/kernels/inverse.py, which has no second derivatives; with `exact` False, which is for softmaxes
    and at most SAFE_ITERATIONS, through quick_inverse.py beside it, which changes the inverse by some 1e-3 of
    its norm.
    """
    assert exact or num_iterations <= SAFE_ITERATIONS, num_iterations
    inverse = a.mT / norm[..., None, None]
    if a.dtype == torch.float32 and a.shape[-1] <= KERNEL_ROWS and num_iterations and runs_kernels(a):
        matrices = (x.reshape(-1, *a.shape[-2:]) for x in (a, inverse))
        return _iterated_inverse(*matrices, num_iterations, exact)[0].view(a.shape)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(num_iterations):
        product = a @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse


def _inverse_kernels(exact: bool) -> ModuleType:
    from models.kernels import inverse, quick_inverse

    return inverse if exact else quick_inverse


@torch.library.custom_op("lra::iterated_inverse", mutates_args=())
def _iterated_inverse(a: Tensor, start: Tensor, num_iterations: int, exact: bool) -> tuple[Tensor, Tensor]:
    """a, start: [c m m] -> the inverse, and the iterates before it, kept for gradients: [k-1 c m m], or with
    the start [k c m m] in float16 if not `exact`.
    """
    return _inverse_kernels(exact).forward(a, start, num_iterations)


@_iterated_inverse.register_fake
def _(a, start, num_iterations, exact):
    if exact:
        return a.new_empty(a.shape), a.new_empty(num_iterations - 1, *a.shape)
    return a.new_empty(a.shape), a.new_empty(num_iterations, *a.shape, dtype=torch.float16)


@torch.library.custom_op("lra::iterated_inverse_gradients", mutates_args=())
def _iterated_inverse_gradients(
    grad: Tensor, a: Tensor, start: Tensor, kept: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of a and start. It has none itself: autograd raises at a second derivative."""
    return _inverse_kernels(exact).backward(grad, a, start, kept)


@_iterated_inverse_gradients.register_fake
def _(grad, a, start, kept, exact):
    return a.new_empty(a.shape), a.new_empty(a.shape)


def _keep(ctx, inputs, output):
    a, start, _, ctx.exact = inputs
    ctx.save_for_backward(a, start, output[1])


def _iterated_inverse_backward(ctx, grad, unused):
    return *_iterated_inverse_gradients(grad, *ctx.saved_tensors, ctx.exact), None, None


_iterated_inverse.register_autograd(_iterated_inverse_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lra.iterated_inverse)
def _inverse_flops(a, start, num_iterations, exact, *, out_shape=None) -> int:
    return num_iterations * 4 * 2 * math.prod(a) * a[-1]


@register_flop_formula(torch.ops.lra.iterated_inverse_gradients)
def _inverse_gradient_flops(grad, a, start, kept, exact, *, out_shape=None) -> int:
    """As torch's products are counted: what is computed again is left out."""
    return 2 * _inverse_flops(a, start, kept[0] + exact, exact)


def scrambled(x: Tensor) -> Tensor:
    """A one-to-one map of the integers below 2^32 whose values look random; x: int64, any shape."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & KEEP  # below 2^59: no overflow
    return x ^ (x >> 16)


def random_numbers(counter: Tensor, draw: Tensor, *, seed: int, layer: int) -> Tensor:
    """Integers below 2^32, one for each of counter [...] int64, decided by it, seed, layer and draw alone.

    draw: [] int64; another draw gives fresh numbers. They are the same on every device.
    """
    key = scrambled((draw + OFFSET) & KEEP)
    for part in (seed & KEEP, seed >> BITS & KEEP, layer):
        key = scrambled(key ^ part)
    return scrambled(scrambled(counter & KEEP) ^ key)


class Draw(nn.Module):
    """Random numbers that are fixed in evaluation and fresh in every training step.

    The step is a buffer, written in place, so that a captured step draws afresh; it is not saved, since
    `advance` sets it before each step.
    """

    def __init__(self, seed: int, layer: int) -> None:
        super().__init__()
        self.seed, self.layer = seed, layer
        self.register_buffer("index", torch.zeros((), dtype=torch.int64), persistent=False)

    def advance(self, step: int) -> None:
        self.index.fill_(step + 1)

    def forward(self, counter: Tensor) -> Tensor:
        """`random_numbers` of the current training step; of draw 0 in evaluation, and before any step."""
        index = self.index if self.training else torch.zeros_like(self.index)
        return random_numbers(counter, index, seed=self.seed, layer=self.layer)


def real_positions(numbers: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Positions of real tokens, drawn with replacement by random numbers [... s] -> [b ... s] or [1 ... s].

    mask: [b l] bool or None. Numbers choose among a row's real tokens in order, wherever padding is; a row
    without any gets position 0.
    """
    if mask is None:
        return ((numbers * length) >> BITS)[None]
    count = mask.sum(dim=-1).view(-1, *[1] * numbers.dim())  # [b 1 ...]
    rank = (numbers * count) >> BITS  # [b ... s]
    order = (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices  # [b l], real positions first
    return order.gather(1, rank.flatten(1)).view_as(rank)
