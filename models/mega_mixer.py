"""Mega in the attention place of the standard block: the gated attention of `mega` without norm and residual.

Paper    Ma et al. 2023, arXiv 2209.10655, section 3
Computes u * (h - x), with the update gate u and the candidate h of models/mega.py, so that the standard block
         with its norms after the residuals (prenorm=False) is x + u * (h - x): Mega's own equation
Cost     as `mega`: time O(L^2 D + L log L D), memory O(L D); with chunks of c O(L c D) and O(L c)
Exact    no; its attention is softmax attention where it is that function without a bias
Padding  as `mega`: x is zero there before the average, keys are masked and the real ones counted
Differs  with prenorm=True the gate weighs h against the normed x, which the paper does not (`mega` has x
         itself there); dropout of the candidate is that of the standard block, on the gated difference;
         else as `mega`
"""

from torch import Tensor

from models.common import Mixer, Place, Traits, register
from models.mega import GatedAttention


@register("mega_mixer")
class MegaMixer(Mixer):
    """What `mega` adds to x before its norm."""

    traits = Traits(uses_order=True)

    def __init__(
        self,
        place: Place,
        *,
        key_width: int = 64,
        expansion: int = 2,
        d_state: int = 16,
        attention: str = "softmax",
        position_bias: str = "simple",
        chunk: int | None = None,
        truncation: int | None = None,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        act_dropout: float = 0.0,
    ) -> None:
        super().__init__(place, projections=False)
        self.gated = GatedAttention(
            place,
            key_width=key_width,
            expansion=expansion,
            d_state=d_state,
            attention=attention,
            position_bias=position_bias,
            chunk=chunk,
            truncation=truncation,
            dropout=dropout,
            attn_dropout=attn_dropout,
            act_dropout=act_dropout,
        )
        self.traits = self.gated.claims(self.traits)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        update, candidate = self.gated(x, mask)
        return update * (candidate - x)

    def state_size(self, length: int) -> int:
        return self.gated.state_size(length)
