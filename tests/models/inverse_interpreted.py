"""Compares the Triton kernels of models/landmarks.py with float64 on a CPU, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN.
Prints for each case the root mean square of the difference of the inverse and of the gradients of matrices
and norms from float64, over that of the latter; then the same of torch's products in float32. Lines that
start with "half" are those of the quick kernels.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from test_inverse_kernel import differences, matrices, quick_differences, results  # noqa: E402

from models import landmarks  # noqa: E402

SIZES = (6, 16, 33, 64)


def compiled_differences():
    call = torch.compile(landmarks.iterated_inverse, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for size in (5, 9):
        given = matrices(size, 2.0)
        pair = results(*given, 3), results(*given, 3, call)
        found += [(b - a).norm().item() for a, b in zip(*pair, strict=True)]
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    by_torch = landmarks.runs_kernels
    cases = [(size, 2.0, 6) for size in SIZES] + [(16, 2.0, 1), (33, 0.01, 6), (33, 20.0, 6)]
    for size, sharpness, num_iterations in cases:
        given = matrices(size, sharpness)
        found = []
        for runs in (lambda x: x.dtype == torch.float32, by_torch):
            landmarks.runs_kernels = runs
            found += differences(*given, num_iterations)
        print(size, sharpness, num_iterations, *(f"{x:.1e}" for x in found), flush=True)
    landmarks.runs_kernels = lambda x: x.dtype == torch.float32
    quick = [(size, 2.0, 6, 1.0) for size in (6, 33)] + [(16, 2.0, 1, 1.0), (33, 20.0, 6, 1e6)]
    for case in [*quick, (33, 3.0, 6, 1e-6), (64, 0.1, 6, 1.0), (64, 0.3, landmarks.SAFE_ITERATIONS, 1.0)]:
        size, sharpness, num_iterations, scale = case
        found = quick_differences(matrices(size, sharpness)[0], num_iterations, scale)
        print("half", size, sharpness, num_iterations, *(f"{x:.1e}" for x in found), flush=True)
    landmarks.runs_kernels = lambda x: True
    print("compiled", *compiled_differences(), flush=True)
    a, norm = matrices(6, 2.0)
    start = (a.mT / norm[..., None, None]).flatten(0, 1).requires_grad_()
    for exact in (True, False):
        arguments = a.flatten(0, 1).requires_grad_(), start, 3, exact
        torch.library.opcheck(torch.ops.lra.iterated_inverse.default, arguments)
    print("opcheck", flush=True)
