"""Nystromformer: softmax attention through landmarks and an iterated pseudo-inverse.

Paper    Xiong et al. 2021, arXiv 2102.03902, eq. 15; the iteration for ^+ is that of Razavi et al. 2014
Computes out = softmax(s Q K~^T) softmax(s Q~ K~^T)^+ softmax(s Q~ K^T) V + conv(V)   with s = 1 / sqrt(d);
         Q~, K~ are means over num_landmarks segments of the sequence, conv is depthwise along the length
Cost     time O(L M D + M^3), memory O(L M) per head, O((L + M) D + M^2) where kernels for rows run
Exact    if num_landmarks >= length: then it is dense softmax attention (+ conv), as in the released code
Padding  segments are means over real tokens; segments without one are dropped from both small softmaxes,
         padded keys from the third; V is zeroed before the convolution; packed rows are padded, but where
         kernels for rows run, with segments of the padded length as elsewhere: in half precision on a GPU,
         for more positions than landmarks and at most 8 iterations (in bfloat16 any number)
Differs  masks as above (released code: zeroed padding counts in the means, and segments of padding stay as
         landmarks, here `count_padding`); a length that is no multiple of num_landmarks is padded at its end,
         so the last segments may be empty; the start of the inverse is scaled per matrix (released code: per
         batch, here `coupled_start`)
"""
# b batch, h heads, l length, t packed tokens, m landmarks, d head dim

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import (
    Mixer,
    Place,
    Traits,
    at_least_fp32,
    dense_attention,
    full_precision,
    masked_softmax,
    register,
)
from models.depthwise import conv_along, conv_rows
from models.few_keys import few_keys_attention
from models.few_queries import few_queries_attention
from models.landmark_rows import LandmarkRows
from models.landmarks import SAFE_ITERATIONS, iterated_inverse
from models.packed import pad_packed, unpad_packed
from models.softmax import even_bounds, flash_runs


def segment_means(
    x: Tensor, real: Tensor, num_segments: int, *, count_padding: bool = False
) -> tuple[Tensor, Tensor]:
    """Means over the real tokens of equal segments, the last ones cut short.

    x: [b h l d], real: [b l] or [1 l] bool -> ([b h m d], [b m] or [1 m] bool: whether a segment has any).
    With `count_padding` it counts as tokens of zeros, up to the full size of the last segment too.
    """
    length = x.shape[-2]
    missing = -length % num_segments  # fewer than one per segment
    real = F.pad(real, (0, missing)).unflatten(-1, (num_segments, -1))  # [b m l/m]
    x = F.pad(x, (0, 0, 0, missing)).unflatten(-2, (num_segments, -1))  # [b h m l/m d]
    count = real.sum(dim=-1)
    total = (x * real[:, None, :, :, None]).sum(dim=-2)
    if count_padding:
        return total / real.shape[-1], torch.ones_like(count, dtype=torch.bool)
    return total / count.clamp_min(1)[:, None, :, None], count > 0


def start_norm(a: Tensor, *, coupled_start: bool = False) -> Tensor:
    """|A|_1 |A|_inf of each matrix a [... m m] >= 0; if `coupled_start`, of the largest norms of all."""
    norm_1, norm_inf = a.sum(dim=-2).amax(dim=-1), a.sum(dim=-1).amax(dim=-1)
    if coupled_start:
        norm_1, norm_inf = norm_1.amax().expand_as(norm_1), norm_inf.amax().expand_as(norm_inf)
    return (norm_1 * norm_inf).clamp_min(0.5)  # below 1 only where a is all zero


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    num_landmarks: int,
    num_iterations: int = 6,
    conv_weight: Tensor | None = None,
    coupled_start: bool = False,
    count_padding: bool = False,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token, conv_weight: [h 1 kernel 1] -> [b h l d]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q, k, v)
    with full_precision(v):
        if q.shape[-2] <= num_landmarks:
            mixed = dense_attention(q, k, v, mask)
        else:
            options = {"coupled_start": coupled_start, "count_padding": count_padding}
            mixed = _through_landmarks(q, k, v, mask, num_landmarks, num_iterations, **options)
        if conv_weight is not None:
            v = v if mask is None else v * mask[:, None, :, None]
            mixed = mixed + conv_along(v, conv_weight[:, 0, :, 0].to(v.dtype))
    return mixed.to(dtype)


def _through_landmarks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    num_landmarks: int,
    num_iterations: int,
    *,
    coupled_start: bool,
    count_padding: bool,
) -> Tensor:
    real = q.new_ones(1, q.shape[-2], dtype=torch.bool) if mask is None else mask
    q = q * q.shape[-1] ** -0.5
    q_landmark, used = segment_means(q, real, num_landmarks, count_padding=count_padding)  # [b h m d], [b m]
    k_landmark, _ = segment_means(k, real, num_landmarks, count_padding=count_padding)
    from_queries = masked_softmax(q @ k_landmark.mT, used[:, None, None, :])  # [b h l m]
    between = masked_softmax(q_landmark @ k_landmark.mT, used[:, None, None, :]) * used[:, None, :, None]
    to_keys = masked_softmax(q_landmark @ k.mT, real[:, None, None, :])  # [b h m l]
    inverse = iterated_inverse(between, start_norm(between, coupled_start=coupled_start), num_iterations)
    return from_queries @ (inverse @ (to_keys @ v))


