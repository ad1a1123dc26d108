"""YOSO: attention by the probability that two hashes collide, exactly or sampled with hash tables.

Paper    Zeng et al. 2021, arXiv 2111.09714, sections 3.1 (collisions) and 3.2 (gradient)
Computes out_i = y_i / |y_i|,  y_i = sum_j p(q_i, k_j) v_j  (+ conv(V)_i)   with
         expectation  p = (1 - arccos(q . k / |q| |k|) / pi)^bits, the chance that all bits of a hash agree
         sampled      p = share of num_hashes random hashes of so many bits that agree; its mean is the above
Cost     expectation: time O(L^2 D), memory O(L^2). sampled: time O(H L D) forward and O(H L D^2) backward,
         memory O(L (D + H) + 2^bits D); H = num_hashes
Exact    no: another kernel than softmax; sampled, its error against the expectation falls as H^(-1/2)
Padding  padded values are zero, so padded keys add nothing; a row without real keys gives zeros
Differs  the expectation is the default. Gradients are the paper's: in place of dp / d(q . k) its lower bound
         bits / 2 * p, which the sample estimates by its own collisions; exact_gradient=True, for the
         expectation, is the derivative itself, held where vectors are within 1e-3 of parallel (there it has
         none). Hashes are alike for all rows and fixed in evaluation (released code: drawn in every call);
         y is divided by its largest number before |y| is taken, so that none is too short for it
"""
# b batch, h heads, l length, d head dim (keys), e head dim (values), m hashes

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Place, Traits, at_least_fp32, full_precision, register
from models.selection import HashingMixer, add_rows, check_hashing, take_rows

LEAST_SINE = 1e-3  # of the angle, in the derivative of arccos
MOST_BITS = 16
ROOM = 1e4  # between the shortest row that can be told from zero and the least number, for its gradient
PRODUCTS = 256  # numbers a token holds at a time in the sampled gradient


class _Collision(torch.autograd.Function):
    """(1 - arccos(x) / pi)^bits of cosines x, with its derivative or the bound bits / 2 times itself."""

    @staticmethod
    def forward(ctx, x, bits, exact):
        agree = x.clamp(-1, 1).acos_().div_(-math.pi).add_(1)  # the chance that one bit does
        ctx.save_for_backward(agree)
        ctx.bits, ctx.exact = bits, exact
        return agree**bits

    @staticmethod
    def backward(ctx, grad):
        (agree,) = ctx.saved_tensors
        if not ctx.exact:
            return (agree**ctx.bits).mul_(ctx.bits / 2).mul_(grad), None, None
        slope = (agree ** (ctx.bits - 1)).mul_(ctx.bits / math.pi)
        sine = (agree * math.pi).sin_().clamp_min_(LEAST_SINE)  # of the angle
        return slope.div_(sine).mul_(grad), None, None


class _Sample(torch.autograd.Function):
    """sum_j p(q_i, k_j) v_j with sampled p; by q and k the derivative of p is taken as bits / 2 times p.

    q, k: [b h l d] of length one, v: [b h l e], at least float32, codes of q and k: [m b h l] -> [b h l e].
    """

    @staticmethod
    def forward(ctx, q, k, v, q_code, k_code, bits):
        ctx.save_for_backward(q, k, v, q_code, k_code)
        ctx.bits = bits
        return collect(v, k_code, q_code, bits)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, q_code, k_code = ctx.saved_tensors
        q_grad = ctx.bits / 2 * weighted(grad, v, k, k_code, q_code, ctx.bits)
        k_grad = ctx.bits / 2 * weighted(v, grad, q, q_code, k_code, ctx.bits)
        return q_grad, k_grad, collect(grad, q_code, k_code, ctx.bits), None, None, None


def collect(x: Tensor, source: Tensor, target: Tensor, bits: int) -> Tensor:
    """sum_j p_ij x_j, p_ij the share of hashes with source_j = target_i. x: [b h l e], codes: [m b h l]."""
    out = torch.zeros_like(x)
    for one_source, one_target in zip(source, target, strict=True):
        table = add_rows(x, one_source.long(), 2**bits)  # [b h 2^bits e]
        out = out + take_rows(table, one_target.long())
    return out / source.shape[0]


