"""Why each mechanism can be trusted: one file each, named as the mechanism, found by being here.

A proof has
    reference(module, x, mask=None[, carry])   the mechanism again in float64, row by row, from its formula
    CASES     arguments of the constructor under which mechanism and reference are compared
    LIMITS    cases in which it equals softmax or the dense kernel; `NO_LIMIT` says why there is none
    ORACLES   independent public implementations; `NO_ORACLE` says why there is none
    FAULTS    how each of five classical mistakes is planted, or why it cannot be made
and shares no helper with the mechanism.
"""

import importlib
import pkgutil

SUPPORT = ("kit", "faults")

PROOFS = {
    module.name: importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name not in SUPPORT
}


def cases(name):
    return getattr(PROOFS.get(name), "CASES", [{}])
