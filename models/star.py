"""Star-Transformer: tokens attend to their neighbours on a ring, and to one node that attends to all tokens.

Paper    Guo et al. 2019, arXiv 1902.09113, section 3.1 and algorithm 1
Computes num_cycles times with the same weights  h_i = norm(relu(attn(h_i; [h_(i-1), h_i, h_(i+1), e_i, s])))
         and then  s = norm(relu(attn(s; [s, h_1 ... h_L]))),   where attn is multi-head softmax attention and
         e_i the layer's input, the first h_i; s starts as the mean of e_i and goes from layer to layer
Cost     time and memory O(L D) per head and cycle
Exact    no; of three tokens the ring sees all, and without e_i and s it would be dense softmax attention
Padding  the ring goes over the real tokens in their order and closes at the last; s sees them alone;
         packed rows are cut into chunks, each with s of its sequence, over whose chunks s is updated
Differs  layers of a stack have their own weights and e_i (paper: one layer; released code: weights per
         cycle, leaky ReLU, norm of queries alone, a ring that ends in zero vectors, a mean over padding too);
         no read-out from s, whose last update has no reader in the last layer and is left out there
"""
# b batch, h heads, l length, t packed tokens, n chunks, c places of a chunk, d head dim

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Block, Place, Traits, at_least_fp32, full_precision, masked_softmax, register
from models.dropout import Dropout
from models.layers import make_norm
from models.packed import Chunks
from models.row_products import sum_chunks
from models.sums import segment_softmax

Pair = tuple[Tensor, Tensor]  # keys and values, or places of the next token and of the last


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Pair,
    relay: Pair,
    mask: Tensor | None = None,
    *,
    moves: Pair | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each token attends to itself, its two neighbours, its input and the relay.

    q, k, v and the two of `inputs`: [b l h d], the two of `relay`: [b 1 h d], mask: [b l] bool -> [b l h d].
    `moves` [b*l] say, in place of the mask, where the next token of each is and where the last.
    """
    dtype = v.dtype
    q, k, v = at_least_fp32(q * q.shape[-1] ** -0.5, k, v)
    keys, values = (
        (*around(x, mask, moves), *at_least_fp32(e, s)) for x, e, s in zip((k, v), inputs, relay, strict=True)
    )
    # Autocast leaves products of elements as they are: full_precision would change nothing here.
    scores = torch.stack([(q * key).sum(dim=-1) for key in keys], dim=-1)  # [b l h 5]
    weights = F.dropout(scores.softmax(dim=-1), dropout).unsqueeze(-2).unbind(-1)  # five of [b l h 1]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)).to(dtype)


def around(x: Tensor, mask: Tensor | None, moves: Pair | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [b l h d] of the token before each on the ring, of itself, of the one after; padding has itself."""
    if moves is None and mask is None:
        return x.roll(1, dims=1), x, x.roll(-1, dims=1)
    if moves is None:
        first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        moves = tuple((first + to).flatten() for to in ring(mask))
    flat, empty = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    # Copied to their places, not gathered from them: the gradient of a copy needs no sum over indices.
    moved = (empty.index_copy(0, to, flat).view_as(x) for to in moves)
    return next(moved), x, next(moved)


