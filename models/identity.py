"""No mixing: the attention place adds nothing, so tokens meet only in the pooling.

Paper    none; the floor every other row should stand above
Computes out = 0
Cost     none
Exact    yes
Padding  nothing to leak
Differs  no
"""

import torch
from torch import Tensor

from models.common import Mixer, Place, Traits, register


@register("identity")
class Identity(Mixer):
    """The residual branch of a block with nothing in its attention place; it has no parameters."""

    traits = Traits(packed=True)

    def __init__(self, place: Place) -> None:
        super().__init__(place, projections=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return torch.zeros_like(x)

    def state_size(self, length: int) -> int:
        return 0
