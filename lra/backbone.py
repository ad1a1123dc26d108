"""The model around a mechanism: embedding, blocks, pooling, head. It knows mechanisms only through the
registry.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lra import registry
from lra.errors import UserError
from lra.layout import Layout
from lra.schema import BackboneConfig, ModelConfig
from models.common import Block, Mixer, Place
from models.dropout import Dropout as TokenDropout
from models.dropout import dropout
from models.layers import FeedForward, make_norm
from models.lookup import lookup

# s sequences, l padded length, t packed rows, d width; [... d] is [s l d] or [t d]

ROTARY_BASE = 10_000.0


class Embedding(nn.Module):
    """Token ids [...] or values [... c] to vectors [... d], with positions; `max_len` counts a [CLS]
    token.
    """

    def __init__(
        self, config: BackboneConfig, *, vocab_size: int | None, channels: int | None, max_len: int
    ) -> None:
        super().__init__()
        if vocab_size is not None:
            self.values = nn.Embedding(vocab_size, config.d_model)
            nn.init.normal_(self.values.weight, std=config.embedding_std)
        else:
            self.values = nn.Linear(channels, config.d_model)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Embedding(max_len, config.d_model)
            nn.init.normal_(self.positions.weight, std=config.position_std)
        elif config.positions == "sinusoidal":
            self.register_buffer("sinusoids", sinusoids(max_len, config.d_model), persistent=False)
        self.cls = nn.Parameter(torch.zeros(config.d_model)) if config.pool == "cls" else None
        self.cls_first = cls_place(config) == 0

    def forward(self, inputs: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        by_id = isinstance(self.values, nn.Embedding)
        x = (lookup(self.values.weight, inputs) if by_id else self.values(inputs)) * self.scale
        if self.cls is not None and self.cls_first:
            x, layout = layout.prepend(x, self.cls)
        if self.positions is not None:
            x = x + self.positions(layout.positions)
        elif hasattr(self, "sinusoids"):
            x = x + self.sinusoids[layout.positions].to(x.dtype)
        return x, layout


def cls_place(config: BackboneConfig) -> int:
    """The layer before which [CLS] is put in, counted from 0."""
    return config.num_layers - 1 if config.cls_layer == -1 else config.cls_layer


def sinusoids(length: int, width: int) -> Tensor:
    """Fixed position vectors [length width] (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
    table = torch.zeros(length, width, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)[:, : width // 2]
    return table.float()


class Dropout(nn.Module):
    """Dropout of residual branches: per element, or `tied`, one mask for all positions of a sequence (as S4
    does).

    `drop_path` then drops the whole branch of a sequence (stochastic depth, arXiv 1603.09382).
    """

    def __init__(self, rate: float, *, kind: str = "element", drop_path: float = 0.0) -> None:
        super().__init__()
        self.rate, self.kind, self.drop_path = rate, kind, drop_path

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if not self.training:
            return x
        if self.rate and self.kind == "element":
            x = dropout(x, self.rate)
        elif self.rate:
            x = x * layout.per_sequence(F.dropout(x.new_ones(layout.num_sequences, x.shape[-1]), self.rate))
        if self.drop_path:
            x = x * layout.per_sequence(F.dropout(x.new_ones(layout.num_sequences, 1), self.drop_path))
        return x


class StandardBlock(nn.Module):
    """A mixer and a feed-forward, each with a residual and a norm before (`prenorm`) or after it."""

    def __init__(self, mixer: Mixer, config: BackboneConfig) -> None:
        super().__init__()
        self.mixer = mixer
        self.prenorm = config.prenorm

        def norm() -> nn.Module:
            return make_norm(config.norm, config.d_model, stats=config.norm_stats, eps=config.norm_eps)

        self.mixer_norm = norm()
        self.dropout = Dropout(config.dropout, kind=config.dropout_kind, drop_path=config.drop_path)
        self.ffn = None
        if config.ffn != "none":
            self.ffn_norm = norm()
            self.ffn = FeedForward(
                config.d_model,
                config.d_ff,
                activation=config.activation,
                glu=config.ffn == "glu",
                dropout=config.inner_dropout,
            )

    def forward(self, x: Tensor, layout: Layout, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        real = layout.real
        mixed = layout.mix(self.mixer, self.mixer_norm(x, real) if self.prenorm else x)
        x = x + self.dropout(mixed, layout)
        x = x if self.prenorm else self.mixer_norm(x, real)
        if self.ffn is not None:
            x = x + self.dropout(self.ffn(self.ffn_norm(x, real) if self.prenorm else x), layout)
            x = x if self.prenorm else self.ffn_norm(x, real)
        return x, carry


class WholeBlock(nn.Module):
    """A mechanism that is a whole layer by itself."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, layout: Layout, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return layout.through(self.block, x, carry)


class Head(nn.Module):
    """Pooled vectors [s d] to logits [b num_classes]; two documents a row are joined by `pair` first.

    pair: concat [e1; e2], swapped [e2; e1], nli [e1; e2; e1*e2; e1-e2].
    """

    def __init__(self, config: BackboneConfig, *, num_classes: int, documents: int) -> None:
        super().__init__()
        self.pair = config.pair if documents == 2 else None
        width = config.d_model * {None: 1, "concat": 2, "swapped": 2, "nli": 4}[self.pair]
        layers: list[nn.Module] = []
        for hidden in config.head_widths:
            layers += [nn.Linear(width, hidden), {"relu": nn.ReLU, "gelu": nn.GELU}[config.head_activation]()]
            layers += [nn.Dropout(config.head_dropout)] if config.head_dropout else []
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes, bias=config.head_bias))

    def forward(self, pooled: Tensor) -> Tensor:
        if self.pair is not None:
            first, second = pooled[0::2], pooled[1::2]
            pooled = torch.cat(
                {
                    "concat": [first, second],
                    "swapped": [second, first],
                    "nli": [first, second, first * second, first - second],
                }[self.pair],
                dim=-1,
            )
        return self.layers(pooled)


class Backbone(nn.Module):
    """A stack of one mechanism with an embedding before and a classifier after it.

    forward(inputs, layout) -> logits [b num_classes]; inputs are ids [s l] or [t], or values with a last
    axis of channels. `padded_length` is the length that padded rows have, without [CLS]. `recompute` keeps
    the inputs of each layer alone for the backward pass, which runs the layer again (arXiv 1604.06174); what
    the layer writes into its buffers is written once.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        num_classes: int,
        padded_length: int,
        vocab_size: int | None = None,
        channels: int | None = None,
        documents: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        config = model.backbone
        self.config, self.recompute = config, recompute
        self.padded_length = padded_length
        max_len = padded_length + (config.pool == "cls")
        self.embedding = Embedding(config, vocab_size=vocab_size, channels=channels, max_len=max_len)
        self.embedding_dropout = TokenDropout(config.input_dropout)
        shared: dict = {}
        distinct = 1 if config.tied_layers else config.num_layers
        self.layers = nn.ModuleList()
        for index in range(distinct):
            place = Place(
                d_model=config.d_model,
                num_heads=config.num_heads,
                max_len=max_len,
                layer_index=index,
                num_layers=config.num_layers,
                shared=shared,
                d_head=config.d_head,
                bias=config.bias,
                rotary_base=ROTARY_BASE if config.positions == "rotary" else None,
            )
            mechanism = registry.build(model, place)
            if config.positions == "rotary" and not hasattr(mechanism, "qkv"):
                raise UserError(
                    f"positions 'rotary' with model '{model.name}', whose queries and keys do not rotate; "
                    "use model.positions=learned, sinusoidal or none"
                )
            whole = isinstance(mechanism, Block)
            self.layers.append(WholeBlock(mechanism) if whole else StandardBlock(mechanism, config))
        self.norm = make_norm(
            config.norm if config.final_norm else "none",
            config.d_model,
            stats=config.norm_stats,
            eps=config.norm_eps,
        )
        self.head = Head(config, num_classes=num_classes, documents=documents)
        initialise(self, config.init)

    def mechanisms(self) -> list[Mixer | Block]:
        """One per distinct layer, first to last."""
        return [layer.block if isinstance(layer, WholeBlock) else layer.mixer for layer in self.layers]

    def forward(self, inputs: Tensor, layout: Layout) -> Tensor:
        config = self.config
        x, layout = self.embedding(inputs, layout)
        x = self.embedding_dropout(x)
        first = self.mechanisms()[0]
        carry = first.init_carry(layout.num_sequences) if isinstance(first, Block) else None
        for index in range(config.num_layers):
            if self.embedding.cls is not None and index and index == cls_place(config):
                x, layout = layout.prepend(x, self.embedding.cls)
            layer = self.layers[0 if config.tied_layers else index]
            if self.recompute and self.training and torch.is_grad_enabled():
                x, carry = _recomputed(layer, x, layout, carry)
            else:
                x, carry = layer(x, layout, carry)
        x = self.norm(x, layout.real)
        return self.head(layout.pool(x, config.pool))

    def aux_loss(self) -> Tensor | None:
        total = None
        for mechanism in self.mechanisms():
            loss = mechanism.aux_loss()
            if loss is not None:
                total = loss if total is None else total + loss
        return total

    def training_update(self, step: int) -> None:
        for mechanism in self.mechanisms():
            mechanism.training_update(step)


def _recomputed(layer: nn.Module, *inputs):
    """`layer(*inputs)`, which runs again in the backward pass; that leaves its buffers as the first run did.

    Compiled code runs it again without writing buffers, and takes no context.
    """
    if torch.compiler.is_compiling():
        return checkpoint(layer, *inputs, use_reentrant=False)

    def contexts():
        return nullcontext(), _buffers_put_back(layer)

    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _buffers_put_back(module: nn.Module) -> Iterator[None]:
    """What is written into buffers inside, as running statistics, is undone at the end."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, kept in before:
                if buffer._version != version:
                    buffer.copy_(kept)


@torch.no_grad()
def initialise(model: nn.Module, kind: str) -> None:
    """`torch`: leave the layers' own initialisation; `xavier`, `normal` (std 0.02): linear maps, zero
    biases.
    """
    if kind == "torch":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if kind == "xavier":
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.zero_()