def ring(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the next and the last real token [b l], around the end; padding has itself."""
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)  # real tokens first
    rank, count = torch.arange(mask.shape[1], device=mask.device), mask.sum(dim=1, keepdim=True)
    follower = torch.where(rank == count - 1, order[:, :1], order.roll(-1, dims=1))
    follower = torch.where(rank < count, follower, order)
    return torch.zeros_like(order).scatter(1, order, follower), torch.zeros_like(order).scatter(
        1, follower, order
    )


def packed_ring(chunks: Chunks, cu_seqlens: Tensor) -> Pair:
    """Places of the next and the last row in the sequence of each [n*c], around its end; unused: itself."""
    where, last = chunks.where, cu_seqlens.shape[0] - 1
    row = torch.arange(where.position.shape[0], device=cu_seqlens.device)
    stop = cu_seqlens[(where.segment + 1).clamp(max=last)]
    following = chunks.slot[torch.where(row + 1 < stop, row + 1, row - where.position)]
    places = torch.arange(chunks.inside.numel() + 1, device=row.device)  # filler rows share the last, cut off
    return tuple(
        places.index_copy(0, *move)[:-1] for move in ((chunks.slot, following), (following, chunks.slot))
    )


def relay_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """q: [b h d], k, v: [b l h d], mask: [b l] bool, True = real key -> [b h d]."""
    dtype = v.dtype
    q, k, v = at_least_fp32(q * q.shape[-1] ** -0.5, k, v)
    with full_precision(v):
        scores = torch.einsum("bhd,blhd->bhl", q, k)
        weights = masked_softmax(scores, None if mask is None else mask[:, None])
        return torch.einsum("bhl,blhd->bhd", F.dropout(weights, dropout), v).to(dtype)


@register("star")
class Star(Block):
    """A whole layer of `num_cycles` rounds; its carry is the relay [b d_model], None from the last layer."""

    traits = Traits(packed=True, uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        num_cycles: int = 2,
        norm: str = "layer",
        norm_stats: str = "real",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if num_cycles < 1:
            raise ValueError(f"star needs num_cycles >= 1, got {num_cycles}")
        width, inner = place.d_model, place.num_heads * place.head_dim
        self.is_last = place.layer_index == place.num_layers - 1
        self.num_cycles, self.num_updates = num_cycles, num_cycles - self.is_last  # of the relay
        self.ring_q, self.ring_kv = (nn.Linear(width, n * inner, bias=place.bias) for n in (1, 2))
        self.ring_out = nn.Linear(inner, width, bias=place.bias)
        self.ring_norm = make_norm(norm, width, stats=norm_stats, eps=norm_eps)
        if self.num_updates:
            self.relay_q, self.relay_kv = (nn.Linear(width, n * inner, bias=place.bias) for n in (1, 2))
            self.relay_out = nn.Linear(inner, width, bias=place.bias)
            self.relay_norm = make_norm(norm, width, stats=norm_stats, eps=norm_eps)
        self.dropout, self.attn_dropout = Dropout(dropout), nn.Dropout(attn_dropout)
        if norm == "batch" and norm_stats == "all":
            self.traits = self.traits.but(
                "its norms count padding, which packed rows have none of", packed=False
            )

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.rounds(x, mask, self.first_relay(x, mask) if carry is None else carry)

    def forward_packed(
        self, x: Tensor, cu_seqlens: Tensor, max_len: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        chunks = sum_chunks(cu_seqlens, x.shape[0], max_len)
        places = chunks.lay_out(x)
        if carry is None:
            (wide,) = at_least_fp32(places)
            with full_precision(wide):
                total = chunks.sum_by_sequence(wide.sum(dim=1), cu_seqlens.shape[0] - 1)
            carry = (total / cu_seqlens.diff()[:, None].clamp_min(1)).to(x.dtype)
        moves = packed_ring(chunks, cu_seqlens)
        tokens, carry = self.rounds(places, chunks.inside, carry, chunks, moves)
        return chunks.take_back(tokens), carry

    def rounds(
        self,
        x: Tensor,
        mask: Tensor | None,
        relay: Tensor,
        chunks: Chunks | None = None,
        moves: Pair | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [b l d_model], or [n c d_model] of packed rows in `chunks`, mask for it -> (x, carry)."""
        x = self.dropout(x)
        inputs, tokens = self.split(self.ring_kv(x)), x
        for cycle in range(self.num_cycles):
            seen = self.ring_kv(relay[:, None])
            if chunks is not None:
                with full_precision(seen):  # a copy, which autocast would round
                    seen = chunks.spread(seen)
            (q,), seen = self.split(self.ring_q(tokens)), self.split(seen)
            k, v = self.split(self.ring_kv(tokens)) if cycle else inputs
            mixed = ring_attention(q, k, v, inputs, seen, mask, moves=moves, dropout=self.rate)
            tokens = self.ring_norm(F.relu(self.ring_out(mixed.flatten(2))), mask)
            if cycle < self.num_updates:
                mixed = self.read(relay, tokens, mask, chunks)
                relay = self.relay_norm(F.relu(self.relay_out(mixed.flatten(1))))
        return tokens, None if self.is_last else relay

    def read(self, relay: Tensor, tokens: Tensor, mask: Tensor | None, chunks: Chunks | None) -> Tensor:
        """What the relay takes from itself and the tokens, [b h d]."""
        (q,) = self.split(self.relay_q(relay))
        if chunks is None:
            k, v = self.split(self.relay_kv(torch.cat([relay[:, None], tokens], dim=1)))
            real = None if mask is None else F.pad(mask, (1, 0), value=True)
            return relay_attention(q, k, v, real, dropout=self.rate)
        own, (k, v) = self.split(self.relay_kv(relay)), self.split(self.relay_kv(tokens))
        (wide,) = at_least_fp32(v)
        with full_precision(wide):
            return segment_softmax(q[:, None], k, wide, chunks, own=own, dropout=self.rate)[:, 0].to(v.dtype)

    @property
    def rate(self) -> float:
        return self.attn_dropout.p if self.training else 0.0

    def first_relay(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the real tokens [b d_model]."""
        (wide,) = at_least_fp32(x)
        if mask is None:
            return wide.mean(dim=1).to(x.dtype)
        total = (wide * mask[..., None]).sum(dim=1)
        return (total / mask.sum(dim=1, keepdim=True).clamp_min(1)).to(x.dtype)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[... n*h*d] -> n of [... h d]."""
        return x.unflatten(-1, (-1, self.place.num_heads, self.place.head_dim)).unbind(-3)
