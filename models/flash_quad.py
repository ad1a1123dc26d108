"""FLASH-Quad: one gated attention unit in place of attention and feed-forward.

Paper    Hua et al. 2022, arXiv 2202.10447, section 3 (gated attention unit, quadratic)
Computes u, v, z = silu(norm(x) W),  q_i = R_i (g_q * z_i + c_q),  k_i = R_i (g_k * z_i + c_k),
         A = relu(q k^T / L + b)^2,  out = x + (u * A v) W_o;  u, v have expansion * d_model numbers a token,
         z has key_width; R_i is the rotation of rotary positions (1 if not rotate), and b_ij depends on i - j
         alone, by position_bias:
         rotary    b_ij = <R_i a, R_j e>, a and e learned
         toeplitz  a learned number for each i - j from -(max_len - 1) to max_len - 1
         none      0
Cost     time O(L^2 D), memory O(L^2), once and not per head
Exact    no; it has no softmax
Padding  values of padded keys are zeroed, and L is the number of real tokens
Differs  L counts real tokens (code of others: padded length, here `count_padding`); the bias is of one kind
         at any length (code of others: toeplitz for at most 512 tokens, rotary for more); through the
         harness the norm is the backbone's, `scale` only where that is asked for; it has one head, so that
         num_heads and d_head of the backbone change nothing; `prenorm=False` is ours; linear maps start as
         torch's do (paper: normal, 0.02)
"""
# b batch, l length, d d_model, e gated width, s width of queries and keys

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Block, Place, Traits, at_least_fp32, register, rotate
from models.dropout import Dropout
from models.layers import make_norm

BIASES = ("rotary", "toeplitz", "none")
ROTARY_BASE = 10_000.0


def flash_quad_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    count_padding: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """q, k: [b l s], v: [b l e], mask: [b l] bool, True = real token, bias: [l l] -> [b l e]."""
    (scores,) = at_least_fp32(torch.einsum("bis,bjs->bij", q, k))
    if mask is None or count_padding:
        scores = scores / q.shape[1]
    else:
        scores = scores / mask.sum(dim=-1).clamp_min(1)[:, None, None]
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.relu().square(), dropout).to(v.dtype)
    if mask is not None:
        v = v * mask.unsqueeze(-1)
    return torch.einsum("bij,bje->bie", weights, v)


class RotaryBias(nn.Module):
    """b_ij = <R_i a, R_j e> of two learned vectors, for any length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"position_bias=rotary needs an even key_width, got {width}")
        self.vectors = nn.Parameter(torch.randn(2, 1, width) * 0.02)

    def forward(self, length: int) -> Tensor:
        positions = torch.arange(length, device=self.vectors.device)
        (vectors,) = at_least_fp32(self.vectors)
        left, right = rotate(vectors.expand(-1, length, -1), positions, base=ROTARY_BASE)
        return left @ right.mT


class ToeplitzBias(nn.Module):
    """b_ij = t[i - j], learned up to a distance of max_len - 1."""

    def __init__(self, max_len: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * max_len - 1) * 0.02)  # of i - j = 0 in the middle

    def forward(self, length: int) -> Tensor:
        middle = self.table.shape[0] // 2
        near = self.table[middle - length + 1 : middle + length]  # of -(l - 1) to l - 1
        return near.flip(0).unfold(0, length, 1).flip(0)  # row i begins at i - 0 and falls


@register("flash_quad")
class FlashQuad(Block):
    """A whole layer around `flash_quad_attention`, with its own norm and residual; it hands nothing on."""

    traits = Traits(
        uses_order=True,
        quadratic_memory=True,
        because={"quadratic_memory": "all scores of a sequence are kept"},
    )

    def __init__(
        self,
        place: Place,
        *,
        key_width: int = 128,
        expansion: int = 2,
        position_bias: str = "rotary",
        rotate: bool = True,
        count_padding: bool = False,
        norm: str = "scale",
        norm_stats: str = "real",
        norm_eps: float = 1e-5,
        prenorm: bool = True,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        act_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        if key_width < 1 or expansion < 1:
            raise ValueError(
                "flash_quad needs key_width >= 1 and expansion >= 1; "
                f"got key_width={key_width}, expansion={expansion}"
            )
        if position_bias not in BIASES:
            raise ValueError(
                f"unknown position_bias '{position_bias}' for flash_quad; choose from: {', '.join(BIASES)}"
            )
        if rotate and key_width % 2:
            raise ValueError(f"rotate=True needs an even key_width, got {key_width}")
        self.gated_width = expansion * place.d_model
        self.widths = [self.gated_width, self.gated_width, key_width]
        self.prenorm, self.count_padding, self.rotate = prenorm, count_padding, rotate
        self.norm = make_norm(norm, place.d_model, stats=norm_stats, eps=norm_eps)
        self.hidden = nn.Linear(place.d_model, sum(self.widths), bias=place.bias)
        self.out = nn.Linear(self.gated_width, place.d_model, bias=place.bias)
        self.gain = nn.Parameter(torch.randn(2, key_width) * 0.02)  # g of queries, then of keys
        self.offset = nn.Parameter(torch.zeros(2, key_width))
        self.position_bias = None
        if position_bias == "rotary":
            self.position_bias = RotaryBias(key_width)
        elif position_bias == "toeplitz":
            self.position_bias = ToeplitzBias(place.max_len)
            self.traits = self.traits.but(
                "a bias is learned for every distance below max_len", fixed_length=True
            )
        elif not rotate:
            self.traits = replace(self.traits, uses_order=False)
        if count_padding:
            self.traits = self.traits.but("scores are divided by the padded length", length_invariant=False)
        self.dropout = Dropout(dropout)
        self.attn_dropout, self.act_dropout = nn.Dropout(attn_dropout), Dropout(act_dropout)

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.prenorm:
            return x + self.dropout(self.mix(self.norm(x, mask), mask)), None
        return self.norm(x + self.dropout(self.mix(x, mask)), mask), None

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The gated attention unit without norm and residual: [b l d] -> [b l d]."""
        gate, v, shared = F.silu(self.hidden(x)).split(self.widths, dim=-1)
        q, k = (shared * self.gain[i] + self.offset[i] for i in range(2))
        if self.rotate:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = (rotate(part, positions, base=ROTARY_BASE) for part in (q, k))
        attended = flash_quad_attention(
            q,
            k,
            v,
            mask,
            bias=None if self.position_bias is None else self.position_bias(x.shape[1]),
            count_padding=self.count_padding,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )
        return self.out(gate * self.act_dropout(attended))

    def state_size(self, length: int) -> int:
        return length * sum(self.widths[1:])
