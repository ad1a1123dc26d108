"""Routing Transformer: attention inside clusters of queries and keys, found by online k-means.

Paper    Roy et al. 2021, arXiv 2003.05997, section 4 and algorithm 1
Computes out_i = mean over the clusters c with i in Q(c), zero if there is none, of
         sum_{j in K(c)} softmax_j(q_i . k_j / sqrt(d)) v_j   with   q, k after layer norm without parameters;
         Q(c), K(c): the w queries and keys with the largest dot product with centroid m_c. In training
         m_c <- decay m_c + (1 - decay) x_c, where x_c is the mean of the queries and keys whose nearest
         centroid it is, and commitment * mean (x - m)^2 over them is added to the loss.
         The first half of the heads attends to neighbouring blocks instead
Cost     time O(L W D + L C D), memory O(L W + L C) per head; C = W = sqrt(max_len) unless set
Exact    if num_clusters=1, window >= length and num_local_heads=0: softmax of normalised q and k
Padding  padded tokens are never among the w largest and take no part in centroids, loss and local heads; a
         row with fewer than w real tokens has all of them in each cluster
Differs  num_clusters and window come from max_len; centroids start as normalised normal vectors decided by
         centroid_seed, as in the released code (the package routing-transformer: k-means of the first batch),
         and move once per step by the mean of all tokens since the last (paper: by half the sum of queries
         and half that of keys; released: by averages of sums and of counts), never by one that is not finite;
         of equal products the earlier token's is larger; the mean over a token's clusters divides by their
         number (released: by 1e-2 more); without the shared projection of the causal form; use_mask=False, an
         option, routes padding like any token, as that package does
"""
# b batch, h heads, l length, d head dim, c clusters, w tokens of a cluster

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Place, Traits, at_least_fp32, full_precision, masked_softmax, register
from models.local import local_attention
from models.selection import ChoosingMixer, add_rows, largest, take_rows


