"""External attention: tokens attend to two learned memories, and meet in the softmax over positions alone.

Paper    Guo et al. 2021, arXiv 2105.02358, algorithm 2 (several heads, which share the memories)
Computes a_is = softmax over positions i of f_i . m_s, then divided by its sum over slots s;
         out_i = sum_s a_is n_s   with f = W x, and M_k = (m_s), M_v = (n_s) learned, num_slots rows each
Cost     time O(L S D), memory O(L S) per head
Exact    no; its keys and values are parameters, so no size makes it attention among tokens
Padding  padded positions are left out of the softmax over positions, the one place where tokens meet
Differs  both normalisations are one softmax over slots of f . m_s less its log-sum-exp over positions, so
         that no sum can vanish (released code: 1e-9 added to the sum over slots); M_k and M_v start apart and
         have no bias (released: segmenter M_v a copy of M_k, classifier with biases); f is as wide as x
         (released classifier: four times as wide, with four times the heads)
"""
# b batch, h heads, l length, t packed tokens, c chunk, n chunks, s slots, d head dim

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, Place, Traits, at_least_fp32, full_precision, masked_softmax, register
from models.packed import Chunks


def external_attention(
    x: Tensor, mask: Tensor | None = None, *, keys: Tensor, values: Tensor, dropout: float = 0.0
) -> Tensor:
    """x: [b h l d], mask: [b l] bool, True = real token, keys, values: [s d] -> [b h l d]."""
    real = None if mask is None else mask[:, None, :, None]
    with full_precision(x):
        scores = slot_scores(x, keys)  # [b h l s]
        seen = scores if real is None else scores.masked_fill(~real, torch.finfo(scores.dtype).min)
        total = seen.logsumexp(dim=-2, keepdim=True)  # [b h 1 s]
    weights = masked_softmax(scores - total, real)
    return F.dropout(weights.to(x.dtype), dropout) @ values.to(x.dtype)


def external_attention_packed(
    x: Tensor, cu_seqlens: Tensor, max_len: int, *, keys: Tensor, values: Tensor, dropout: float = 0.0
) -> Tensor:
    """`external_attention` within each packed sequence. x: [t h d], keys, values: [s d] -> [t h d]."""
    batch_size = cu_seqlens.shape[0] - 1
    chunks = Chunks.of(cu_seqlens, x.shape[0], max_len=max_len)
    real = chunks.inside[..., None, None]  # [n c 1 1]
    with full_precision(x):
        scores = slot_scores(chunks.lay_out(x), keys)  # [n c h s]
        scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
        top = largest_of_sequence(scores.detach().amax(dim=1), chunks.owner, batch_size)  # [n h s]
        sums = ((scores - top[:, None]).exp() * real).sum(dim=1)
        total = chunks.sum_by_sequence(sums, batch_size)  # [b h s]; its logarithm is added to `top`
        total = top + chunks.spread(total.clamp_min(torch.finfo(total.dtype).tiny).log())
    weights = masked_softmax(scores - total[:, None], real)
    weights = F.dropout(weights.to(x.dtype), dropout)
    return chunks.take_back(weights @ values.to(x.dtype))


def slot_scores(x: Tensor, keys: Tensor) -> Tensor:
    """x [... d] with keys [s d] -> [... s], in at least float32."""
    x, keys = at_least_fp32(x, keys)
    return x @ keys.T


def largest_of_sequence(partial: Tensor, owner: Tensor, batch_size: int) -> Tensor:
    """The maximum over all chunks of a chunk's sequence. partial: [n h s], owner: [n] -> [n h s]."""
    lowest = partial.new_full((batch_size + 1, *partial.shape[1:]), torch.finfo(partial.dtype).min)
    index = owner[:, None, None].expand(partial.shape)
    return lowest.scatter_reduce(0, index, partial, "amax").gather(0, index)


@register("external")
class External(Mixer):
    """The projections into and out of heads, the two memories, and dropout around `external_attention`."""

    traits = Traits(packed=True)

    def __init__(self, place: Place, *, num_slots: int = 64, attn_dropout: float = 0.0) -> None:
        super().__init__(place, projections=False)
        if not isinstance(num_slots, int) or num_slots < 1:
            raise ValueError(f"external needs num_slots >= 1, whole, got {num_slots}")
        self.num_slots = num_slots
        inner = place.num_heads * place.head_dim
        self.query = nn.Linear(place.d_model, inner, bias=place.bias)
        self.out = nn.Linear(inner, place.d_model, bias=place.bias)
        self.keys, self.values = (nn.Parameter(torch.empty(num_slots, place.head_dim)) for _ in range(2))
        nn.init.uniform_(self.keys, -(place.head_dim**-0.5), place.head_dim**-0.5)  # as of two linear layers
        nn.init.uniform_(self.values, -(num_slots**-0.5), num_slots**-0.5)
        self.attn_dropout = nn.Dropout(attn_dropout)

    @property
    def options(self) -> dict:
        dropout = self.attn_dropout.p if self.training else 0.0
        return {"keys": self.keys, "values": self.values, "dropout": dropout}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = self.query(x).unflatten(-1, (self.place.num_heads, -1)).transpose(1, 2)  # [b h l d]
        return self.out(external_attention(heads, mask, **self.options).transpose(1, 2).flatten(2))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        heads = self.query(x).unflatten(-1, (self.place.num_heads, -1))  # [t h d]
        return self.out(external_attention_packed(heads, cu_seqlens, max_len, **self.options).flatten(1))

    def state_size(self, length: int) -> int:
        return self.num_slots * self.place.num_heads
