"""Which path of a mechanism a layout takes."""

import pytest
import torch
from torch import Tensor

from lra.layout import Packed
from models import Block, Place, Traits

PLACE = Place(d_model=2, num_heads=1, max_len=4)


class SaysWhichPath(Block):
    """Adds 1 to padded x and 2 to packed x, and hands on the sums of its sequences."""

    def forward(self, x: Tensor, mask: Tensor | None, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        return x + 1, carry + x.sum(dim=(1, 2))

    def forward_packed(
        self, x: Tensor, cu_seqlens: Tensor, max_len: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert max_len == 4
        return x + 2, carry + torch.stack([part.sum() for part in x.tensor_split(cu_seqlens[1:])[:-1]])


@pytest.mark.parametrize(("packed", "full", "added"), [(True, False, 2), (False, False, 1), (True, True, 1)])
def test_a_block_gets_packed_rows_if_it_takes_them_and_some_positions_are_padding(packed, full, added):
    block = SaysWhichPath(PLACE)
    block.traits = Traits(packed=packed)
    lengths = [4, 4] if full else [4, 1]
    x = torch.arange(2.0 * sum(lengths)).view(-1, 2)
    layout = Packed(torch.tensor([0, *lengths]).cumsum(0), len(x), 4, full)
    out, carry = layout.through(block, x, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(out, x + added)
    torch.testing.assert_close(carry, torch.stack([x[:4].sum() + 1, x[4:].sum() + 2]))


def test_a_block_that_claims_a_packed_path_and_has_none_raises():
    with pytest.raises(NotImplementedError, match="Block claims a packed path but has none"):
        Block(PLACE).forward_packed(torch.zeros(1, 2), torch.tensor([0, 1]), 1, None)
