"""Compares the Triton kernels of models/few_queries.py with float64 on a CPU, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN,
and so are filler rows and rows that are not real. Prints a line for each case: the root mean square of the
difference of the output and of each gradient from those of torch in float64, over that of the latter.
The interpreter multiplies float16 but not bfloat16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from few_keys_reference import explicit_queries, kept, offsets  # noqa: E402

from models import few_queries  # noqa: E402
from models.few_queries import few_queries_attention  # noqa: E402

LENGTHS, FILLER, HEADS = (300, 0, 1, 129, 5), 140, 2  # 300 rows are several parts
TINY = (5, 0, 3)


def inputs(d, e, m, lengths, real=None):
    """As a mechanism gives them: views of projections, whose rows and heads do not lie together."""
    generator = torch.Generator().manual_seed(d + m)
    made = torch.randn(sum(lengths) + FILLER, HEADS, d + e, generator=generator).half()
    made[sum(lengths) :] = torch.nan
    if real is not None:
        made[~real] = torch.nan
    slots = torch.randn(len(lengths), HEADS, d, m, generator=generator).half().permute(0, 3, 1, 2)
    return slots, *made.split([d, e], dim=-1)


def results(leaves, lengths, call, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves, **options)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad((out.double() * weights).sum(), leaves)
    assert not any(x[sum(lengths) :].any() for x in grads[1:]), "gradients of filler rows are not zero"
    assert [x.dtype for x in (out, *grads)] == [leaves[-1].dtype, *(x.dtype for x in leaves)]
    return [x.double() for x in (out, *grads)]


def compared(found, expected):
    pairs = zip(found, expected, strict=True)
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


def differences(d, e, m, lengths=LENGTHS, *, masked=False, dropout=0.0):
    real, num_rows = None, sum(lengths) + FILLER
    if masked:
        real = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)) < 0.6
        real[300:301], real[:130] = False, False  # a sequence and a part without a real row
    given = inputs(d, e, m, lengths, real)
    torch.manual_seed(3)
    seed = torch.randint(2**62, (1,)).item()
    keep = kept(seed, num_rows, HEADS, m, dropout) if dropout else None
    torch.manual_seed(3)
    bounds, options = (offsets(lengths), max(lengths)), {"real": real, "dropout": dropout}
    found = results(given, lengths, lambda *x, **own: few_queries_attention(*x, *bounds, **own), **options)
    clean, exact = [x.double().nan_to_num() for x in given], {**options, "kept": keep}
    return compared(
        found, results(clean, lengths, lambda *x, **own: explicit_queries(*x, lengths, **own), **exact)
    )


def compiled_differences():
    """With symbolic rows, through a trace of the gradients too."""
    call = torch.compile(few_queries_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for lengths in (TINY, (1, 9, 0)):
        given, bounds = inputs(5, 3, 4, lengths), (offsets(lengths), max(lengths))
        calls = [lambda *x, f=f, bounds=bounds: f(*x, *bounds) for f in (call, few_queries_attention)]
        found += compared(*(results(given, lengths, f) for f in calls))
    return found


def show(name, *found):
    print(name, *(f"{x:.1e}" for x in found), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    few_queries.runs_kernels = lambda *tensors: True
    show("float16", *differences(32, 32, 16))
    show("float16", *differences(32, 32, 16, dropout=0.3))
    show("float16", *differences(3, 20, 5, masked=True))
    show("float16", *differences(33, 40, 50, masked=True, dropout=0.1))
    show("float16", *differences(64, 16, 64))
    show("float16", *differences(4, 4, 1, TINY))
    show("compiled", *compiled_differences())
    q, k, v = (x.nan_to_num().requires_grad_() for x in inputs(3, 5, 4, TINY))
    real = torch.arange(len(k)) % 3 > 0
    rest = real, torch.tensor([5]), offsets(TINY), 5, 0.4, 0.5
    torch.library.opcheck(torch.ops.lra.few_queries.default, (q, k, v, *rest), rtol=1e-2, atol=1e-2)
    show("opcheck")
