"""Skyformer: the Gaussian kernel of `kernelized` through sampled landmarks (Nystrom on the lifted matrix).

Paper    Chen et al. 2021, arXiv 2111.00035, Skyformer
Computes out = C(Q, S) D^(-1/2) (D^(-1/2) M D^(-1/2))^(-1) D^(-1/2) C(S, K) V   with   M = C(S, S) + gamma I,
         D = diag(M 1), C(x, y) = exp(-|x' - y'|^2 / 2), x' = x / d^(1/4); S: num_landmarks tokens drawn at
         random, half of them as queries and half as keys; the inverse by num_iterations steps
Cost     time O(L M D + M^3), memory O(L M) per head
Exact    if every token is drawn, up to gamma and the inverse: then it is the dense Gaussian kernel C(Q, K) V
Padding  landmarks are drawn among real tokens; queries, keys and values at padding are zeroed
Differs  a draw is decided by landmark_seed, layer and training step, and fixed in evaluation (released code:
         fresh in every forward); the start of the inverse is scaled per matrix (released code: per batch,
         here `coupled_start`); `scale_width` puts another width in the place of d (released code: always 32);
         `distinct` draws without replacement; one accumulation (released code: any number, 1 by default)
"""
# b batch, h heads, l length, m landmarks, s landmarks of one kind, d head dim

import math

import torch
from torch import Tensor

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.landmarks import Draw, gaussian_kernel, iterated_inverse, real_positions


def skyformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    numbers: Tensor,
    num_landmarks: int = 128,
    distinct: bool = False,
    gamma: float = 0.1,
    num_iterations: int = 6,
    coupled_start: bool = False,
    scale_width: int | None = None,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token -> [b h l d].

    numbers: random integers below 2^32, a row for queries and one for keys. [2 num_landmarks/2]: each draws a
    landmark among the real tokens. If `distinct`, [2 l]: the tokens of the largest numbers are landmarks.
    """
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    scale = (scale_width or q.shape[-1]) ** -0.25
    q, k = q * scale, k * scale
    if mask is not None:
        q, k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (q, k, v))
    if distinct:
        chosen, used = largest_numbers(numbers, mask, num_landmarks // 2)  # [b 2 s] each
    else:
        chosen, used = real_positions(numbers, mask, q.shape[-2]), None
    with full_precision(v):
        landmarks = torch.cat([take(x, chosen[:, i]) for i, x in enumerate((q, k))], dim=-2)  # [b h m d]
        between = gaussian_kernel(landmarks, landmarks)
        if used is not None:
            used = used.flatten(1)[:, None].to(v.dtype)  # [b 1 m]
            between = between * used[..., :, None] * used[..., None, :]
        between = between + gamma * torch.eye(between.shape[-1], dtype=v.dtype, device=v.device)
        degree = between.sum(dim=-1).rsqrt()  # [b h m]
        between = degree[..., :, None] * between * degree[..., None, :]
        norm = between.sum(dim=-2).amax(dim=-1)
        norm = norm.amax().expand_as(norm) if coupled_start else norm
        inverse = iterated_inverse(between, norm, num_iterations)
        degree = degree if used is None else degree * used
        summary = degree.unsqueeze(-1) * (gaussian_kernel(landmarks, k) @ v)  # [b h m d]
        summary = degree.unsqueeze(-1) * (inverse @ summary)
        return (gaussian_kernel(q, landmarks) @ summary).to(dtype)


def largest_numbers(numbers: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the largest of a row's numbers [... l] at real tokens -> ([b ... s], [b ... s] bool).

    s = min(count, l); where a row has fewer real tokens, the second result is False.
    """
    numbers = numbers[None]
    if mask is not None:
        numbers = numbers.where(mask.view(mask.shape[0], *[1] * (numbers.dim() - 2), -1), -1)
    largest = numbers.topk(min(count, numbers.shape[-1]), dim=-1)
    return largest.indices, largest.values >= 0


def take(x: Tensor, position: Tensor) -> Tensor:
    """Rows of x [b h l d] at position [b s] or [1 s] -> [b h s d]."""
    index = position[:, None, :, None].expand(*x.shape[:2], -1, x.shape[-1])
    return x.gather(2, index)


@register("skyformer")
class Skyformer(Mixer):
    """Projections around `skyformer_attention`, and the draw of its landmarks."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        num_landmarks: int = 128,
        distinct: bool = False,
        gamma: float = 0.1,
        num_iterations: int = 6,
        coupled_start: bool = False,
        scale_width: int | None = None,
        landmark_seed: int = 0,
    ) -> None:
        super().__init__(place)
        whole = all(isinstance(n, int) for n in (num_landmarks, num_iterations, landmark_seed))
        even = whole and num_landmarks >= 2 and num_landmarks % 2 == 0
        if not even or num_iterations < 1 or not 0 <= gamma < math.inf:
            raise ValueError(
                "skyformer needs num_landmarks even and >= 2, num_iterations >= 1 and gamma >= 0, all "
                f"but gamma whole; got num_landmarks={num_landmarks}, num_iterations={num_iterations}, "
                f"landmark_seed={landmark_seed}, gamma={gamma}"
            )
        if scale_width is not None and not (isinstance(scale_width, int) and scale_width >= 1):
            raise ValueError(
                f"skyformer needs scale_width >= 1, whole, or null (the width of a head), got {scale_width}"
            )
        self.num_landmarks, self.distinct = num_landmarks, distinct
        self.gamma, self.num_iterations = gamma, num_iterations
        self.coupled_start, self.scale_width = coupled_start, scale_width
        self.draw = Draw(landmark_seed, place.layer_index)
        if distinct and num_landmarks // 2 >= place.max_len:
            self.traits = self.traits.but("every token is a landmark", uses_order=False)
        if coupled_start:
            reason = "the start of the inverse takes the largest norm in the batch, as the released code does"
            self.traits = self.traits.but(reason, batch_invariant=False)

    def training_update(self, step: int) -> None:
        self.draw.advance(step)

    def numbers(self, length: int) -> Tensor:
        """[2 l] or [2 num_landmarks/2]: a row for queries and one for keys; none depends on the length."""
        count = length if self.distinct else self.num_landmarks // 2
        return self.draw(torch.arange(2 * count, device=self.out.weight.device).view(count, 2).T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options = {"num_landmarks": self.num_landmarks, "distinct": self.distinct, "gamma": self.gamma}
        options |= {"num_iterations": self.num_iterations, "coupled_start": self.coupled_start}
        options |= {"numbers": self.numbers(q.shape[-2]), "scale_width": self.scale_width}
        return skyformer_attention(q, k, v, mask, **options)

    def state_size(self, length: int) -> int:
        return 2 * self.num_landmarks * self.place.num_heads * self.place.head_dim
