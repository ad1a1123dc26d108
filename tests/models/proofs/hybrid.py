"""Hybrid: the reference of the mixer that its layer names."""

import importlib

from models import Place, build
from proofs.faults import FAULT_NAMES
from proofs.kit import Limit, distance, draw


def reference(module, x, mask=None):
    return importlib.import_module(f"proofs.{module.mixer.name}").reference(module.mixer, x, mask)


CASES = [{}, {"layers": ["softmax"]}, {"layers": ["local", "fnet"], "settings": {"local": {"window": 4}}}]


def limit_of_softmax():
    place = Place(d_model=8, num_heads=2, max_len=20)
    hybrid, softmax = build("hybrid", place, layers=["softmax"]).double(), build("softmax", place).double()
    softmax.load_state_dict(hybrid.mixer.state_dict())
    x = draw(2, 20, 8)
    return distance(softmax(x), hybrid(x))


LIMITS = [Limit("softmax in every layer is softmax", limit_of_softmax)]

NO_ORACLE = "it computes nothing itself; each of its mixers has an oracle of its own"

FAULTS = dict.fromkeys(FAULT_NAMES, "it computes nothing itself; each of its mixers is tried for it")
