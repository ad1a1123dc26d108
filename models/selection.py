"""What mechanisms that choose tokens share: choices in full precision, random directions, moved rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Mixer, at_least_fp32, full_precision, rotate

# b batch, h heads, l length, d head dim, s slots that tokens are moved to

POSITIONS = 2**32  # more than any sequence has


class ChoosingMixer(Mixer):
    """A q/k/v mechanism that gets queries and keys in at least float32, values in the precision of the run.

    A choice among tokens made from rounded queries would be another choice, and with it another output.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        inner = self.place.num_heads * self.place.head_dim
        q, k = (self.heads(exact_linear(self.qkv, x, part * inner, inner)) for part in (0, 1))
        v = self.heads(some_rows(self.qkv, x, 2 * inner, inner))
        mixed = self.attend(self.turned(q), self.turned(k), v, mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """[b l h*d] -> [b h l d]"""
        return x.unflatten(-1, (self.place.num_heads, -1)).transpose(1, 2)

    def turned(self, x: Tensor) -> Tensor:
        """x [b h l d] rotated by position, where the place asks for it."""
        if self.place.rotary_base is None:
            return x
        return rotate(x, torch.arange(x.shape[-2], device=x.device), base=self.place.rotary_base)


class HashingMixer(ChoosingMixer):
    """A mechanism with random `directions`: in evaluation those of a seed, in training drawn anew.

    They are decided by seed, layer and step alone, hold values that bfloat16 has, so that a model converted
    to it hashes alike, and are not saved: a resumed run draws them again.
    """

    def draw_directions(self, *shape: int, seed: int, redraw_every: int) -> None:
        self.shape, self.hash_seed, self.redraw_every, self.drawn = shape, seed, redraw_every, 1
        self.register_buffer("fixed_directions", self.draw(0), persistent=False)
        if redraw_every:
            self.register_buffer("drawn_directions", self.draw(1), persistent=False)

    def draw(self, index: int) -> Tensor:
        seed = (self.hash_seed * 1_000_003 + self.place.layer_index) * 1_000_003 + index
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randn(self.shape, generator=generator).bfloat16().float()

    @property
    def directions(self) -> Tensor:
        return self.drawn_directions if self.training and self.redraw_every else self.fixed_directions

    def training_update(self, step: int) -> None:
        if self.redraw_every and self.drawn != (index := 1 + step // self.redraw_every):
            self.drawn_directions.copy_(self.draw(index))
            self.drawn = index


def some_rows(linear: nn.Linear, x: Tensor, start: int, count: int) -> Tensor:
    """The outputs start to start + count of a linear map."""
    bias = None if linear.bias is None else linear.bias[start : start + count]
    return F.linear(x, linear.weight[start : start + count], bias)


def exact_linear(linear: nn.Linear, x: Tensor, start: int, count: int) -> Tensor:
    """`some_rows` in at least float32, under autocast too."""
    (weight,) = at_least_fp32(linear.weight[start : start + count])
    bias = None if linear.bias is None else linear.bias[start : start + count].to(weight.dtype)
    with full_precision(x):
        return F.linear(x.to(weight.dtype), weight, bias)


def check_hashing(name: str, hash_seed: int, redraw_every: int) -> None:
    if hash_seed < 0 or redraw_every < 0:
        raise ValueError(
            f"{name} needs hash_seed >= 0 and redraw_every >= 0 (0: never); "
            f"got hash_seed={hash_seed}, redraw_every={redraw_every}"
        )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [b h l d], index [b h ...] int64 -> [b h ... d], rows of the same sequence and head."""
    rows = x.reshape(-1, x.shape[-1]).index_select(0, (_first(x, index) + index).flatten())
    return rows.view(*index.shape, -1)


def add_rows(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """The transpose of `take_rows`: rows [b h s d] added up at index [b h s] -> [b h length d].

    Equal calls give equal bits: on a GPU rows are sorted before they are added.
    """
    out = rows.new_zeros(*rows.shape[:2], length, rows.shape[-1])
    where = (_first(out, index) + index).flatten()
    out, rows = out.flatten(0, 2), rows.flatten(0, 2)
    if out.is_cuda:
        out = out.index_put((where,), rows, accumulate=True)
    else:
        out = out.index_add(0, where, rows)
    return out.unflatten(0, (*index.shape[:2], length))


def _first(x: Tensor, index: Tensor) -> Tensor:
    """Where the rows of each sequence and head begin among all rows of x [b h l d]."""
    b, h, length, _ = x.shape
    return torch.arange(b * h, device=x.device).view(b, h, *[1] * (index.dim() - 2)) * length


class _Move(torch.autograd.Function):
    """Rows by index; the gradient comes back by the inverse index, without sums in a random order."""

    @staticmethod
    def forward(ctx, x, index, back, keep):  # [b h l d], [b h r s], [b h r l], [b h r l] -> [b h r s d]
        ctx.save_for_backward(back, keep)
        return take_rows(x, index)

    @staticmethod
    def backward(ctx, grad):
        back, keep = ctx.saved_tensors
        rows = take_rows(grad.flatten(1, 2), back.flatten(1, 2)).unflatten(1, back.shape[1:3])
        if keep is not None:
            rows = rows * keep.unsqueeze(-1)
        return rows.sum(dim=2), None, None, None


def move(x: Tensor, order: Tensor, slot: Tensor) -> Tensor:
    """Tokens to slots, r times over: x [b h l d], order [b h r s], slot [b h r l] -> [b h r s d].

    Token l is in slot[l], and slot s holds token order[s]. What is computed at further slots, which hold
    copies of any token, must reach nothing.
    """
    return _Move.apply(x, order, slot, None)


def move_back(x: Tensor, order: Tensor, slot: Tensor, used: Tensor) -> Tensor:
    """Slots to tokens: [b h r s d] -> [b h r l d]; used: bool, False at further slots."""
    used = used.expand(order.shape)
    order, slot, used = (i.flatten(1, 2).unsqueeze(2) for i in (order, slot, used))
    return _Move.apply(x.flatten(1, 2), slot, order, used).squeeze(2).unflatten(1, x.shape[1:3])


@torch.no_grad()
def largest(scores: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores among real positions: scores [... l], real broadcastable to it
    -> positions [... count] int64 and whether each is real.

    Compared in float32; of equal scores the earlier position is larger, so that padding decides nothing.
    """
    bits = scores.float().contiguous().view(torch.int32)
    ranked = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the floats are
    position = torch.arange(scores.shape[-1], device=scores.device)
    lowest = torch.iinfo(torch.int64).min
    keys = ranked.long().mul_(POSITIONS).add_(POSITIONS - 1 - position)  # one number for both comparisons
    best = keys.masked_fill_(~real, lowest).topk(count, dim=-1).values
    found = best != lowest
    return (POSITIONS - 1 - (best & (POSITIONS - 1))) * found, found
