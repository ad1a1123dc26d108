"""Taylor attention: the exponential of softmax cut after a few terms, and then linear attention.

Paper    Duman Keles et al. 2023, arXiv 2209.04881, section 5 (finite Taylor series)
Computes out_i = sum_j p(s_ij) v_j / sum_j p(s_ij)   with   p(s) = sum_{t <= order} s^t / t!,
         s_ij = q_i . k_j / sqrt(d), summed monomial by monomial: s^t = sum over a of prod_t q_a k_a
Cost     time O(L D C(D + order, order)), memory O(L D): features are made in blocks, again for the gradient
Exact    no; the error falls with the order as that of the series of exp does, fast where scores are small
Padding  padded keys, their constant feature too, leave all sums unchanged
Differs  an odd order has weights of either sign: |sum_j p(s_ij)| below eps counts as eps of its sign;
         d_feature > 0 projects queries and keys of a head to that width first (arXiv 2402.18668)
"""
# b batch, h heads, l length, t packed tokens, n chunks, c places of a chunk, d width of the monomials, e head
# dim (values), f monomials of a block

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, head_products, register
from models.row_products import sum_chunks
from models.sums import chunk_sums, kernel_sums

BLOCK = 256  # monomials made at a time, at most, unless one leading factor has more
ORDERS = (1, 2, 3)


def blocks(width: int, degree: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of the leading factor a: those monomials x_a x_b ... with b, ... >= start are made together."""
    start = 0
    while start < width:
        stop = min(width, start + max(1, limit // (width - start) ** (degree - 1)))
        yield start, stop
        start = stop


def monomials(x: Tensor, start: int, stop: int, degree: int) -> Tensor:
    """All x_a x_b ... of a degree with a in [start, stop) and b, ... >= start: [... d] -> [... f]."""
    out = x[..., start:stop]
    for _ in range(degree - 1):
        out = (out.unsqueeze(-1) * x[..., None, start:]).flatten(-2)
    return out


def coefficients(width: int, start: int, stop: int, degree: int, like: Tensor) -> Tensor:
    """[f]: how often each of `monomials` stands in (x_1 + ... + x_d)^degree / degree!, per place in them.

    A product with m of its factors in [start, stop) has some such factor in the lead in m of degree places.
    """
    inside = torch.zeros(width - start, dtype=like.dtype, device=like.device)
    inside[: stop - start] = 1
    leading = torch.ones(stop - start, dtype=like.dtype, device=like.device)
    for _ in range(degree - 1):
        leading = (leading.unsqueeze(-1) + inside).flatten(-2)
    return degree / leading / math.factorial(degree)


def block_sums(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, stop: int, degree: int, sums: Callable
) -> tuple[Tensor, ...]:
    weight = coefficients(q.shape[-1], start, stop, degree, q)
    return sums(monomials(q, start, stop, degree) * weight, monomials(k, start, stop, degree), v)


def polynomial_sums(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, order: int, sums: Callable, block: int = BLOCK
) -> list[Tensor]:
    """What `sums(features of q, features of k, v)` returns, added up over all monomials of p(q . k).

    real: [... 1], 1 where k is real, 0 where it is padding and zero. Blocks are made again for the gradient.
    """
    ones = torch.ones_like(q[..., :1])
    total = list(sums(torch.cat([ones, q], dim=-1), torch.cat([real, k], dim=-1), v))
    for degree in range(2, order + 1):
        for start, stop in blocks(q.shape[-1], degree, block):
            part = partial(block_sums, start=start, stop=stop, degree=degree, sums=sums)
            added = checkpoint(part, q, k, v, use_reentrant=False, preserve_rng_state=False)
            total = [a + b for a, b in zip(total, added, strict=True)]
    return total


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    order: int = 2,
    eps: float = 1e-6,
    block: int = BLOCK,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real -> [b h l e]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    real = torch.ones_like(k[..., :1])
    if mask is not None:
        k, real = k * mask[:, None, :, None], real * mask[:, None, :, None]
    q = q * q.shape[-1] ** -0.5
    mixed, norm = polynomial_sums(q, k, v, real, order=order, sums=kernel_sums, block=block)
    return (mixed / away_from_zero(norm, eps)).to(dtype)


def taylor_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    order: int = 2,
    eps: float = 1e-6,
    block: int = BLOCK,
) -> Tensor:
    """`taylor_attention` within each packed sequence. q, k: [t h d], v: [t h e] -> [t h e]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the column of ones collects the normaliser
    chunks, batch_size = sum_chunks(cu_seqlens, q.shape[0], max_len), cu_seqlens.shape[0] - 1
    q, k, v = (chunks.lay_out(x) for x in (q * q.shape[-1] ** -0.5, k, v))  # [n c h d]
    sums = partial(sums_of_chunks, chunks=chunks, batch_size=batch_size)
    mixed = polynomial_sums(q, k, v, v[..., -1:], order=order, sums=sums, block=block)[0]
    mixed = chunks.take_back(mixed)
    return (mixed[..., :-1] / away_from_zero(mixed[..., -1:], eps)).to(dtype)


def sums_of_chunks(q: Tensor, k: Tensor, v: Tensor, *, chunks, batch_size: int) -> tuple[Tensor]:
    return (chunk_sums(q, k, v, chunks, batch_size),)


def away_from_zero(norm: Tensor, eps: float) -> Tensor:
    """`norm`, where its size is below eps eps of its sign."""
    return torch.where(norm < 0, norm.clamp_max(-eps), norm.clamp_min(eps))


def narrowed(x: Tensor, projection: Tensor | None) -> Tensor:
    """x [... h l d] by a projection of each head [h d f] -> [... h l f]; x itself without one."""
    if projection is None:
        return x
    with full_precision(x):
        return head_products(*at_least_fp32(x, projection))


def projection(place: Place, width: int) -> nn.Parameter:
    bound = place.head_dim**-0.5  # the start that torch gives a Linear of this shape
    return nn.Parameter(torch.empty(place.num_heads, place.head_dim, width).uniform_(-bound, bound))


@register("taylor")
class Taylor(Mixer):
    """Projections around `taylor_attention`."""

    traits = Traits(packed=True)

    def __init__(self, place: Place, *, order: int = 2, d_feature: int = 0, eps: float = 1e-6) -> None:
        super().__init__(place)
        whole = isinstance(order, int) and isinstance(d_feature, int)
        if not whole or order not in ORDERS or d_feature < 0 or not 0 < eps < math.inf:
            raise ValueError(
                "taylor needs order 1, 2 or 3, d_feature >= 0 (0: the head width), whole, and eps > 0; "
                f"got order={order}, d_feature={d_feature}, eps={eps}"
            )
        self.order, self.d_feature, self.eps = order, d_feature, eps
        self.query_projection = self.key_projection = None
        if d_feature:
            self.query_projection, self.key_projection = (projection(place, d_feature) for _ in range(2))

    @property
    def options(self) -> dict:
        return {"order": self.order, "eps": self.eps}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k = narrowed(q, self.query_projection), narrowed(k, self.key_projection)
        return taylor_attention(q, k, v, mask, **self.options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        q = narrowed(q.transpose(0, 1), self.query_projection).transpose(0, 1)
        k = narrowed(k.transpose(0, 1), self.key_projection).transpose(0, 1)
        return taylor_attention_packed(q, k, v, cu_seqlens, max_len, **self.options)

    def state_size(self, length: int) -> int:
        num_monomials = math.comb((self.d_feature or self.place.head_dim) + self.order, self.order)
        return self.place.num_heads * num_monomials * (self.place.head_dim + 1)
