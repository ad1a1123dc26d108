"""S4: each channel by a HiPPO state space, diagonal plus low rank, run as one long convolution.

Paper    Gu et al. 2022, arXiv 2111.00396: theorem 3, algorithm 1, appendix C
Computes y_t = sum_(s <= t) K[t - s] u_s + sum_(s > t) K'[s - t - 1] u_s + D u_t,   out = glu(W gelu(y) + b),
         K[j] = C Abar^j Bbar,   A = diag(Lambda) - P P*,   Lambda = -exp(a) + i w,   step = exp(s),
         Abar = (1 - step A / 2)^-1 (1 + step A / 2),   Bbar = (1 - step A / 2)^-1 step B,
         where Lambda, P, B, C stand for themselves and their conjugates. K is the inverse FFT of its
         generating function at the roots of unity, which takes four sums v / (g - Lambda) (Cauchy) and the
         Woodbury identity, with C (1 - Abar^n) in place of C, n the number of roots.
         The token itself counts once, in K. Both directions have the same A, B and step;
         untied   K' has a C of its own, as in the released code
         tied     K'[j] = K[j + 1]: one kernel of the distance
         forward  K' = 0, the causal original
Cost     time O(L log L + N L + N^3 log L) per channel, N = d_state; memory O(L), and O(N L) while the kernel
         is made, which is done again for the gradients
Exact    no, it is no attention; it equals the recurrence x_t = Abar x_(t-1) + Bbar u_t, y_t = C x_t
Padding  inputs at padding are zeros; a hole keeps the distances
Differs  C is trained and C (1 - Abar^n) made of it for every kernel, Abar^n by squaring in float64, so that
         no weight depends on a length (released: C (1 - Abar^L) is trained in its place, for one L); the
         step is the exponential of a parameter (configurations for LRA: softplus, of equal start);
         it learns at the rate of A, P and B unless dt_lr_scale is set (configurations for ListOps, Text and
         Retrieval: at the full rate, dt_lr_scale=1); eigenvectors have the phase that makes B positive; rank
         1; no dropout after the activation: the backbone's is on the branch
"""
# b batch, l length, d channels, n conjugate pairs of states, r directions (1 or 2), f frequencies

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.directions import known_directions
from models.fft_conv import fast_size, sides
from models.s4d import check_sizes, convolve
from models.ssm import Output, hippo_legs, log_uniform, tagged


def s4_kernel(a: Tensor, p: Tensor, b: Tensor, step: Tensor, c: Tensor, length: int) -> Tensor:
    """K[0 ... length - 1]. a (Lambda), p, b: [d n] complex, step: [d], c: [r d n] complex -> [r d length].

    What is [d n f] large on the way is not kept for the gradients, but made again.
    """
    size = fast_size(length)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    with full_precision(step):
        c = c - after(transition(a, p, step), c, size)
        values = checkpoint(generating_function, a, p, b, step, c, size, **options)
        return torch.fft.irfft(values, size)[..., :length]


