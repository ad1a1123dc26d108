"""Compares the Triton kernels of models/linear_rows.py with float64 on a CPU, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN,
and so are filler rows and those that are not real. Prints a line for each case: the root mean square of the
difference of the output and of each gradient from those of torch in float64, over that of the latter.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from models import row_products, sums  # noqa: E402
from models.linear_rows import normalised_sums  # noqa: E402

LENGTHS, FILLER, HEADS = (300, 0, 1, 129, 5), 70, 2
TINY = (5, 0, 3)
KERNELS = lambda *tensors: tensors[0].dtype != torch.float64  # noqa: E731


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(d, e, dtype, lengths):
    """As a mechanism gives them: views of one projection, whose rows and heads do not lie together."""
    generator = torch.Generator().manual_seed(d)
    real = sum(lengths)
    made = torch.randn(real + FILLER, HEADS, 2 * d + e, generator=generator).to(dtype)
    made[real:] = torch.nan
    return made.split([d, d, e], dim=-1)


def results(leaves, lengths, call=normalised_sums, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves, offsets(lengths), max(lengths), **options)
    real = sum(lengths)
    assert not out[real:].any(), "filler rows are not zero"
    out = out[:real]
    grads = torch.autograd.grad((out.double() * weights(out)).sum(), leaves)
    assert not any(x[real:].any() for x in grads), "gradients of filler rows are not zero"
    assert [x.dtype for x in (out, *grads)] == [leaves[-1].dtype, *(x.dtype for x in leaves)]
    return [x.double() for x in (out, *grads)]


def weights(out):
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)


def compared(found, expected):
    pairs = zip(found, expected, strict=True)
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


def differences(d, e, dtype, lengths, masked=False, **options):
    given, exact = inputs(d, e, dtype, lengths), {}
    if masked:
        real = torch.rand(given[0].shape[0], generator=torch.Generator().manual_seed(1)) < 0.6
        real[300:301] = False  # a sequence without a real row
        options, exact = {"real": real, **options}, {"real": real}
    if options.get("feature", "none") == "none":
        given = [given[0].abs(), given[1].abs(), given[2]]  # so that no normaliser is near zero
    found = results(given, lengths, **options)
    return compared(found, results([x.double().nan_to_num() for x in given], lengths, **{**options, **exact}))


def padded_differences():
    """With a mask that is no prefix, whose padded keys and values hold NaN where the kernels compute."""
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    given = [x.unflatten(0, (2, -1)).transpose(1, 2) for x in inputs(32, 32, torch.float16, (80 - FILLER,))]
    given = [x.nan_to_num() for x in given]
    found = []
    for dtype in (torch.float16, torch.float64):
        hidden = ~mask[:, None, :, None] & (dtype == torch.float16)
        holes = [given[0], *(x.masked_fill(hidden, torch.nan) for x in given[1:])]
        leaves = [x.to(dtype).detach().requires_grad_() for x in holes]
        out = sums.kernel_attention(*leaves, mask, eps=1e-6, feature="elu")
        grads = torch.autograd.grad((out.double() * weights(out)).sum(), leaves)
        found.append([x.double() for x in (out, *grads)])
    return compared(*found)


def compiled_differences():
    """With symbolic rows, through a trace of the gradients too."""
    call = torch.compile(normalised_sums, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for lengths in (TINY, (1, 9, 0, 4)):
        given = inputs(5, 3, torch.float32, lengths)
        pair = [results(given, lengths, f, eps=1e-6, feature="elu") for f in (call, normalised_sums)]
        found += compared(*pair)
    return found


def matrix_differences(shape):
    x = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(3))
    matrix = torch.randn(80, 5, generator=torch.Generator().manual_seed(4))
    call = torch.compile(row_products.matrix_rows, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for f, dtype in [(call, torch.float32), (row_products.matrix_rows, torch.float64)]:
        leaf = x.to(dtype).requires_grad_()
        out = f(leaf, matrix.to(dtype))
        found.append([out.double(), *torch.autograd.grad((out * weights(out)).sum(), leaf)])
    return compared(*found)


def show(name, *found):
    print(name, *(f"{x:.1e}" for x in found), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    row_products.runs_kernels = KERNELS
    for module in ("models.linear_rows", "models.sums"):
        __import__(module, fromlist=["_"]).runs_kernels = KERNELS
    elu = {"eps": 1e-6, "feature": "elu"}
    show("float32", *differences(32, 32, torch.float32, LENGTHS, **elu))
    show("float32", *differences(33, 3, torch.float32, LENGTHS, masked=True, **elu))
    show("float32", *differences(3, 64, torch.float32, TINY, eps=1e-6))
    show("float32", *differences(4, 4, torch.float32, TINY, eps=6.0))  # the floor holds for some rows alone
    show("float32", *differences(4, 4, torch.float32, TINY, **elu | {"eps": 0.5, "add_eps": True}))
    show("float16", *differences(32, 32, torch.float16, LENGTHS, **elu))
    show("bfloat16", *differences(16, 32, torch.bfloat16, LENGTHS, masked=True, **elu))
    show("float16", *padded_differences())
    show("compiled", *compiled_differences())
    show("float32", *matrix_differences((7, 2)))
    show("float32", *matrix_differences((2, 3, 4)))
    q, k, v = (x.nan_to_num().requires_grad_() for x in inputs(3, 5, torch.float32, TINY))
    real = torch.arange(len(q)) % 3 > 0
    rest = offsets(TINY), 5, "elu", 1e-6, False
    torch.library.opcheck(torch.ops.lra.linear_rows.default, (q, k, v, real, *rest))
    show("opcheck")
