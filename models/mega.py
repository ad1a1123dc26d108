"""Mega: gated attention with one head over a moving average; a whole layer with its feed-forward.

Paper    Ma et al. 2023, arXiv 2209.10655, section 3
Computes for each channel and direction  h_t = q * h_(t-1) + p b x_t,  p = sigmoid(alpha),
         q = 1 - p sigmoid(delta),  y_t = <g, h_t> / sqrt(m),  h of d_state = m numbers. Both directions have
         their own numbers, their y are added, so that a token counts once in each. Then
         x' = silu(y + omega * x),   z = silu(W x'),   q_i = g_q * z_i + c_q,   k_i = g_k * z_i + c_k,
         v = silu(W x),   o = f(q k^T s + bias) v,   r = silu(W x'),   u = sigmoid(W x'),
         h = silu(W x' + W (r * o)),   out = x + u * (h - x),  and a feed-forward with its own residual;
         z has key_width numbers a token, v and r have expansion * d_model. By `attention`:
         softmax  f = softmax over the keys, s = key_width ** -0.5
         relu2    f = relu(.)^2, s = 1 / number of keys
         laplace  f = Phi((. - sqrt(1/2)) / sqrt(1/(4 pi))), Phi the normal distribution; s as for relu2
         bias_ij depends on j - i alone, by position_bias:
         simple  a learned number for each offset of the chunk, without chunks below max_len
         rotary  <R_i a, R_j e>, a and e learned
         chunk=c: tokens attend within c positions (Mega-chunk); truncation=t: y sees t tokens each
         way, itself among them
Cost     time O(L^2 D + L log L D), memory O(L D): scores are made in blocks of rows, again for gradients,
         but kept with attn_dropout; with chunks O(L c D) and O(L c)
Exact    no; its attention is softmax attention where it is that function without a bias
Padding  x is zero there before the average, keys are masked, and the number of keys is of real ones
Differs  omega, its silu and sqrt(m) are of the released code (paper: x' = y). That code truncates in LRA, at
         4096 for Path-X, else 1024. Here x_t counts in both averages; versions of that code differ: those
         whose average has an option `shift` leave x_t out of the backward one, with shift=True, which begins
         at x_{t+1} with its second weight, and with shift=False, which begins there with its first. Chunks
         need not divide the length. num_heads and d_head of the backbone change nothing; its `activation` is
         the feed-forward's (LRA: silu), norm and prenorm are the backbone's; bias=false is honoured by the
         linear maps of the attention, while g, c and the feed-forward keep theirs
"""
# b batch, l length, d d_model, e gated width, s width of queries and keys, m states of a channel,
# n chunks, c positions of a chunk, r rows of it

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.common import Block, Place, Traits, at_least_fp32, full_precision, register, rotate
from models.dropout import Dropout
from models.fft_conv import fft_conv
from models.layers import FeedForward, make_norm
from models.ssm import exponential_kernel

BIASES = ("simple", "rotary")
ROTARY_BASE = 10_000.0
ROWS = 512  # queries of a chunk whose scores are made at a time
SCORES = 2**27  # most scores made at a time, whatever the batch
STD = 0.02  # of linear maps, gains and biases of position at the start


