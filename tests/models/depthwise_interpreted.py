"""Compares the Triton kernels of models/depthwise.py with float64 on a CPU, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported; it has no products of bfloat16.
Memory that nobody wrote is NaN, and so are filler rows. Prints a line for each case: the root mean square of
the difference of the output and of each gradient from those of torch in float64, over that of the latter.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from test_depthwise import bounds, draw_rows, row_results  # noqa: E402

from models import depthwise  # noqa: E402
from models.kernels import depthwise as kernels  # noqa: E402

LENGTHS, TINY = (300, 0, 1, 129, 33), (5, 0, 70)


def differences(dtype, num_taps, width, lengths, call=depthwise.conv_rows, added=True):
    given = [x.to(dtype) for x in draw_rows(lengths, num_taps, width)]
    given[1] = given[1].to(torch.float32)
    real = sum(lengths)
    spoiled = [given[0].clone(), given[1], given[2]]
    spoiled[0][real:] = torch.nan
    found = row_results(call, spoiled, lengths, added)
    assert not found[0][real:].any() and not found[1][real:].any()
    expected = row_results(depthwise.conv_rows, [x.double() for x in given], lengths, added)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def show(name, *found):
    print(name, *(f"{x:.1e}" for x in found), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    depthwise.runs_kernels = lambda *tensors: True
    show("float16", *differences(torch.float16, 35, 32, LENGTHS))
    show("float16", *differences(torch.float16, 35, 32, LENGTHS, added=False))
    kernels.PROGRAMS, before = 3, kernels.PROGRAMS  # each adds up several parts
    show("float16", *differences(torch.float16, 35, 32, LENGTHS))
    kernels.PROGRAMS = before
    show("float16", *differences(torch.float16, 65, 33, TINY))
    show("float16", *differences(torch.float16, 1, 3, TINY))
    compiled = torch.compile(depthwise.conv_rows, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (TINY, (3, 9, 0, 66)):
        show("float16", *differences(torch.float16, 5, 4, lengths, compiled))
    v, taps, base = (x.float() for x in draw_rows(TINY, 5, 4))
    bands = depthwise.band(taps, depthwise.BLOCK).requires_grad_()
    rows = [x.half().requires_grad_() for x in (v, base)]
    torch.library.opcheck(torch.ops.lra.band_rows.default, (bands, *rows, bounds(TINY), max(TINY)))
    show("opcheck")
