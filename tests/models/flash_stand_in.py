"""In the place of `models.softmax.flash`, on any device: explicit, and hostile where the operator promises
nothing.
"""

import torch


def segments(cu_seqlens, num_rows):
    return torch.bucketize(torch.arange(num_rows), cu_seqlens, right=True)


class Spoiled(torch.autograd.Function):
    """NaN in the gradient of some rows."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(ctx.saved_tensors[0][:, None, None], float("nan")), None


def explicit(q, k, v, cu_queries, cu_keys, max_queries, max_keys, *, dropout=0.0):
    """A softmax within each sequence, and NaN for filler rows and for queries without keys, and in the
    gradients of these and of keys without queries.
    """
    assert (
        cu_queries.dtype == cu_keys.dtype == torch.int32 and len(cu_queries) == len(cu_keys) and not dropout
    )
    if not torch.compiler.is_compiling():
        assert cu_queries.diff().max() <= max_queries and cu_keys.diff().max() <= max_keys
        assert cu_queries[-1] <= len(q) and cu_keys[-1] <= len(k)
    own, sequence = segments(cu_queries, len(q)), segments(cu_keys, len(k))
    together = (own[:, None] == sequence) & (own < len(cu_queries))[:, None]  # past the last bound is filler
    alone, unread = ~together.any(1), ~together.any(0)
    q, k, v = Spoiled.apply(q, alone), Spoiled.apply(k, unread), Spoiled.apply(v, unread)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~(together | alone[:, None]), float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).masked_fill(alone[:, None, None], float("nan"))
