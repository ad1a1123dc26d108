"""Longformer: a sliding window, and a few global tokens that see and are seen by all.

Paper    Beltagy et al. 2020, arXiv 2004.05150, section 3.1
Computes out_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(d)) v_j   with w = window, g = num_global and
         N(i) = {j: |i - j| <= w // 2 or j < g}; if i < g then N(i) is all tokens, and queries, keys and
         values come from a projection of their own
Cost     time and memory O(L (w + g)) per head
Exact    if window >= 2 * length, apart from the global tokens, whose projections are others
Padding  padded keys get weight zero, global ones too; a row without real ones gives zeros
Differs  the first num_global tokens are global, one by default, for a [CLS] (paper: a choice of the task;
         released benchmark: num_global=0); no dilation; even_window, which the released benchmark has, takes
         exactly w keys, one fewer before the query than after it (paper: half a window on each side); the
         projections of global tokens are built as copies of the others, as in the paper, but a backbone that
         initialises linear maps itself (init=xavier, normal) draws each anew
"""
# b batch, h heads, l length, d head dim, n blocks, c tokens of a block, m keys a block sees, g global tokens

import torch
from torch import Tensor, nn

from models.blocks import Part, block_attention, in_blocks, label_windows, offsets, real_keys, windows
from models.common import Mixer, Place, Traits, register, rotate

LEAST_BLOCK = 16  # tokens: smaller blocks have more overhead than unseen keys


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    of_global: tuple[Tensor, Tensor, Tensor] | None = None,
    even_window: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k, v: [b h l d], mask: [b l] bool, True = real token -> [b h l d].

    of_global: queries [b h g d] of the first g tokens, and the keys and values [b h l d] that these see.
    """
    real, length, reach = real_keys(mask, k), q.shape[-2], window // 2
    g = 0 if of_global is None else of_global[0].shape[-2]
    size = min(max(reach, LEAST_BLOCK), length)
    cut = (size, reach, reach) if length > size else (size, 0, 0)
    offset = offsets(*cut, q.device)
    near = (offset <= reach) & (offset >= (reach - window + 1 if even_window else -reach))  # [c m]
    beyond = real & (torch.arange(length, device=q.device) >= g)  # the global keys are a part of their own
    seen = label_windows(beyond, *cut)[:, None, :, None] & near  # [b 1 n c m]
    parts = [Part(windows(k, *cut), windows(v, *cut), "nmd", seen)]
    if of_global is None:
        return block_attention(in_blocks(q, size), parts, dropout=dropout).flatten(2, 3)[:, :, :length]
    parts.append(Part(k[:, :, :g], v[:, :, :g], "md", real[:, None, None, None, :g]))
    mixed = block_attention(in_blocks(q, size), parts, dropout=dropout).flatten(2, 3)
    everything = Part(*of_global[1:], "md", real[:, None, None, None])
    first = block_attention(of_global[0].unsqueeze(2), [everything], dropout=dropout)[:, :, 0]
    return torch.cat([first, mixed[:, :, g:length]], dim=2)


@register("longformer")
class Longformer(Mixer):
    """Projections and dropout around `longformer_attention`; those of global tokens are built as copies."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        window: int = 512,
        num_global: int = 1,
        even_window: bool = False,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if window < 1 or num_global < 0:
            raise ValueError(
                "longformer needs window >= 1 and num_global >= 0; "
                f"got window={window}, num_global={num_global}"
            )
        if even_window and window % 2:
            raise ValueError(
                f"longformer with even_window=True needs an even window, got {window}; "
                "an odd one holds as many keys before the query as after it anyway"
            )
        self.window, self.num_global, self.even_window = window, num_global, even_window
        self.attn_dropout = nn.Dropout(attn_dropout)
        self.q_global = self.kv_global = None
        if num_global:
            inner = place.num_heads * place.head_dim
            self.q_global = nn.Linear(place.d_model, inner, bias=place.bias)
            self.kv_global = nn.Linear(place.d_model, 2 * inner, bias=place.bias)
            with torch.no_grad():
                for name, own in self.qkv.named_parameters():
                    getattr(self.q_global, name).copy_(own[:inner])
                    getattr(self.kv_global, name).copy_(own[inner:])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(self.qkv, x)
        of_global = None
        if self.q_global is not None:
            q_global = self.project(self.q_global, x[:, : self.num_global])
            of_global = (*q_global, *self.project(self.kv_global, x))
        mixed = longformer_attention(
            q,
            k,
            v,
            mask,
            window=self.window,
            of_global=of_global,
            even_window=self.even_window,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def project(self, linear: nn.Linear, x: Tensor) -> list[Tensor]:
        """One [b h l d] for each part of the projection; all but values are turned by rotary positions."""
        inner = self.place.num_heads * self.place.head_dim
        parts = linear(x).unflatten(-1, (-1, self.place.num_heads, self.place.head_dim)).unbind(2)
        parts = [part.transpose(1, 2) for part in parts]
        if self.place.rotary_base is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            turned = max(1, linear.out_features // inner - 1)
            parts[:turned] = [rotate(p, positions, base=self.place.rotary_base) for p in parts[:turned]]
        return parts

    def state_size(self, length: int) -> int:
        seen = 2 * (self.window // 2) + (not self.even_window) + self.num_global
        return 2 * min(seen, length) * self.place.num_heads * self.place.head_dim
