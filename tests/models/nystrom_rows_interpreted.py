"""Compares nystrom's path by kernels for rows with explicit scores in float64, in Triton's interpreter.

A script of its own, since the interpreter is chosen when Triton is imported. Memory that nobody wrote is NaN,
and so are filler rows. Prints a line for each case: the root mean square of the difference of the output and
of the gradients of queries, keys, values and taps, over that of what they should be.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from models import depthwise, few_keys, few_queries, landmark_rows, landmarks, nystrom  # noqa: E402
from models.packed import pad_packed  # noqa: E402

LENGTHS, MAX_LEN, FILLER = (90, 0, 1, 100, 37), 100, 70
REAL = sum(LENGTHS)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def by_rows(q, k, v, taps, **options):
    return nystrom.nystrom_rows(q, k, v, CU_SEQLENS, MAX_LEN, conv_weight=taps, **options)[:REAL]


def by_explicit_scores(q, k, v, taps, **options):
    padded, mask = pad_packed(torch.stack([q, k, v]).transpose(0, 1), CU_SEQLENS, MAX_LEN)
    q, k, v = (x.transpose(1, 2) for x in padded.unbind(2))
    return nystrom.nystrom_attention(q, k, v, mask, conv_weight=taps, **options).transpose(1, 2)[mask]


def results(call, *given, **options):
    leaves = [x.detach().requires_grad_() for x in given]
    out = call(*leaves, **options)
    weight = torch.linspace(-9, 9, out.numel(), dtype=torch.float64).view_as(out).sin()
    grads = torch.autograd.grad((out.double() * weight).sum(), leaves)
    assert not any(grad[REAL:].any() for grad in grads[:3]), "gradients of filler rows are not zero"
    assert [x.dtype for x in grads] == [x.dtype for x in given]
    return [x.double() for x in (out, *(grad[:REAL] for grad in grads))]


def differences(sharpness, **options):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(3, REAL + FILLER, 2, 16, generator=generator)
    made[:2] *= sharpness
    made, taps = made.half(), torch.randn(2, 1, 35, 1, generator=generator)
    expected = results(by_explicit_scores, *made.double(), taps.double(), **options)
    made[:, REAL:] = torch.nan
    found = results(by_rows, *made, taps, **options)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for module in (depthwise, few_keys, few_queries, landmark_rows, landmarks):
        module.runs_kernels = lambda *tensors: tensors[0].dtype != torch.float64
    for sharpness, options in [(1.0, {}), (3.0, {"count_padding": True}), (2.0, {"coupled_start": True})]:
        found = differences(sharpness, num_landmarks=16, **options)
        print("float16", *(f"{x:.1e}" for x in found), flush=True)
