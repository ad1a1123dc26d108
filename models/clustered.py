"""Clustered attention: queries of one cluster share an attention pattern, corrected at its largest keys.

Paper    Vyas et al. 2020, arXiv 2007.04825, sections 3.2 (clustered) and 3.3 (improved)
Computes clusters c of queries: codes sign(q W), K-means by Hamming distance;
         A_c = softmax(q_c K^T / sqrt(d)) of the mean query q_c of a cluster;
         clustered  out_i = A_c V for i in c
         improved   out_i = m_c sum_{j in T_c} softmax_j(q_i . k_j / sqrt(d)) v_j
                    + sum_{j not in T_c} A_cj v_j,  T_c: the topk largest keys of A_c, m_c: their mass
Cost     time O(I L C B + L C D + L K D), memory O(L C + L K) per head; C clusters, K = topk, I iterations
Exact    if num_clusters >= length, or improved and topk >= length: then it is dense softmax attention
Padding  padded queries take no part in clusters, padded keys get weight zero
Differs  K-means starts from real queries evenly apart (released code: any) and a row of at most num_clusters
         real tokens has each in a cluster of its own; an empty cluster keeps its code, of equal distances the
         first cluster is nearer, of equal votes a bit is one; hash planes are alike for all rows and fixed in
         evaluation, and each head has its own (released code: one set for all heads, drawn in every call);
         they go through the origin, and hash_bias=True gives each a normal offset, as the released code does
"""
# b batch, h heads, l length, d head dim, c clusters, k keys of a cluster, n blocks, s slots of a block

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Place, Traits, at_least_fp32, full_precision, masked_softmax, register
from models.selection import HashingMixer, check_hashing, largest, move, move_back, take_rows

MOST_SLOTS = 32  # queries of one cluster are laid out in blocks of at most so many