def generating_function(a: Tensor, p: Tensor, b: Tensor, step: Tensor, c: Tensor, size: int) -> Tensor:
    """c ((1 - z) - step (1 + z) A / 2)^-1 step b at z = exp(-2 pi i k / size), k = 0 ... size / 2: [r d f].

    With h = pi k / size the inverse is exp(i h) (2 i sin h - step cos h A)^-1: finite at z = -1 too. Both
    parts are divided by their common size u, so that no step is too small: t = 2 sin h / u, s = step cos h /
    u. A pair of conjugates has the denominator q = s^2 |a|^2 - t^2 - 2 i t s Re a, and the numerator
    2 (i t Re v - s Re(v conj a)): all large arrays are real.

    The sums are in the precision of b. With -Re a of 1e-3 and 16,384 positions in float32, the gradients of
    decays and steps, differences of sharp resonances, are 1e-3 to 1e-1 off (the kernel: 1e-6, with |p| of
    0.01 up to 1e-3); float64 would mend it at more than twice the time.
    """
    half = torch.arange(size // 2 + 1, device=step.device, dtype=torch.float64) * (math.pi / size)
    wide = step.double()[:, None]
    sine, cosine = 2 * half.sin(), wide * half.cos()  # [f], [d f]
    common = torch.hypot(sine, cosine).detach()  # it cancels: the result does not depend on it
    gain, t, s = (part.to(step.dtype)[:, None] for part in (wide / common, sine / common, cosine / common))
    shrink, size_a = -2 * a.real, a.abs().square()[..., None]
    real = torch.addcmul(-t.square(), size_a, s.square())  # [d n f]
    imag_square = shrink.square()[..., None], (t * s).square()
    scale = torch.addcmul(real.square(), *imag_square).reciprocal()  # 1 / |q|^2
    v = torch.stack([p.conj() * p, p.conj() * b, *(c * p), *(c * b)], dim=1)
    weights = torch.cat([v.real, (v * a.conj()[:, None]).real], dim=1)  # [d 2(2 + 2r) n]
    sums = weights @ (real * scale), (weights * -shrink[:, None]) @ scale * (t * s)
    with_t, with_s = torch.complex(*sums).chunk(2, dim=1)  # sums of Re v / q, of Re(v conj a) / q
    sums = 2 * (1j * t * with_t - s * with_s)  # [d 2 + 2r f]
    pp, pb = (s[:, 0] * sums[:, i] for i in range(2))
    cp, cb = (gain * sums[:, 2:]).unflatten(1, (2, -1)).permute(1, 2, 0, 3)  # [r d f] each
    turn = torch.polar(torch.ones_like(half), half).to(cb.dtype)
    return turn * (cb - cp * (pb / (1 + pp)))


def transition(a: Tensor, p: Tensor, step: Tensor) -> Tensor:
    """Abar on [Re x, Im x], for x of one of each pair: [d 2n 2n], real, float64.

    Abar = 2 M - 1, and M = (1 - step A / 2)^-1 is known from its diagonal part R = 1 / (1 - step Lambda / 2):
    M x = R x - R p (step / (1 + step Re(p* R p))) Re(p* R x).
    """
    a, p, step = a.to(torch.complex128), p.to(torch.complex128), step.double()[:, None]
    diagonal = 1 / (1 - step * a / 2)
    into, out_of = diagonal * p, diagonal * p.conj()
    gain = step / (1 + step * (out_of * p).real.sum(-1, keepdim=True))
    real, imag = torch.diag_embed(2 * diagonal.real - 1), torch.diag_embed(2 * diagonal.imag)
    rotation = torch.cat([torch.cat([real, -imag], dim=-1), torch.cat([imag, real], dim=-1)], dim=-2)
    left, right = torch.cat([into.real, into.imag], dim=-1), torch.cat([out_of.real, -out_of.imag], dim=-1)
    return rotation - (2 * gain * left)[..., None] * right[..., None, :]


def after(matrix: Tensor, c: Tensor, count: int) -> Tensor:
    """c matrix^count: matrix [d 2n 2n], c [r d n] complex -> [r d n]; count is a fast size (`fast_size`)."""
    rows = torch.cat([c.real, -c.imag], dim=-1).to(matrix.dtype).transpose(0, 1)  # [d r 2n]
    while count > 16:  # of fast sizes, these are even; a squaring costs more than 16 products with rows
        matrix, count = matrix @ matrix, count // 2
    for _ in range(count):
        rows = rows @ matrix
    real, imag = rows.transpose(0, 1).chunk(2, dim=-1)
    return torch.complex(real, -imag).to(c.dtype)


@register("s4")
class S4(Mixer):
    """The parameters of `s4_kernel`, and an output stage."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        d_state: int = 64,
        n_ssm: int | None = 1,
        directions: str = "untied",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        output: str = "glu",
        ssm_lr_scale: float = 0.1,
        dt_lr_scale: float | None = None,
    ) -> None:
        super().__init__(place, projections=False)
        check_sizes("s4", d_state, dt_min, dt_max)
        d, n = place.d_model, d_state // 2
        copies = d if n_ssm is None else n_ssm
        if copies < 1 or d % copies:
            raise ValueError(
                f"s4 needs n_ssm, the copies of A and B, to divide its {d} channels, got {n_ssm}; choose a "
                f"divisor, or null for one copy a channel"
            )
        self.d_state, self.directions = d_state, known_directions(directions, "s4")
        self.repeats = d // copies
        own = {"lr_scale": ssm_lr_scale}
        frequency, p, b = (part.to(torch.get_default_dtype()) for part in hippo_legs(d_state))
        self.log_decay = tagged(nn.Parameter(torch.full((copies, n), math.log(0.5))), **own)
        self.frequency = tagged(nn.Parameter(frequency.repeat(copies, 1)), **own)
        p, b = (torch.stack([part, torch.zeros(n)], dim=-1).repeat(copies, 1, 1) for part in (p, b))
        self.p, self.b = (tagged(nn.Parameter(part), **own) for part in (p, b))  # real and imaginary parts
        self.log_step = tagged(
            nn.Parameter(log_uniform((d,), dt_min, dt_max)),
            lr_scale=ssm_lr_scale if dt_lr_scale is None else dt_lr_scale,
        )
        sets = 2 if directions == "untied" else 1
        self.c = nn.Parameter(torch.randn(sets, d, n, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(d))
        self.output = Output(d, d, kind=output, name="s4")

    def kernels(self, length: int) -> Tensor:
        """[r d length]: of the way there, and of the way back if that has a C of its own."""
        log_decay, frequency, p, b, log_step, c = at_least_fp32(
            self.log_decay, self.frequency, self.p, self.b, self.log_step, self.c
        )
        a = torch.complex(-log_decay.exp(), frequency)
        p, b, c = (torch.view_as_complex(part) for part in (p, b, c))
        a, p, b = (part.repeat(self.repeats, 1) for part in (a, p, b))  # channel i has copy i mod n_ssm
        return s4_kernel(a, p, b, log_step.exp(), c, length)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        (skip,) = at_least_fp32(self.skip)
        kernel, back = sides(self.kernels(x.shape[1]), self.directions)
        return self.output(convolve(x, kernel, back, skip, mask))

    def state_size(self, length: int) -> int:
        return self.place.d_model * self.d_state * (1 if self.directions == "forward" else 2)
