"""Compares performer by the Triton kernels of models/exponentials.py with float64 on a CPU, in Triton's
interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN.
Prints a line for each case: the root mean square of the difference of the output and of each gradient from
those of torch in float64, over that of the latter.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from models import exponentials, linear_rows, performer, row_products, sums  # noqa: E402

LENGTHS, FILLER, HEADS = (70, 0, 1, 65), 9, 2


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def results(attend, leaves, dtype, features):
    leaves = [x.to(dtype).detach().requires_grad_() for x in leaves]
    out = attend(*leaves, features=features.to(torch.promote_types(dtype, torch.float32)), eps=1e-2)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [x.double() for x in (out, *torch.autograd.grad((out.double() * weights).sum(), leaves))]


def differences(attend, shape, dtype, num_features, call=None, d=5):
    made = draw(*shape, 3, d).to(dtype)  # numbers of q, k and v lie between each other
    leaves, features = made.unbind(-2), draw(num_features, d)
    found = results(call or attend, leaves, dtype, features)
    expected = results(attend, leaves, torch.float64, features)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def packed(q, k, v, **options):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return performer.favor_attention_packed(q, k, v, cu_seqlens, max(LENGTHS), **options)


def padded(q, k, v, **options):
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    k = k.masked_fill(~mask[:, None, :, None], 100.0)  # its features would be infinite
    return performer.favor_attention(q, k, v, mask, **options)


def show(name, *found):
    print(name, *(f"{x:.1e}" for x in found), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for module in (row_products, exponentials, linear_rows, sums):
        module.runs_kernels = lambda *tensors: all(x.dtype != torch.float64 for x in tensors)
    rows = sum(LENGTHS) + FILLER, HEADS
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    show("float32", *differences(packed, rows, torch.float32, 80))
    show("float32", *differences(packed, rows, torch.float32, 3, d=33))
    show("float32", *differences(packed, rows, torch.float32, 80, call=compiled))
    show("float16", *differences(packed, rows, torch.float16, 130))
    show("float32", *differences(padded, (3, HEADS, 4), torch.float32, 80))
    show("bfloat16", *differences(padded, (3, HEADS, 4), torch.bfloat16, 16))
    x, features, offset = draw(7, 2, 5).requires_grad_(), draw(6, 5), draw(7, 2).requires_grad_()
    torch.library.opcheck(torch.ops.lra.row_exponentials.default, (x, features, offset, 1e-2))
    torch.library.opcheck(torch.ops.lra.row_top.default, (x, features))
    tied = torch.ones(1, 1, 2, requires_grad=True)
    top, _ = torch.ops.lra.row_top(tied, torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, -2.0]]))
    (grad,) = torch.autograd.grad(top.sum(), tied)
    show("float32", (grad - 1).abs().max().item())  # as amax: shared evenly between the three largest