@torch.no_grad()
def assign(
    q: Tensor, mask: Tensor | None, planes: Tensor, *, num_clusters: int, num_iterations: int
) -> Tensor:
    """The cluster of each query: q [b h l d], mask [b l] or None, planes [h d bits] -> [b h l] int64.

    If planes have d + 1 rows, the last holds their offsets.
    """
    length = q.shape[2]
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if mask is None else mask
    count = real.sum(dim=-1, keepdim=True)  # [b 1]
    every = torch.arange(num_clusters, device=q.device)
    in_order = (~real).to(torch.uint8).sort(dim=-1, stable=True).indices  # real positions first
    start = in_order.gather(1, (every * count) // num_clusters)  # [b c]
    with full_precision(q):
        planes, offset = planes.to(q.dtype).tensor_split([q.shape[-1]], dim=1)
        codes = torch.einsum("bhld,hdk->bhlk", q, planes) + offset.sum(dim=1, keepdim=True) > 0
        codes = 2 * codes.to(q.dtype) - 1  # products and sums of these are whole numbers, so exact
        centres = take_rows(codes, start[:, None].expand(*q.shape[:2], -1))  # [b h c bits]
        ballots = F.pad(codes, (0, 1), value=1.0) * real[:, None, :, None]  # the last column counts voters
        for _ in range(num_iterations):
            member = (codes @ centres.mT).argmax(dim=-1, keepdim=True) == every  # [b h l c]
            votes = member.to(q.dtype).mT @ ballots
            centres = torch.where(votes[..., -1:] > 0, 2 * (votes[..., :-1] >= 0).to(q.dtype) - 1, centres)
        cluster = (codes @ centres.mT).argmax(dim=-1)
    own = (real.long().cumsum(dim=-1) - 1).clamp_min(0)  # [b l]
    return torch.where((count <= num_clusters)[:, None], own[:, None], cluster)


@torch.no_grad()
def blocks_of(cluster: Tensor, num_clusters: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries laid out in blocks of `size`, each of one cluster: cluster [b h l] -> order [b h n*s] and
    slot [b h l] as `move` takes them, whether a slot is used [b h n*s], and each block's cluster [b h n].
    """
    length = cluster.shape[-1]
    num_blocks = -(-length // size) + num_clusters
    by_cluster, token = cluster.sort(dim=-1, stable=True)
    every = torch.arange(num_clusters, device=cluster.device).expand(*cluster.shape[:2], -1).contiguous()
    first = torch.searchsorted(by_cluster, every)  # [b h c], where a cluster begins among the sorted
    last = torch.searchsorted(by_cluster, every, right=True)
    ends = ((last - first + size - 1) // size).cumsum(dim=-1)  # whole numbers: exact on every device
    begins = F.pad(ends, (1, -1))
    rank = torch.arange(length, device=cluster.device) - first.gather(-1, by_cluster)
    slot = torch.empty_like(cluster).scatter_(-1, token, begins.gather(-1, by_cluster) * size + rank)
    order = slot.new_zeros(*cluster.shape[:2], num_blocks * size)
    used = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, slot, True)
    order = order.scatter_(-1, slot, torch.arange(length, device=cluster.device).expand_as(slot))
    block = torch.arange(num_blocks, device=cluster.device).expand(*cluster.shape[:2], -1).contiguous()
    return order, slot, used, torch.searchsorted(ends, block, right=True).clamp_max(num_clusters - 1)


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    planes: Tensor,
    num_clusters: int = 100,
    num_iterations: int = 10,
    improved: bool = True,
    topk: int = 32,
    dropout: float = 0.0,
) -> Tensor:
    """q, k: [b h l d], v: [b h l e], mask: [b l] bool, True = real, planes as in `assign` -> [b h l e]."""
    length, num_clusters = q.shape[2], min(num_clusters, q.shape[2])
    size = max(1, min(MOST_SLOTS, length // num_clusters))
    (q, k), scale = at_least_fp32(q, k), q.shape[-1] ** -0.5
    options = {"num_clusters": num_clusters, "num_iterations": num_iterations}
    order, slot, used, owner = blocks_of(assign(q, mask, planes, **options), num_clusters, size)
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if mask is None else mask
    real = real[:, None]
    counted = (used & real.expand(*order.shape[:2], -1).gather(-1, order)).to(q.dtype)  # [b h n*s]
    owns = (owner.unsqueeze(-1) == torch.arange(num_clusters, device=q.device)).to(q.dtype)  # [b h n c]
    order, slot = order.unsqueeze(2), slot.unsqueeze(2)
    query = move(q, order, slot).squeeze(2).unflatten(2, (-1, size))  # [b h n s d]
    counted = counted.unflatten(2, (-1, size)).unsqueeze(-1)
    with full_precision(q):
        number = (owns.mT @ counted.sum(dim=3)).clamp_min(1)
        centre = owns.mT @ (query * counted).sum(dim=3) / number  # [b h c d]
        scores = centre @ k.mT * scale  # [b h c l]
    weights = masked_softmax(scores, real.unsqueeze(2))
    owns = owns.to(v.dtype)
    if not improved:
        mixed = (owns @ (F.dropout(weights, dropout).to(v.dtype) @ v)).unsqueeze(3)  # [b h n 1 e]
    else:
        keys, found = largest(scores, real.unsqueeze(2), min(topk, length))  # [b h c k]
        top = torch.zeros(*scores.shape[:3], length + 1, dtype=torch.bool, device=q.device)
        top = top.scatter_(-1, keys.masked_fill(~found, length), True)[..., :length]
        rest = weights.masked_fill(top, 0.0)
        mass = (weights.sum(dim=-1) - rest.sum(dim=-1)).unsqueeze(-1)  # [b h c 1]
        where, found = take_rows(keys, owner), take_rows(found, owner)  # [b h n k]
        near, seen = take_rows(k.to(v.dtype), where), take_rows(v, where)  # [b h n k d]
        scores = torch.einsum("bhnsd,bhnkd->bhnsk", (query * scale).to(v.dtype), near)
        fine = F.dropout(masked_softmax(scores, found.unsqueeze(3)).to(v.dtype), dropout)
        mixed = (owns @ mass.to(v.dtype)).unsqueeze(3) * torch.einsum("bhnsk,bhnke->bhnse", fine, seen)
        mixed = mixed + (owns @ (F.dropout(rest, dropout).to(v.dtype) @ v)).unsqueeze(3)
    mixed = mixed.expand(-1, -1, -1, size, -1).flatten(2, 3).unsqueeze(2)
    return move_back(mixed, order, slot, used.unsqueeze(2)).squeeze(2)


@register("clustered")
class Clustered(HashingMixer):
    """Projections, hash planes and dropout around `clustered_attention`."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        num_clusters: int = 100,
        bits: int = 63,
        num_iterations: int = 10,
        improved: bool = True,
        topk: int = 32,
        hash_bias: bool = False,
        hash_seed: int = 0,
        redraw_every: int = 1,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if min(num_clusters, bits, topk) < 1 or num_iterations < 0:
            raise ValueError(
                "clustered needs num_clusters >= 1, bits >= 1, topk >= 1 and num_iterations >= 0; got "
                f"num_clusters={num_clusters}, bits={bits}, topk={topk}, num_iterations={num_iterations}"
            )
        check_hashing("clustered", hash_seed, redraw_every)
        if not improved and topk != 32:
            raise ValueError(
                f"clustered with improved=False has no top keys and no use for topk={topk}; leave it at 32"
            )
        self.num_clusters, self.num_iterations = num_clusters, num_iterations
        self.improved, self.topk = improved, topk
        shape = (place.num_heads, place.head_dim + hash_bias, bits)
        self.draw_directions(*shape, seed=hash_seed, redraw_every=redraw_every)
        self.attn_dropout = nn.Dropout(attn_dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options = {"num_clusters": self.num_clusters, "num_iterations": self.num_iterations}
        options |= {"improved": self.improved, "topk": self.topk, "planes": self.directions}
        dropout = self.attn_dropout.p if self.training else 0.0
        return clustered_attention(q, k, v, mask, **options, dropout=dropout)

    def state_size(self, length: int) -> int:
        return 2 * length * self.place.num_heads * self.place.head_dim