def normalised(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis without parameters, in at least float32."""
    (x,) = at_least_fp32(x)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


@torch.no_grad()
def closeness(x: Tensor, centroids: Tensor) -> Tensor:
    """Dot products of x [b h l d] and centroids [h c d] -> [b h c l]."""
    with full_precision(x):
        return torch.einsum("hcd,bhld->bhcl", centroids.to(x.dtype), x)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    centroids: Tensor,
    window: int,
    scale: float | None = None,
    eps: float = 1e-5,
    dropout: float = 0.0,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real, centroids: [h c d] -> [b h l e]."""
    length, window = q.shape[2], min(window, q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = normalised(q, eps), normalised(k, eps)
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if mask is None else mask
    real = real[:, None, None, :]
    (q_where, q_real), (k_where, k_real) = (largest(closeness(x, centroids), real, window) for x in (q, k))
    query, key = take_rows((q * scale).to(v.dtype), q_where), take_rows(k.to(v.dtype), k_where)
    scores = torch.einsum("bhcqd,bhckd->bhcqk", query, key)
    weights = masked_softmax(scores, k_real.unsqueeze(-2)).to(v.dtype)
    mixed = torch.einsum("bhcqk,bhcke->bhcqe", F.dropout(weights, dropout), take_rows(v, k_where))
    mixed = mixed * q_real.unsqueeze(-1)
    times = add_rows(q_real.flatten(2).unsqueeze(-1).to(v.dtype), q_where.flatten(2), length)
    return add_rows(mixed.flatten(2, 3), q_where.flatten(2), length) / times.clamp_min(1)


def nearest(x: Tensor, mask: Tensor | None, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centroid nearest to each of x [b h l d], and what each centroid gets from the real ones.

    -> nearest centroids [b h l d], sums [h c d], counts [h c]; mask: [b l] bool or None, centroids: [h c d].
    """
    best = closeness(x, centroids).argmax(dim=2)  # [b h l]
    every = torch.arange(centroids.shape[1], device=x.device)[:, None]
    member = (
        (best.unsqueeze(2) == every) if mask is None else (best.unsqueeze(2) == every) & mask[:, None, None]
    )
    member = member.to(x.dtype)  # [b h c l]
    with full_precision(x):
        sums = torch.einsum("bhcl,bhld->hcd", member, x.detach())
    near = take_rows(centroids.to(x.dtype)[None].expand(x.shape[0], -1, -1, -1), best)
    return near, sums, member.sum(dim=(0, 3))


@register("routing")
class Routing(ChoosingMixer):
    """Projections, centroids and dropout around `routing_attention`, after some local heads."""

    traits = Traits()

    def __init__(
        self,
        place: Place,
        *,
        num_clusters: int = 0,
        window: int = 0,
        num_local_heads: int | None = None,
        local_window: int = 64,
        decay: float = 0.999,
        commitment: float = 1e-4,
        use_mask: bool = True,
        centroid_seed: int = 0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        heads = place.num_heads // 2 if num_local_heads is None else num_local_heads
        sizes = min(num_clusters, window, local_window - 1, centroid_seed)
        if sizes < 0 or commitment < 0 or not 0 <= decay <= 1:
            raise ValueError(
                "routing needs num_clusters, window >= 0 (0: by max_len), local_window >= 1, centroid_seed "
                f"and commitment >= 0 and decay from 0 to 1; got num_clusters={num_clusters}, "
                f"window={window}, local_window={local_window}, centroid_seed={centroid_seed}, "
                f"commitment={commitment}, decay={decay}"
            )
        if not 0 <= heads < place.num_heads:
            raise ValueError(
                f"routing needs num_local_heads from 0 to {place.num_heads - 1}, so that a head is left to "
                f"route; got {num_local_heads}"
            )
        if num_local_heads == 0 and local_window != 64:
            raise ValueError(
                f"routing without local heads has no use for local_window={local_window}; leave it at 64 or "
                "raise num_local_heads"
            )
        self.num_local_heads, self.decay, self.commitment, self.use_mask = heads, decay, commitment, use_mask
        self.num_clusters = num_clusters or max(1, round(place.max_len**0.5))
        self.window = window or -(-place.max_len // self.num_clusters)
        self.local_window = local_window
        self.attn_dropout = nn.Dropout(attn_dropout)
        seed = (centroid_seed * 1_000_003 + place.layer_index) % 2**63
        shape = (place.num_heads - heads, self.num_clusters, place.head_dim)
        start = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("centroids", normalised(start, 1e-5))
        self.register_buffer("sums", torch.zeros(shape))
        self.register_buffer("counts", torch.zeros(shape[:2]))
        self._loss = None
        if heads:
            self.traits = self.traits.but("", uses_order=True)
        if not num_clusters:
            self.traits = self.traits.but("the number of centroids is the root of max_len", fixed_length=True)
        if not use_mask:
            reason = "use_mask=False: padding is routed and attended to like any token"
            self.traits = self.traits.but(reason, content_invariant=False, length_invariant=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask if self.use_mask else None
        dropout = self.attn_dropout.p if self.training else 0.0
        first = self.num_local_heads
        self._loss = self._learn(q[:, first:], k[:, first:], mask) if self.training else None
        options = {"centroids": self.centroids, "window": self.window, "scale": q.shape[-1] ** -0.5}
        routed = routing_attention(q[:, first:], k[:, first:], v[:, first:], mask, **options, dropout=dropout)
        if not first:
            return routed
        q, k, v = q[:, :first].to(v.dtype), k[:, :first].to(v.dtype), v[:, :first]
        options = {"window": self.local_window, "pattern": "neighbours", "dropout": dropout}
        return torch.cat([local_attention(q, k, v, mask, **options), routed], dim=1)

    def _learn(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Adds up what centroids get at the next step; the loss of being far from them."""
        x = normalised(torch.cat([q, k], dim=2), 1e-5)
        twice = None if mask is None else torch.cat([mask, mask], dim=1)
        near, sums, counts = nearest(x, twice, self.centroids)
        self.sums.add_(sums)
        self.counts.add_(counts)
        error = (x - near).square().mean(dim=(1, 3))  # [b 2l]
        if twice is None:
            return self.commitment * error.mean()
        return self.commitment * (error * twice).sum() / twice.sum().clamp_min(1)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loss": None}  # a tensor with a history cannot be copied

    def aux_loss(self) -> Tensor | None:
        """The loss of the last forward in training, given out once: kept, it would keep its graph."""
        loss, self._loss = self._loss, None
        return loss

    @torch.no_grad()
    def training_update(self, step: int) -> None:
        count = self.counts.unsqueeze(-1)
        moved = torch.lerp(self.sums / count.clamp_min(1), self.centroids, self.decay)
        some = (count > 0) & moved.isfinite().all(dim=-1, keepdim=True)
        self.centroids.copy_(torch.where(some, moved, self.centroids))
        self.sums.zero_()
        self.counts.zero_()

    def state_size(self, length: int) -> int:
        routed = (self.place.num_heads - self.num_local_heads) * self.num_clusters * min(self.window, length)
        local = self.num_local_heads * min(3 * self.local_window, length)
        return 2 * (routed + local) * self.place.head_dim
