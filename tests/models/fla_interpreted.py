"""Compares fla-core's Triton kernels with the torch forms on a CPU, in Triton's interpreter, without a GPU.

A script of its own, since the interpreter is chosen when Triton is imported. Prints a line for each operation
and length: the root mean square of the difference of outputs and of each gradient, over that of the torch
form.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

from models import fla_kernels, scan  # noqa: E402
from models.delta_rule import delta_rule  # noqa: E402

LENGTHS = (63, 130)
OPERATIONS = (*fla_kernels.OPERATIONS, "retention")


class Index(int):
    """A loop variable as compiled kernels have it: with a dtype to change."""

    def to(self, dtype):
        return self


def indices(*bounds):
    for i in range(*(int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)):
        yield Index(i)


def first_configuration(self, *args, **kwargs):
    """Without a GPU no configuration can be timed."""
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def inputs(operation, length):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(2, length, 2, *shape, generator=generator)

    mask = (torch.arange(length) < torch.tensor([length, length // 2])[:, None])[:, :, None, None]
    half = torch.float16 if "delta" in operation else torch.float32  # fla's delta rules refuse float32
    made = [(x * mask).to(half) for x in (draw(32), F.normalize(draw(32), dim=-1), draw(64))]
    if "delta" in operation:
        made.append((draw().sigmoid() * mask[..., 0]).to(half))
    if operation not in ("chunk_delta_rule", "retention"):
        made.append(F.logsigmoid(draw(32 if operation == "chunk_gla" else 1) + 2) * mask)
    return made, draw(64) * mask, -torch.rand(2, generator=generator)


def differences(operation, length):
    given, weight, log_gamma = inputs(operation, length)
    forms = {
        "retention": (
            lambda q, k, v: scan.decayed_attention(
                q, k, v, log_gamma[None, None, :, None].expand(1, length, -1, -1)
            ),
            lambda q, k, v: fla_kernels.decayed_attention(q, k, v, log_gamma),
        ),
        "delta": (
            lambda q, k, v, beta, g=None: delta_rule(q, k, v, beta, None if g is None else g[..., 0]),
            fla_kernels.delta_rule,
        ),
    }
    kind = "delta" if "delta" in operation else operation
    ours, theirs = forms.get(kind, (scan.decayed_attention, fla_kernels.decayed_attention))

    def run(function):
        leaves = [x.clone().requires_grad_() for x in given]
        out = function(*leaves)
        return [out, *torch.autograd.grad((out.float() * weight).sum(), leaves)]

    pairs = zip(run(ours), run(theirs), strict=True)
    return [((b - a).float().norm() / a.float().norm()).item() for a, b in pairs]


if __name__ == "__main__":
    Autotuner.run = first_configuration
    for name in fla_kernels.OPERATIONS:
        fla_kernels.operation(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = indices
    for operation in OPERATIONS:
        for length in LENGTHS:
            print(operation, length, *(f"{d:.1e}" for d in differences(operation, length)), flush=True)
