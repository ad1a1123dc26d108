"""Hybrid: another mixer in each layer, as named.

Paper    none; the form in which a search over mechanisms is trained again, and usual wherever layers differ
Computes out = mixer_i(x) in layer i, mixer_i the one that `layers` names, from the first again after the last
Cost     those of its mixers
Exact    as its mixers
Padding  as its mixers
Differs  no
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from models.candidates import joined, make, refuse_idle
from models.common import Mixer, Place, register

LAYERS = ["local", "linear"]
NO_SETTINGS: dict[str, Any] = {}  # of its mixers, by name


@register("hybrid")
class Hybrid(Mixer):
    """The mixer of its layer, under that layer's name in `layers`."""

    def __init__(
        self,
        place: Place,
        *,
        layers: list[str] = LAYERS,
        settings: dict[str, Any] = NO_SETTINGS,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place, projections=False)
        if not layers:
            raise ValueError("hybrid needs the name of a mixer for its layers, got none")
        refuse_idle("hybrid", settings, layers)
        every = {
            name: make("hybrid", name, place, settings, {"attn_dropout": attn_dropout}) for name in layers
        }
        self.mixer = every[layers[place.layer_index % len(layers)]]
        claims = joined({name: every[name] for name in layers[: place.num_layers]})
        self.traits = replace(claims, packed=self.mixer.traits.packed)  # each layer lays its rows out alone

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mixer(x, mask)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self.mixer.forward_packed(x, cu_seqlens, max_len)

    def aux_loss(self) -> Tensor | None:
        return self.mixer.aux_loss()

    def training_update(self, step: int) -> None:
        self.mixer.training_update(step)

    def state_size(self, length: int) -> int | None:
        return self.mixer.state_size(length)
