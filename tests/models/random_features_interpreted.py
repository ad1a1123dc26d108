"""Compares performer by the Triton kernels of models/random_features.py with float64 on a CPU, in Triton's
interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN,
and so are filler rows, and keys and values that are not real. The interpreter multiplies float16 but not
bfloat16. Prints a line for each case: the root mean square of the difference of the output and of each
gradient from those of torch in float64, over that of the latter.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from models import performer, random_features  # noqa: E402

LENGTHS, FILLER, HEADS = (70, 0, 1, 300, 5), 9, 2


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def results(attend, leaves, features, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    out = attend(*leaves, features=features.to(wide), **options)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad((out.double() * weights).nansum(), leaves)
    assert [x.dtype for x in (out, *grads)] == [leaves[0].dtype] * 4
    return [x.double() for x in (out, *grads)]


def compared(found, expected):
    pairs = zip(found, expected, strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def packed(q, k, v, **options):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return performer.favor_attention_packed(q, k, v, cu_seqlens, max(LENGTHS), **options)


def packed_differences(dtype, r, d=5, e=5, call=packed, size=1.0, eps=1e-2, mean=0.0, **options):
    """`size` multiplies queries and keys, `mean` is added to values."""
    rows = sum(LENGTHS)
    made = draw(rows + FILLER, HEADS, 2 * d + e)  # numbers of q, k and v lie between each other
    made[..., : 2 * d] *= size
    made[..., 2 * d :] += mean
    made[rows:] = torch.nan
    leaves, features = made.to(dtype).split([d, d, e], dim=-1), draw(r, d)
    found = results(call, leaves, features, eps=eps, **options)
    assert not any(x[rows:].any() for x in found), "filler rows are not zero"
    expected = results(packed, [x.double().nan_to_num() for x in leaves], features, eps=eps, **options)
    return compared(found, expected)


def padded_differences(dtype, r, d=5):
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])

    def padded(q, k, v, hole, **options):
        k, v = (x.masked_fill(~mask[:, None, :, None], hole) for x in (k, v))
        return performer.favor_attention(q, k, v, mask, **options)

    leaves, features = draw(3, HEADS, 4, 3, d).to(dtype).unbind(-2), draw(r, d)
    found = results(padded, leaves, features, eps=1e-2, hole=torch.nan)
    exact = results(padded, [x.double() for x in leaves], features, eps=1e-2, hole=0.0)
    return compared(found, exact)


def show(name, *found):
    print(name, *(f"{x:.1e}" for x in found), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    random_features.runs_kernels = lambda *tensors: all(x.dtype != torch.float64 for x in tensors)
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    show("float32", *packed_differences(torch.float32, 80))
    show("float32", *packed_differences(torch.float32, 3, d=33, e=7, double_scaling=True))
    show("float32", *packed_differences(torch.float32, 80, call=compiled))
    show("float32", *packed_differences(torch.float32, 80, size=2.0))  # eps decides
    show("float32", *padded_differences(torch.float32, 80))
    show("float16", *packed_differences(torch.float16, 130, d=32, e=32, eps=1e-4, mean=3.0))
    show("float16", *packed_differences(torch.float16, 64, d=16, e=40, eps=1e-6, size=3.0))
    show("float16", *padded_differences(torch.float16, 16))
    q, k, v = (x.requires_grad_() for x in draw(3, sum(LENGTHS), HEADS, 5))
    real, cu_seqlens = torch.arange(len(q)) % 3 > 0, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    rest = real, draw(6, 5), cu_seqlens, 300, 1e-2, 0.25, 1e-6
    torch.library.opcheck(torch.ops.lra.feature_rows.default, (q, k, v, *rest))
    show("opcheck")
