"""What mechanisms of landmarks and samples share: a Gaussian kernel, an inverse by iteration, choices that a
seed decides.
"""

import torch
from torch import Tensor, nn

# b batch, l length, m landmarks, s samples, d head dim

BITS = 32  # of a random number
KEEP = 2**BITS - 1
OFFSET = 0x9E3779B9  # 0 scrambled is 0, so draws start elsewhere


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x_i - y_j|^2 / 2) of x [... n d] and y [... m d] -> [... n m], never above 1."""
    halves = [z.square().sum(dim=-1) / 2 for z in (x, y)]
    exponent = x @ y.mT  # in place from here on: nothing but the result is kept for gradients
    exponent = exponent.sub_(halves[0].unsqueeze(-1)).sub_(halves[1].unsqueeze(-2))
    exponent.detach().clamp_(max=0)  # above 0 by rounding alone, so gradients pass as if it were exact
    return exponent.exp_()


def iterated_inverse(a: Tensor, norm: Tensor, num_iterations: int) -> Tensor:
    """The Moore-Penrose inverse of a [... m m], approximately, by the iteration of Razavi et al. 2014.

    It starts from A^T / norm; norm: [...], no less than the largest eigenvalue of A A^T. Rows and columns of
    zeros stay zero.
    """
    inverse = a.mT / norm[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(num_iterations):
        product = a @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse


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
