"""Reformer: attention within buckets of a locality-sensitive hash, with one projection for queries and keys.

Paper    Kitaev et al. 2020, arXiv 2001.04451, section 2: eq. 2-5 and, for several rounds, appendix A
Computes out_i = sum_{j in P(i)} softmax_j(q_i . k_j / sqrt(d)) v_j   with   k_j = q_j / |q_j|;
         round r: b_r(x) = argmax([x R_r, -x R_r]), tokens sorted by (b_r, position) and cut into chunks;
         P(i) = the j != i that in some round share i's bucket and stand in its chunk or the one before
         ({i} if there is none); each j counts once, however many rounds it is met in
Cost     time O(L log L + H L C D), memory O(H L C) per head; H rounds, C = bucket_size
Exact    if num_buckets=1 and bucket_size >= length: softmax of q and q / |q| over all other tokens
Padding  padded tokens are sorted behind all buckets, see nothing, are no keys, and have zeros as outputs
Differs  the number of buckets comes from max_len, not from the length (2 max_len / bucket_size, above 128 the
         product of two hashes, as in trax); rotations are alike for all rows and fixed in evaluation; with
         rotary positions the hash is of the vectors before the turn. Released code, as options: trax and
         transformers do not divide scores by sqrt(d) and look across buckets (score_scale=none
         across_buckets=True). The benchmark has num_hashes=1 num_buckets=10 num_chunks=10 redraw_every=0
         across_buckets=True score_scale=multiplied unit_keys=False mask_self=False output_projection=False
         use_mask=False append_zeros=True: 1 to num_chunks zero inputs at the end are projected, hashed,
         sorted and seen like any token
"""
# b batch, h heads, l length, d head dim, r rounds, n chunks, c slots of a chunk, m slots that a chunk sees

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, register
from models.selection import HashingMixer, check_hashing, exact_linear, move, move_back, some_rows

SCALES = {"divided": -0.5, "none": 0.0, "multiplied": 0.5}  # powers of the head width
FACTORED_FROM = 128  # more buckets than this are pairs of two smaller hashes
FAR = 2**30  # apart from every bucket and chunk


