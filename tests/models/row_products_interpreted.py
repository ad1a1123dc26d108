"""Compares the Triton kernels of models/row_products.py with float64 on a CPU, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN,
and so are filler rows. Prints a line for each operation, dtype and width: the root mean square of the
difference of outputs and of each gradient from those of torch's products in float64, over that of the latter.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from models import row_products  # noqa: E402

LENGTHS, FILLER, HEADS = (300, 0, 1, 129, 5), 70, 2
WIDTHS = ((32, 32), (33, 3), (3, 130), (130, 1))
SMALL = ((3, 16), (300, 80))  # lengths up to 5: widths that need many programs
DTYPES = {
    "float32": [torch.float32] * 2,
    "float16": [torch.float16] * 2,
    "mixed": [torch.bfloat16, torch.float32],
}
OPERATIONS = (row_products.linear_sums, row_products.row_sums, row_products.row_apply)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(operation, d, e, dtypes, lengths):
    """As a mechanism gives them: views whose rows and heads do not lie next to each other."""
    generator = torch.Generator().manual_seed(d)
    real, first, second = sum(lengths), dtypes[0], dtypes[1]

    def rows(width, dtype):
        made = torch.randn(real + FILLER, 3, HEADS, width, generator=generator).to(dtype)
        made[real:] = torch.nan
        return made[:, 1]

    state = torch.randn(len(lengths), HEADS, e, d, generator=generator).mT
    return {
        "linear_sums": lambda: [rows(d, first), rows(d, second), rows(e, first)],
        "row_sums": lambda: [rows(d, first), rows(e, second).transpose(0, 1).contiguous().transpose(0, 1)],
        "row_apply": lambda: [rows(d, first), state.to(second)],
    }[operation.__name__]()


def results(operation, leaves, lengths, call=None):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = (call or operation)(*leaves, offsets(lengths), max(lengths))
    out = out if isinstance(out, tuple) else (out,)
    real = sum(lengths)
    total = 0
    for i, x in enumerate(out):
        if x.shape[0] == real + FILLER:
            assert not x[real:].any(), "filler rows are not zero"
            x = x[:real]
        total = total + (x.double() * torch.linspace(-1, 1 + i, x.numel()).view_as(x)).sum()
    grads = torch.autograd.grad(total, leaves)
    for x in grads:
        assert x.shape[0] == len(lengths) or not x[real:].any(), "gradients of filler rows are not zero"
    assert [x.dtype for x in grads] == [x.dtype for x in leaves]
    return [x.double() for x in (*out, *grads)]


def differences(operation, d, e, dtypes, lengths):
    given = inputs(operation, d, e, dtypes, lengths)
    row_products.runs_kernels = lambda *tensors: tensors[0].dtype != torch.float64
    found = results(operation, given, lengths)
    expected = results(operation, [x.double() for x in given], lengths)
    return [((b - a).norm() / a.norm().clamp_min(1e-30)).item() for a, b in zip(expected, found, strict=True)]


def compiled_differences(operation):
    """With symbolic rows, through a trace of the gradients too."""
    call = torch.compile(operation, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for lengths in ((5, 0, 2), (1, 9, 0, 4)):
        given = inputs(operation, 5, 3, DTYPES["float32"], lengths)
        pair = results(operation, given, lengths), results(operation, given, lengths, call)
        found += [(b - a).norm().item() for a, b in zip(*pair, strict=True)]
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    cases = [(w, LENGTHS) for w in WIDTHS] + [(w, (5, 0, 3)) for w in SMALL]
    for operation in OPERATIONS:
        for name, dtypes in DTYPES.items():
            for (d, e), lengths in cases if name == "float32" else cases[:2]:
                found = differences(operation, d, e, dtypes, lengths)
                print(operation.__name__, name, d, e, *(f"{x:.1e}" for x in found), flush=True)
        print(operation.__name__, "compiled", 5, 3, *compiled_differences(operation), flush=True)
    for name in ("row_sums", "row_apply", "linear_sums"):
        given = inputs(getattr(row_products, name), 3, 5, DTYPES["float32"], (5, 0, 3))
        given = [x.nan_to_num().requires_grad_() for x in given]
        torch.library.opcheck(getattr(torch.ops.lra, name).default, (*given, offsets((5, 0, 3)), 5))
        print(name, "opcheck", 3, 5, flush=True)
