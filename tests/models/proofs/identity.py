"""No mixing: zeros."""

import torch

from proofs.faults import FAULT_NAMES


def reference(module, x, mask=None):
    return torch.zeros_like(x)


CASES = [{}]

NO_LIMIT = "its output is zero, and no softmax attention is"

NO_ORACLE = "there is nothing in it that a package could hold"

FAULTS = dict.fromkeys(FAULT_NAMES, "its output is zero whatever its input")