def hash_sizes(num_buckets: int) -> tuple[int, ...]:
    """The even factors of a number of buckets: one, or two and their product rounded up; none of 1."""
    if num_buckets == 1:
        return ()
    if num_buckets <= FACTORED_FROM:
        return (num_buckets,)
    first = 2 ** ((num_buckets.bit_length() - 1) // 2)
    return first, 2 * -(-num_buckets // (2 * first))


@torch.no_grad()
def lsh_buckets(x: Tensor, rotations: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """x [b h l d], rotations [h r d sum(sizes)/2] -> buckets [b h r l] int64 of an angular hash."""
    (x,) = at_least_fp32(x)
    bucket = torch.zeros(*x.shape[:2], rotations.shape[1], x.shape[2], dtype=torch.long, device=x.device)
    first, weight = 0, 1
    for size in sizes:
        with full_precision(x):
            part = rotations[..., first : first + size // 2].to(x.dtype)
            turned = torch.einsum("bhld,hrdn->bhrln", x, part)
        best = turned.abs().argmax(dim=-1, keepdim=True)  # of [xR, -xR] without the second half
        bucket = bucket + weight * (best + (turned.gather(-1, best) < 0) * (size // 2)).squeeze(-1)
        first, weight = first + size // 2, weight * size
    return bucket


def lsh_attention(
    q: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    buckets: Tensor,
    chunk: int,
    across_buckets: bool = False,
    scale: float | None = None,
    unit_keys: bool = True,
    mask_self: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """q [b h l d], v [b h l e], mask [b l] bool, True = real, buckets [b h r l] int64 -> [b h l e].

    With `across_buckets` chunks form a ring over all rounds, a token sees whatever its chunk and the one
    before hold, of any bucket, and a key met twice counts twice.
    """
    length, chunk = q.shape[2], min(chunk, q.shape[2])
    num_chunks = -(-length // chunk)
    places = num_chunks * chunk
    with torch.no_grad():
        if mask is not None:
            buckets = buckets.masked_fill(~mask[:, None, None, :], FAR)
        bucket, order = buckets.sort(dim=-1, stable=True)
        slot = torch.empty_like(order).scatter_(
            -1, order, torch.arange(length, device=q.device).expand_as(order)
        )
        padded = F.pad(bucket == FAR, (0, places - length), value=True)
        where = bucket * (num_chunks + 1) + torch.arange(length, device=q.device) // chunk
        order, where = (F.pad(x, (0, places - length)) for x in (order, where))
        options = {"chunk": chunk, "across": across_buckets, "mask_self": mask_self}
        bias = _bias(order, slot, where, padded, dtype=at_least_fp32(v)[0].dtype, **options)  # [b h r n c m]
        kept = bias > torch.finfo(bias.dtype).min
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = F.normalize(q, dim=-1) if unit_keys else q
    moved = move(torch.cat([(q * scale).to(v.dtype), k.to(v.dtype), v], dim=-1), order, slot)
    query, key, value = moved.unflatten(3, (-1, chunk)).split([q.shape[-1], q.shape[-1], v.shape[-1]], dim=-1)
    key, value = (_with_previous(x, across_buckets) for x in (key, value))
    scores = torch.einsum("bhrncd,bhrnmd->bhrncm", query, key)
    scores = torch.where(kept, scores + bias, bias)
    with torch.no_grad():  # one maximum for all rounds of a token, so that their sums can be added
        top = scores.amax(dim=-1).flatten(3).gather(-1, slot).amax(dim=2, keepdim=True)  # [b h 1 l]
        top = top.expand_as(slot).gather(-1, order).clamp_min(torch.finfo(top.dtype).min)
    weights = (scores - top.unflatten(-1, (-1, chunk)).unsqueeze(-1)).exp()
    mixed = torch.einsum("bhrncm,bhrnme->bhrnce", F.dropout(weights, dropout).to(v.dtype), value)
    sums = torch.cat([mixed.to(weights.dtype), weights.sum(dim=-1, keepdim=True)], dim=-1).flatten(3, 4)
    used = torch.arange(places, device=q.device) < length
    sums = move_back(sums, order, slot, used).sum(dim=2)
    return (sums[..., :-1] / sums[..., -1:].clamp_min(0.5)).to(v.dtype)  # a real token's largest weight is 1


def _with_previous(x: Tensor, across: bool) -> Tensor:
    """Each chunk after the one before: x [b h r n c ...] -> [b h r n m ...]; the first follows the last."""
    if not across:
        return x if x.shape[3] == 1 else torch.cat([x.roll(1, 3), x], dim=4)
    ring = x.flatten(2, 3)
    return x if ring.shape[2] == 1 else torch.cat([ring.roll(1, 2).view_as(x), x], dim=4)


def _bias(
    order: Tensor,
    slot: Tensor,
    where: Tensor,
    padded: Tensor,
    *,
    chunk: int,
    dtype: torch.dtype,
    across: bool,
    mask_self: bool,
) -> Tensor:
    """What is added to scores: -log of how many rounds a pair meets in. What stands in place of scores: the
    lowest number for a token with itself, so that it counts only where there is nothing else, -inf where a
    pair may not meet; slots that are padded or hold no token meet none.

    order, where, padded: [b h r s], slot: [b h r l] -> [b h r n c m].
    """

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.unflatten(-1, (-1, chunk))
        return x[..., :, None], _with_previous(x, across)[..., None, :]

    def met(query: Tensor, key: Tensor) -> Tensor:
        return (query == key) | (query == key + 1)  # one bucket, and the same chunk or the one before

    query, key = pair(order)
    bias = torch.zeros((), dtype=dtype, device=order.device).expand(*query.shape[:-1], key.shape[-1])
    seen = ~torch.logical_or(*pair(padded))
    if not across:
        seen = seen & met(*pair(where))
        by_token, times = where.gather(-1, slot), torch.zeros((), dtype=torch.uint8, device=order.device)
        for r in range(order.shape[2]) if order.shape[2] > 1 else ():
            times = times + met(*pair(by_token[:, :, r : r + 1].expand_as(slot).gather(-1, order)))
        bias = bias - times.clamp_min(1).to(dtype).log()
    bias = bias.masked_fill(~seen, -torch.inf)
    return bias.masked_fill((query == key) & seen, torch.finfo(dtype).min) if mask_self else bias


@register("reformer")
class Reformer(HashingMixer):
    """Projections, hash and dropout around `lsh_attention`; `qkv` holds one part for queries and keys."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        num_hashes: int = 2,
        bucket_size: int = 64,
        num_buckets: int = 0,
        num_chunks: int = 0,
        across_buckets: bool = False,
        score_scale: str = "divided",
        unit_keys: bool = True,
        mask_self: bool = True,
        output_projection: bool = True,
        use_mask: bool = True,
        append_zeros: bool = False,
        hash_seed: int = 0,
        redraw_every: int = 1,
        attn_dropout: float = 0.0,
    ) -> None:
        Mixer.__init__(self, place, projections=False)
        if score_scale not in SCALES:
            raise ValueError(
                f"unknown score_scale '{score_scale}' for reformer; choose from: {', '.join(SCALES)}"
            )
        some = num_buckets in (0, 1) or (num_buckets > 1 and num_buckets % 2 == 0)
        if num_hashes < 1 or bucket_size < 1 or num_chunks < 0 or not some:
            raise ValueError(
                "reformer needs num_hashes >= 1, bucket_size >= 1, num_buckets even, 1 or 0 (by max_len) and "
                f"num_chunks >= 0 (0: by bucket_size); got num_hashes={num_hashes}, "
                f"bucket_size={bucket_size}, num_buckets={num_buckets}, num_chunks={num_chunks}"
            )
        check_hashing("reformer", hash_seed, redraw_every)
        if append_zeros and not num_chunks:
            raise ValueError("reformer with append_zeros=True fills num_chunks chunks; set num_chunks, got 0")
        if num_buckets == 1 and (hash_seed, redraw_every) != (0, 1):
            raise ValueError(
                "reformer with num_buckets=1 has no hash; leave hash_seed=0 and redraw_every=1, got "
                f"hash_seed={hash_seed}, redraw_every={redraw_every}"
            )
        if num_chunks and num_buckets and bucket_size != 64:
            raise ValueError(
                f"reformer with num_chunks and num_buckets set has no use for bucket_size={bucket_size}; "
                "leave it at 64"
            )
        inner = place.num_heads * place.head_dim
        self.qkv = nn.Linear(place.d_model, 2 * inner, bias=place.bias)
        needed = output_projection or inner != place.d_model
        self.out = nn.Linear(inner, place.d_model, bias=place.bias) if needed else nn.Identity()
        self.bucket_size, self.num_chunks, self.across_buckets = bucket_size, num_chunks, across_buckets
        self.score_scale, self.unit_keys, self.mask_self = score_scale, unit_keys, mask_self
        self.num_hashes, self.use_mask, self.append_zeros = num_hashes, use_mask, append_zeros
        self.sizes = hash_sizes(num_buckets or 2 * -(-place.max_len // bucket_size))
        shape = (place.num_heads, num_hashes, place.head_dim, sum(self.sizes) // 2)
        self.draw_directions(*shape, seed=hash_seed, redraw_every=redraw_every)
        self.attn_dropout = nn.Dropout(attn_dropout)
        if num_chunks or across_buckets:
            self.traits = self.traits.but(
                "chunks are cut from, or joined around, the padded length", length_invariant=False
            )
        if not use_mask:
            reason = (
                "use_mask=False: padding is hashed and attended to like any token, as in the benchmark's code"
            )
            self.traits = self.traits.but(reason, content_invariant=False, length_invariant=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        inner, length = self.place.num_heads * self.place.head_dim, x.shape[1]
        if self.append_zeros:
            fill = self.num_chunks - length % self.num_chunks
            x, mask = F.pad(x, (0, 0, 0, fill)), None if mask is None else F.pad(mask, (0, fill), value=True)
        q = self.heads(exact_linear(self.qkv, x, 0, inner))
        v = self.heads(some_rows(self.qkv, x, inner, inner))
        mixed = lsh_attention(
            self.turned(q),
            v,
            mask if self.use_mask else None,
            buckets=lsh_buckets(q, self.directions, self.sizes),
            chunk=-(-x.shape[1] // self.num_chunks) if self.num_chunks else self.bucket_size,
            across_buckets=self.across_buckets,
            scale=self.place.head_dim ** SCALES[self.score_scale],
            unit_keys=self.unit_keys,
            mask_self=self.mask_self,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )
        return self.out(mixed[:, :, :length].transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        seen = length if self.num_chunks else min(2 * self.num_hashes * self.bucket_size, length)
        return 2 * seen * self.place.num_heads * self.place.head_dim