def laplace(x: Tensor) -> Tensor:
    """The normal distribution with mean sqrt(1/2) and variance 1/(4 pi): close to relu(x)^2, but bounded."""
    return 0.5 * (1 + torch.erf((x - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(dim=-1),
    "relu2": lambda x: x.relu().square(),
    "laplace": laplace,
}


def moving_average(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    gamma: Tensor,
    mask: Tensor | None = None,
    *,
    truncation: int | None = None,
) -> Tensor:
    """The damped average from both ends: x [b l d], parameters [2 d m], mask [b l] bool -> [b l d]."""
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    taps = x.shape[1] if truncation is None else min(truncation, x.shape[1])
    alpha, delta, beta, gamma = at_least_fp32(alpha, delta, beta, gamma)
    share = alpha.sigmoid()
    weights = share * beta * gamma * gamma.shape[-1] ** -0.5
    log_factors = torch.log1p(-share * delta.sigmoid())
    kernels = exponential_kernel(weights.flatten(0, 1), log_factors.flatten(0, 1), taps)
    past, future = kernels.chunk(2)  # [d taps]; both begin with the token itself
    return fft_conv(x, past + F.pad(future[:, :1], (0, taps - 1)), future[:, 1:])


def mega_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    function: str = "softmax",
    table: Tensor | None = None,
    vectors: Tensor | None = None,
    chunk: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """q, k: [b l s], v: [b l e], mask: [b l] bool, True = real token -> [b l e] in the dtype of v.

    table: biases of the offsets -(n - 1) ... n - 1 for any n from the chunk on; vectors: [2 s] that turn.
    """
    length = q.shape[1]
    size = length if chunk is None else min(chunk, length)
    if mask is None and length % size:
        mask = torch.ones(1, length, dtype=torch.bool, device=q.device).expand(q.shape[0], -1)
    seen = None if mask is None else in_chunks(mask[..., None], size).transpose(-1, -2)  # [b n 1 c]
    q, k, v = (in_chunks(x, size) for x in (q, k, v))  # [b n c .]
    if function == "softmax":
        q = q * q.shape[-1] ** -0.5
    else:
        q = q / (size if seen is None else seen.sum(dim=-1, keepdim=True).clamp_min(1))
    if vectors is not None:  # the bias is a product too, so that it needs no matrix of its own
        positions = torch.arange(size, device=q.device)
        left, right = rotate(vectors[:, None].expand(-1, size, -1), positions, base=ROTARY_BASE)  # [c s]
        q, k = (
            torch.cat([q, left.to(q.dtype).expand_as(q)], -1),
            torch.cat([k, right.to(k.dtype).expand_as(k)], -1),
        )
    some = None
    if seen is not None:
        some = seen.any(dim=-1, keepdim=True)  # a chunk without a real key gives zeros
        seen = seen | ~some
    q, k = q.to(v.dtype), k.to(v.dtype)
    with full_precision(v):
        if function == "softmax" and table is None:
            mixed = fused(q, k, v, seen, dropout)
        else:
            mixed = in_rows(q, k, v, seen, table, function, dropout)
    mixed = mixed if some is None else mixed * some
    return mixed.flatten(1, 2)[:, :length]


def in_chunks(x: Tensor, size: int) -> Tensor:
    """[b l d] -> [b n c d], zeros (False) after the end."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """Softmax of q k^T by torch's kernels, which want queries as wide as values: [b n c e]."""
    keys, values = q.shape[-1], v.shape[-1]
    q, k, v = (F.pad(x, (0, max(keys, values) - x.shape[-1])) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=1.0)
    return mixed[..., :values]


def in_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    table: Tensor | None,
    function: str,
    dropout: float,
) -> Tensor:
    """f(q k^T + bias) v, some rows of all scores at a time, which are made again for the gradients."""
    # Blocks of rows bound memory: the loop has size / ROWS turns, 32 at 16,384 tokens, and more only where a
    # large batch makes SCORES the bound. A fixed number of turns would let memory grow with size^2.
    size = q.shape[2]
    rows = max(1, min(ROWS, SCORES // (q.shape[0] * q.shape[1] * size)))
    mixed = []
    for first in range(0, size, rows):
        part = q[:, :, first : first + rows]
        near = None
        if table is not None:  # offsets from that of the first key and the last row to that of the reverse
            start = table.shape[0] // 2 - first - part.shape[2] + 1
            near = table[start : start + size + part.shape[2] - 1]
        inputs = (part, k, v, seen, near, function, dropout)
        again = torch.is_grad_enabled() and not dropout
        options = {"use_reentrant": False, "preserve_rng_state": False}
        mixed.append(checkpoint(weighted, *inputs, **options) if again else weighted(*inputs))
    return torch.cat(mixed, dim=2)


def weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    near: Tensor | None,
    function: str,
    dropout: float,
) -> Tensor:
    """Rows of scores and what they mix: q [b n r s], near [r + c - 1] the biases of offsets -> [b n r e]."""
    (scores,) = at_least_fp32(q @ k.mT)
    if near is not None:
        scores = scores + near.unfold(0, k.shape[2], 1).flip(0)  # row i begins one offset before row i - 1
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return F.dropout(FUNCTIONS[function](scores).to(v.dtype), dropout) @ v


class MovingAverage(nn.Module):
    """silu(y + omega * x) around `moving_average`."""

    def __init__(self, width: int, d_state: int, truncation: int | None) -> None:
        super().__init__()
        self.truncation = truncation
        self.alpha, self.delta = (nn.Parameter(torch.randn(2, width, d_state) * 0.2) for _ in range(2))
        signs = 1.0 - 2.0 * (torch.arange(d_state) % 2)  # +1, -1, +1, ...
        self.beta = nn.Parameter(torch.randn(2, width, d_state) * STD + signs)
        self.gamma = nn.Parameter(torch.randn(2, width, d_state))
        self.omega = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        parameters = (self.alpha, self.delta, self.beta, self.gamma)
        return F.silu(moving_average(x, *parameters, mask, truncation=self.truncation) + self.omega * x)


class GatedAttention(nn.Module):
    """x [b l d], mask [b l] -> the update gate and what it lets in, [b l d] each."""

    def __init__(
        self,
        place: Place,
        *,
        key_width: int,
        expansion: int,
        d_state: int,
        attention: str,
        position_bias: str,
        chunk: int | None,
        truncation: int | None,
        dropout: float,
        attn_dropout: float,
        act_dropout: float,
    ) -> None:
        super().__init__()
        sizes = {"key_width": key_width, "expansion": expansion, "d_state": d_state}
        sizes |= {n: v for n, v in (("chunk", chunk), ("truncation", truncation)) if v is not None}
        if wrong := {name: value for name, value in sizes.items() if value < 1}:
            given = ", ".join(f"{name}={value}" for name, value in wrong.items())
            raise ValueError(f"mega needs {', '.join(wrong)} of at least 1, got {given}")
        if attention not in FUNCTIONS:
            raise ValueError(f"unknown attention '{attention}' for mega; choose from: {', '.join(FUNCTIONS)}")
        if position_bias not in BIASES:
            raise ValueError(
                f"unknown position_bias '{position_bias}' for mega; choose from: {', '.join(BIASES)}"
            )
        if position_bias == "rotary" and key_width % 2:
            raise ValueError(f"position_bias=rotary needs an even key_width, got {key_width}")
        width, gated = place.d_model, expansion * place.d_model
        self.attention, self.chunk, self.max_len = attention, chunk, place.max_len
        self.widths = [width, key_width, gated, width]  # update gate, shared, reset gate, candidate
        self.average = MovingAverage(width, d_state, truncation)
        self.value = nn.Linear(width, gated, bias=place.bias)
        self.hidden = nn.Linear(width, sum(self.widths), bias=place.bias)
        self.out = nn.Linear(gated, width, bias=place.bias)
        start_small(self)
        self.gain = nn.Parameter(torch.randn(2, key_width) * STD)  # g of queries, then of keys
        self.offset = nn.Parameter(torch.zeros(2, key_width))
        self.table = self.vectors = None
        if position_bias == "simple":
            self.table = nn.Parameter(torch.randn(2 * (chunk or place.max_len) - 1) * STD)  # of j - i
        else:
            self.vectors = nn.Parameter(torch.randn(2, key_width) * STD)
        self.dropout, self.act_dropout = Dropout(dropout), Dropout(act_dropout)
        self.attn_dropout = nn.Dropout(attn_dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.table is not None and self.chunk is None and x.shape[1] > self.max_len:
            raise ValueError(
                f"mega has biases for at most {self.max_len} positions and got {x.shape[1]}; raise max_len, "
                "set chunk or position_bias=rotary, or shorten the input"
            )
        moved = self.dropout(self.average(x, mask))
        update, shared, reset, candidate = self.hidden(moved).split(self.widths, dim=-1)
        shared = F.silu(shared)
        q, k = (shared * self.gain[i] + self.offset[i] for i in range(2))
        attended = mega_attention(
            q,
            k,
            self.act_dropout(F.silu(self.value(x))),
            mask,
            function=self.attention,
            table=self.table,
            vectors=self.vectors,
            chunk=self.chunk,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )
        return update.sigmoid(), F.silu(candidate + self.out(F.silu(reset) * attended))

    def claims(self, traits: Traits) -> Traits:
        """The traits of a mechanism that holds this module."""
        if self.table is not None and self.chunk is None:
            reason = "a bias is learned for every offset below max_len"
            traits = traits.but(reason, fixed_length=True)
        if self.attn_dropout.p and self.chunk is None:
            reason = "with attn_dropout all scores are kept, by torch's own kernels too on a CPU"
            traits = traits.but(reason, quadratic_memory=True)
        return traits

    def state_size(self, length: int) -> int:
        keys = length if self.chunk is None else min(length, self.chunk)
        return keys * sum(self.widths[1:3]) + self.average.alpha.numel()


def start_small(module: nn.Module) -> None:
    """Linear maps as the released code starts them: normal numbers, biases zero."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


@register("mega")
class Mega(Block):
    """The gated attention and a feed-forward, each with its norm and residual; it hands nothing on."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        key_width: int = 64,
        expansion: int = 2,
        d_state: int = 16,
        attention: str = "softmax",
        position_bias: str = "simple",
        chunk: int | None = None,
        truncation: int | None = None,
        d_ff: int | None = None,
        activation: str = "silu",
        norm: str = "layer",
        norm_stats: str = "real",
        norm_eps: float = 1e-5,
        prenorm: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        act_dropout: float = 0.0,
    ) -> None:
        super().__init__(place)
        width = place.d_model
        self.prenorm = prenorm
        self.gated = GatedAttention(
            place,
            key_width=key_width,
            expansion=expansion,
            d_state=d_state,
            attention=attention,
            position_bias=position_bias,
            chunk=chunk,
            truncation=truncation,
            dropout=dropout,
            attn_dropout=attn_dropout,
            act_dropout=act_dropout,
        )
        self.ffn = FeedForward(width, d_ff or expansion * width, activation=activation, dropout=act_dropout)
        start_small(self.ffn)
        self.norm = make_norm(norm, width, stats=norm_stats, eps=norm_eps)
        self.ffn_norm = make_norm(norm, width, stats=norm_stats, eps=norm_eps)
        self.dropout = Dropout(dropout)
        self.traits = self.gated.claims(self.traits)

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update, candidate = self.gated(self.norm(x, mask) if self.prenorm else x, mask)
        x = x + update * (self.dropout(candidate) - x)
        if self.prenorm:
            return x + self.dropout(self.ffn(self.ffn_norm(x, mask))), None
        x = self.norm(x, mask)
        return self.ffn_norm(x + self.dropout(self.ffn(x)), mask), None

    def state_size(self, length: int) -> int:
        return self.gated.state_size(length)
