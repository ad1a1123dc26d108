"""Rows of a table by id. Compiled for a GPU, an embedding's gradient is atomic additions, which wait for each
other where a few rows have most of the ids, as letters and padding do: here they do not.
"""
# v rows of the table, t ids, d width, n chunks, c ids of a chunk

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_fp32, full_precision

SHORT = 32  # rows of a table up to which its gradient is taken by products
CHUNK = 256  # ids that one product adds up
SPREAD = 4096  # rows over which additions to a longer table are spread


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """table [v d], ids [...] int -> [... d]; on a GPU a short table gets its gradient by products, and
    additions to one that is not long are spread.
    """
    if table.is_cuda and table.shape[0] <= SHORT:
        return lookup_short(table, ids)
    if table.is_cuda and 2 * table.shape[0] <= SPREAD and not torch.are_deterministic_algorithms_enabled():
        return lookup_spread(table, ids)
    return F.embedding(ids, table)


def lookup_short(table: Tensor, ids: Tensor) -> Tensor:
    """`lookup` whose gradient, the sum of what came to all ids of a row, is a product with one-hot vectors:
    the same bits every time.
    """
    return _Lookup.apply(table, ids, False)


def lookup_spread(table: Tensor, ids: Tensor) -> Tensor:
    """`lookup` whose gradient is added up in copies of the table first, neighbours in different ones."""
    return _Lookup.apply(table, ids, True)


def sums_by_id(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """rows [t d], at least float32, ids [t] below `count` -> [count d], the sum of the rows of each id."""
    chunks = -(-ids.shape[0] // CHUNK)
    filler = chunks * CHUNK - ids.shape[0]
    if torch.compiler.is_compiling() or filler:  # uncompiled, no filler would be a copy; compiled, a branch
        ids = F.pad(ids, (0, filler), value=count)  # would make a second form
        rows = F.pad(rows, (0, 0, 0, filler))
    one_hot = ids.view(chunks, 1, CHUNK) == torch.arange(count, device=ids.device)[:, None]  # [n v c]
    with full_precision(rows):
        return torch.bmm(one_hot.to(rows.dtype), rows.view(chunks, CHUNK, rows.shape[1])).sum(0)


def sums_in_copies(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """`sums_by_id`, by additions to as many copies of each sum as there is room for, neighbours apart."""
    copies = max(1, SPREAD // count)
    place = ids * copies + torch.arange(ids.shape[0], device=ids.device) % copies
    sums = rows.new_zeros(count * copies, rows.shape[1]).index_add(0, place, rows)
    return sums.unflatten(0, (count, copies)).sum(1)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, ids: Tensor, spread: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count, ctx.spread = table.shape[0], spread
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        (rows,) = at_least_fp32(grad.reshape(-1, grad.shape[-1]))
        sums = sums_in_copies if ctx.spread else sums_by_id
        return sums(rows, ids.flatten(), ctx.count).to(grad.dtype), None, None
