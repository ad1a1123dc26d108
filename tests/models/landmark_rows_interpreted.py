"""Compares the Triton kernel of models/landmark_rows.py with float64 on a CPU, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Filler rows hold NaN. Prints a
line for each case: the largest difference of the sums and of their gradients from those of torch in float64.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from models import landmark_rows  # noqa: E402
from models.landmark_rows import LandmarkRows  # noqa: E402

LENGTHS, TINY = (300, 0, 1, 129, 5), (5, 0, 3)


def results(x, y, lengths, num_landmarks):
    leaves = [part.detach().requires_grad_() for part in (x, y)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sums = LandmarkRows.of(cu_seqlens, len(x), max(lengths), num_landmarks).sums(*leaves)
    loss = sum((part.double().sin()).sum() for part in sums)
    grads = torch.autograd.grad(loss, leaves)
    assert not any(grad[sum(lengths) :].any() for grad in grads)
    assert [grad.dtype for grad in grads] == [x.dtype, y.dtype]
    return [*sums, *grads]


def differences(dtype, lengths, heads, width, num_landmarks, call=results):
    generator = torch.Generator().manual_seed(width)
    x, y = torch.randn(2, sum(lengths) + 7, heads, width, generator=generator).to(dtype).unbind()
    x, y = x.transpose(1, 2).contiguous().transpose(1, 2), y.clone()
    exact = x.double(), y.double()
    x[sum(lengths) :] = y[sum(lengths) :] = torch.nan
    landmark_rows.runs_kernels = lambda *tensors: True
    found = call(x, y, lengths, num_landmarks)
    landmark_rows.runs_kernels = lambda *tensors: False
    expected = results(*exact, lengths, num_landmarks)
    return [(a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True)]


def compiled(x, y, lengths, num_landmarks):
    sums = LandmarkRows.sums
    LandmarkRows.sums = torch.compile(sums, fullgraph=True, dynamic=True, backend="aot_eager")
    try:
        return results(x, y, lengths, num_landmarks)
    finally:
        LandmarkRows.sums = sums


def show(name, *found):
    print(name, *(f"{x:.1e}" for x in found), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    show("float16", *differences(torch.float16, LENGTHS, 2, 32, 4))
    show("float32", *differences(torch.float32, LENGTHS, 3, 33, 64))
    show("bfloat16", *differences(torch.bfloat16, TINY, 1, 3, 2))
    show("float32", *differences(torch.float32, TINY, 2, 4, 4, compiled))
    x, y = (torch.randn(9, 2, 4).requires_grad_() for _ in range(2))
    landmarks = LandmarkRows.of(torch.tensor([0, 5, 5, 8], dtype=torch.int32), 9, 5, 3)
    rest = landmarks.bounds, landmarks.owner, landmarks.size
    torch.library.opcheck(torch.ops.lra.landmark_sums.default, (x, y, *rest))
    show("opcheck")