def nystrom_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    num_landmarks: int,
    num_iterations: int = 6,
    conv_weight: Tensor | None = None,
    coupled_start: bool = False,
    count_padding: bool = False,
    filler: bool = True,
) -> Tensor:
    """`nystrom_attention` of packed rows padded to max_len > num_landmarks, by kernels that write no
    scores of rows: for tensors that `flash` takes.

    q, k, v: [t h d], conv_weight: [h 1 kernel 1] -> [t h d]. Landmarks and what is read through them are in
    the dtype of v where they meet rows; what is between landmarks is in at least float32, but operands of the
    inverse's products are rounded. `filler` False: every row is a sequence's, and every sequence has one.
    """
    landmarks = LandmarkRows.of(cu_seqlens, q.shape[0], max_len, num_landmarks)
    count, used = landmarks.counts(), None
    if count_padding:
        count = torch.full_like(count, landmarks.size)
    else:
        used, count = count > 0, count.clamp_min(1)
    q_mean, k_mean = (total / count[..., None, None] for total in landmarks.sums(q, k))  # [b m h d]
    with full_precision(v):
        between = torch.einsum("bmhd,bnhd->bhmn", q_mean * q.shape[-1] ** -0.5, k_mean)
        between = masked_softmax(between, None if used is None else used[:, None, None, :])
        if used is not None:
            between = between * used[:, None, :, None]
        norm = start_norm(between, coupled_start=coupled_start)
        inverse = iterated_inverse(between, norm, num_iterations, exact=num_iterations > SAFE_ITERATIONS)
        to_keys = few_queries_attention(q_mean.to(v.dtype), k, v, cu_seqlens, max_len, filler=filler)
        values = torch.einsum("bhmn,bnhd->bmhd", inverse, to_keys.to(inverse.dtype)).to(v.dtype)
        mixed = few_keys_attention(q, k_mean.to(v.dtype), values, cu_seqlens, max_len, used=used)
        if conv_weight is not None:
            mixed = conv_rows(v, conv_weight[:, 0, :, 0], cu_seqlens, max_len, base=mixed)
    return mixed


@register("nystrom")
class Nystrom(Mixer):
    """Projections around `nystrom_attention`; `kernel_size` 0 leaves the convolution out."""

    traits = Traits(
        length_invariant=False,
        uses_order=True,
        packed=True,
        because={"length_invariant": "the segments divide the padded length, not the real one"},
    )

    def __init__(
        self,
        place: Place,
        *,
        num_landmarks: int = 64,
        num_iterations: int = 6,
        kernel_size: int = 35,
        coupled_start: bool = False,
        count_padding: bool = False,
    ) -> None:
        super().__init__(place)
        whole = all(isinstance(n, int) for n in (num_landmarks, num_iterations, kernel_size))
        odd_or_none = kernel_size == 0 or (kernel_size > 0 and kernel_size % 2 == 1)
        if not whole or num_landmarks < 1 or num_iterations < 1 or not odd_or_none:
            raise ValueError(
                "nystrom needs num_landmarks >= 1, num_iterations >= 1 and kernel_size odd or 0 (none), all "
                f"whole; got num_landmarks={num_landmarks}, num_iterations={num_iterations}, "
                f"kernel_size={kernel_size}"
            )
        self.num_landmarks, self.num_iterations = num_landmarks, num_iterations
        self.coupled_start, self.count_padding = coupled_start, count_padding
        self.conv_weight = None
        if kernel_size:
            self.conv_weight = nn.Parameter(torch.empty(place.num_heads, 1, kernel_size, 1))
            bound = kernel_size**-0.5  # the start that torch gives a Conv2d of this shape
            nn.init.uniform_(self.conv_weight, -bound, bound)
        if num_landmarks >= place.max_len:  # dense attention, whatever the length
            self.traits = Traits(uses_order=kernel_size > 1, packed=True)
        elif coupled_start:
            reason = "the start of the inverse takes the largest norm in the batch, as the released code does"
            self.traits = self.traits.but(reason, batch_invariant=False)

    @property
    def options(self) -> dict:
        options = {"num_landmarks": self.num_landmarks, "num_iterations": self.num_iterations}
        options |= {"coupled_start": self.coupled_start, "count_padding": self.count_padding}
        return {**options, "conv_weight": self.conv_weight}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch_size, _, length, _ = q.shape
        if mask is not None or not self.by_rows(q, k, v, length):
            return nystrom_attention(q, k, v, mask, **self.options)
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        bounds = even_bounds(rows[0])
        mixed = nystrom_rows(*(x.flatten(0, 1) for x in rows), bounds, length, filler=False, **self.options)
        return mixed.unflatten(0, (batch_size, length)).transpose(1, 2)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        if self.by_rows(q, k, v, max_len):
            return nystrom_rows(q, k, v, cu_seqlens, max_len, **self.options)
        num_rows = q.shape[0]
        (q, mask), (k, _), (v, _) = (pad_packed(x, cu_seqlens, max_len) for x in (q, k, v))
        mixed = self.attend(*(x.transpose(1, 2) for x in (q, k, v)), mask)
        return unpad_packed(mixed.transpose(1, 2), cu_seqlens, num_rows)

    def by_rows(self, q: Tensor, k: Tensor, v: Tensor, max_len: int) -> bool:
        """True if `nystrom_rows` is to compute these, whatever their layout."""
        few = self.num_iterations <= SAFE_ITERATIONS or v.dtype == torch.bfloat16
        return few and max_len > self.num_landmarks and flash_runs(q, k, v)

    def state_size(self, length: int) -> int:
        return 2 * min(self.num_landmarks, length) * self.place.num_heads * self.place.head_dim