def weighted(a: Tensor, b: Tensor, x: Tensor, source: Tensor, target: Tensor, bits: int) -> Tensor:
    """sum_j p_ij (a_i . b_j) x_j without the pairs: a, b: [b h l e], x: [b h l d] -> [b h l d]."""
    out, step = torch.zeros_like(x), max(1, PRODUCTS // x.shape[-1])
    for a_part, b_part in zip(a.split(step, dim=-1), b.split(step, dim=-1), strict=True):
        products = (b_part.unsqueeze(-1) * x.unsqueeze(-2)).flatten(3)
        met = collect(products, source, target, bits).unflatten(3, (-1, x.shape[-1]))
        out = out + torch.einsum("bhle,bhled->bhld", a_part, met)
    return out


@torch.no_grad()
def hash_codes(x: Tensor, planes: Tensor, bits: int) -> Tensor:
    """x [b h l d], planes [h d m*bits] -> [m b h l] int32: the signs of `bits` planes as one number."""
    with full_precision(x):
        sign = (torch.einsum("bhld,hdn->bhln", x, planes.to(x.dtype)) > 0).unflatten(-1, (-1, bits))
        value = 2 ** torch.arange(bits, device=x.device)
        return (sign.to(x.dtype) @ value.to(x.dtype)).int().permute(3, 0, 1, 2).contiguous()


def yoso_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    bits: int,
    planes: Tensor | None = None,
    exact_gradient: bool = False,
    conv_weight: Tensor | None = None,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real -> [b h l e].

    planes: [h d m*bits] for the sampled form, None for the expectation. conv_weight: [h 1 kernel 1] or None.
    """
    dtype = v.dtype
    q, k = (F.normalize(x, dim=-1) for x in at_least_fp32(q, k))
    if mask is not None:
        v = v * mask[:, None, :, None]
    if planes is None:
        with full_precision(q):
            cosines = q @ k.mT
        mixed = _Collision.apply(cosines, bits, exact_gradient).to(dtype) @ v
    else:
        q_code, k_code = (hash_codes(x, planes, bits) for x in (q, k))
        mixed = _Sample.apply(q, k, v.to(q.dtype), q_code, k_code, bits)
    mixed = unit_rows(mixed.to(q.dtype))
    if conv_weight is not None:
        padding = (conv_weight.shape[-2] // 2, 0)
        mixed = mixed + F.conv2d(v, conv_weight.to(dtype), padding=padding, groups=conv_weight.shape[0])
    return mixed.to(dtype)


def unit_rows(y: Tensor) -> Tensor:
    """y / |y| over the last axis, zeros for zeros."""
    size = y.detach().abs().amax(dim=-1, keepdim=True)
    y = y / torch.where(size > ROOM * torch.finfo(y.dtype).tiny, size, 1.0)
    return F.normalize(y, dim=-1)


@register("yoso")
class Yoso(HashingMixer):
    """Projections, hash planes and, unless `kernel_size` is 0, a convolution around `yoso_attention`."""

    traits = (
        Traits()
        .but("the expectation is over all pairs; expectation=False samples it", quadratic_memory=True)
        .but(
            "the gradient by queries and keys is the paper's bound on the derivative", surrogate_gradient=True
        )
    )

    def __init__(
        self,
        place: Place,
        *,
        expectation: bool = True,
        bits: int = 11,
        num_hashes: int = 32,
        exact_gradient: bool = False,
        kernel_size: int = 0,
        hash_seed: int = 0,
        redraw_every: int = 1,
    ) -> None:
        super().__init__(place)
        odd_or_none = kernel_size == 0 or (kernel_size > 0 and kernel_size % 2 == 1)
        if not 1 <= bits <= MOST_BITS or num_hashes < 1 or not odd_or_none:
            raise ValueError(
                f"yoso needs bits from 1 to {MOST_BITS}, num_hashes >= 1, kernel_size odd or 0 (none); got "
                f"bits={bits}, num_hashes={num_hashes}, kernel_size={kernel_size}"
            )
        check_hashing("yoso", hash_seed, redraw_every)
        if expectation and (num_hashes, hash_seed, redraw_every) != (32, 0, 1):
            raise ValueError(
                "yoso with expectation=True draws no hashes; leave num_hashes=32, hash_seed=0, "
                f"redraw_every=1 or set expectation=False; got {num_hashes}, {hash_seed}, {redraw_every}"
            )
        if exact_gradient and not expectation:
            raise ValueError(
                "yoso with expectation=False is flat almost everywhere and always has the paper's gradient; "
                "leave exact_gradient=False"
            )
        self.bits, self.expectation, self.exact_gradient = bits, expectation, exact_gradient
        shape = (place.num_heads, place.head_dim, num_hashes * bits)
        if not expectation:
            self.draw_directions(*shape, seed=hash_seed, redraw_every=redraw_every)
            self.traits = self.traits.but("", quadratic_memory=False)
        if exact_gradient:
            self.traits = self.traits.but("", surrogate_gradient=False)
        self.conv_weight = None
        if kernel_size:
            self.conv_weight = nn.Parameter(torch.empty(place.num_heads, 1, kernel_size, 1))
            bound = kernel_size**-0.5  # the start that torch gives a Conv2d of this shape
            nn.init.uniform_(self.conv_weight, -bound, bound)
            self.traits = self.traits.but("", uses_order=True)

    def training_update(self, step: int) -> None:
        if not self.expectation:
            super().training_update(step)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        planes = None if self.expectation else self.directions
        options = {"exact_gradient": self.exact_gradient, "conv_weight": self.conv_weight}
        return yoso_attention(q, k, v, mask, bits=self.bits, planes=planes, **options)

    def state_size(self, length: int) -> int:
        rows = length if self.expectation else self.shape[-1] // self.bits * 2**self.bits
        return rows * self.place.num_heads * self.place.head_dim * (2 if self.expectation else 1)
