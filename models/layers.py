"""Norms, feed-forward and dropout that the backbone and whole-block mechanisms share."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.dropout import Dropout
from models.gelu import gelu

# [... d] is [b l d] padded or [t d] packed; `real` [...] is True at real tokens, None when all are real

NORMS = ("layer", "batch", "scale", "none")
NORM_STATS = ("real", "all")
ACTIVATIONS = {"gelu": gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
FEED_FORWARDS = ("mlp", "glu", "none")
DROPOUT_KINDS = ("element", "tied")


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (arXiv 1607.06450) that takes, and needs not, the real tokens."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return super().forward(x)


class ScaleNorm(nn.Module):
    """Root-mean-square normalisation with one learned scalar (Nguyen and Salazar 2019, arXiv 1910.05895, eq.
    5).
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.scale).to(x.dtype)


class _SumOfAll(torch.autograd.Function):
    """The sum of a tensor over all processes of a run, on each of them.

    Every process takes gradients of its own share of the loss, so that of a summand is their sum too.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class BatchNorm(nn.Module):
    """Batch normalisation over tokens (arXiv 1502.03167), by default over the real ones alone.

    `stats="all"` counts padding too, as code does that calls torch's BatchNorm1d on a padded batch. Where
    several processes train on parts of a batch, its statistics are those of the whole batch.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.1, stats: str = "real") -> None:
        super().__init__()
        self.eps, self.momentum, self.stats = eps, momentum, stats
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.training:
            mean, var = self._batch_statistics(wide, real if self.stats == "real" else None)
        else:
            mean, var = self.running_mean, self.running_var
        return ((wide - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(x.dtype)

    def _batch_statistics(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        weight = None if real is None else real.reshape(-1, 1).to(rows.dtype)
        if _several_processes():
            count, mean, var = _moments_of_all(rows, weight)
        elif weight is None:
            count = rows.new_full((), rows.shape[0])
            mean = rows.mean(0)
            var = (rows - mean).square().mean(0)
        else:
            count = weight.sum().clamp_min(1)
            mean = (rows * weight).sum(0) / count
            var = ((rows - mean).square() * weight).sum(0) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * count / (count - 1).clamp_min(1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var


def _moments_of_all(rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count [], mean [d] and variance [d] of the rows [n d] of all processes; weight [n 1], None for ones."""

    def total(x: Tensor) -> Tensor:
        return x.sum(0) if weight is None else (x * weight).sum(0)

    # The count is a column of its own: Inductor would let the norms of a model share it, were it a sum beside
    # the others, and the first of them adds it up over processes in place.
    sums = _SumOfAll.apply(total(torch.cat([rows, torch.ones_like(rows[:, :1])], 1)))
    count = sums[-1].detach().clamp_min(1)
    mean = sums[:-1] / count
    return count, mean, _SumOfAll.apply(total((rows - mean).square())) / count


class NoNorm(nn.Module):
    """No normalisation."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return x


def make_norm(kind: str, width: int, *, stats: str = "real", eps: float = 1e-5) -> nn.Module:
    """A norm called as norm(x [... width], real [...] or None); kinds: layer, batch, scale, none."""
    if kind == "layer":
        return LayerNorm(width, eps=eps)
    if kind == "batch":
        return BatchNorm(width, eps=eps, stats=stats)
    if kind == "scale":
        return ScaleNorm(width, eps=eps)
    if kind == "none":
        return NoNorm()
    raise ValueError(f"unknown norm '{kind}'; choose from: {', '.join(NORMS)}")


class FeedForward(nn.Module):
    """Two linear maps around an activation, x [... d_model] -> [... d_model]; `glu` gates the hidden layer.

    With `glu` the first map is twice as wide and hidden = a * activation(g) (Shazeer 2020, arXiv 2002.05202,
    eq. 5).
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str = "gelu", glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation '{activation}'; choose from: {', '.join(ACTIVATIONS)}")
        self.activation, self.glu = ACTIVATIONS[activation], glu
        self.up = nn.Linear(d_model, 2 * d_ff if glu else d_ff)
        self.dropout = Dropout(dropout)
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.glu:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * self.activation(gate)
        else:
            hidden = self.activation(hidden)
        return self.down(self.dropout(hidden))
