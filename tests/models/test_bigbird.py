"""BigBird: its random blocks, its last block, and that short rows are no special case."""

from itertools import combinations

import pytest
import torch

from models import Place, build
from models.bigbird import bigbird_attention, random_blocks

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def draws_of(num_blocks, num_random=3, heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**31, (heads, num_blocks, num_random), generator=generator)


def layer(max_len=400, **own):
    return build("bigbird", Place(d_model=8, num_heads=2, max_len=max_len), **own)


def chosen(draws, num_blocks, within=None):
    """{query block: blocks found} of one row and head."""
    table, found = random_blocks(draws, torch.tensor([num_blocks]), within)
    return [table[0, 0, i][found[0, 0, i]].tolist() for i in range(num_blocks)]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 6, 7, 8, 30])
def test_random_blocks_are_different_and_neither_near_nor_global(num_blocks):
    for i, blocks in enumerate(chosen(draws_of(num_blocks, num_random=4), num_blocks)):
        allowed = set(range(1, num_blocks - 1)) - {i - 1, i, i + 1}
        assert len(blocks) == min(4, len(allowed))
        assert set(blocks) <= allowed and len(set(blocks)) == len(blocks)


def test_all_subsets_are_equally_likely():
    """Block 5 of 9 has candidates 1 2 3 7: six pairs, of 6000 drawn 1000 each, standard deviation 29."""
    draws = draws_of(9, num_random=2, heads=6000)
    table, found = random_blocks(draws, torch.tensor([9]))
    assert found[0, :, 5].all()
    pairs = [tuple(sorted(pair)) for pair in table[0, :, 5].tolist()]
    assert set(pairs) == set(combinations((1, 2, 3, 7), 2))
    assert all(abs(pairs.count(pair) - 1000) < 150 for pair in set(pairs))


def test_random_within_the_first_1024_tokens_as_released_lies_in_their_blocks():
    """The released benchmark draws from 1024 // 64 = 16 blocks, here those below 16 of 40."""
    for i, blocks in enumerate(chosen(draws_of(40), 40, within=16)):
        assert len(blocks) == 3
        assert set(blocks) <= set(range(1, 16)) - {i - 1, i, i + 1}
    mechanism, x = (
        layer(max_len=160, block_size=4, random_within=40).double(),
        torch.randn(1, 160, 8).double(),
    )
    x.requires_grad_()
    mechanism(x)[0, 80].sum().backward()  # block 20 of 40: sees no random block from 10 on
    seen = x.grad[0].unflatten(0, (40, 4)).abs().sum(dim=(1, 2)) > 0
    assert set(seen.nonzero().flatten().tolist()) <= {0, *range(1, 10), 19, 20, 21, 39}
    assert seen[1:10].sum() >= 3


@pytest.mark.parametrize(("length", "filled"), [(30, 32), (32, 36)])
def test_append_zeros_makes_zero_inputs_keys_in_a_last_block_also_of_whole_blocks(length, filled):
    own = {"block_size": 4, "num_random": 1}
    mechanism, plain = layer(append_zeros=True, **own).double(), layer(**own).double()
    plain.load_state_dict(mechanism.state_dict())
    x, mask = torch.randn(2, length, 8).double(), torch.arange(length) < torch.tensor([[length], [11]])
    real = torch.nn.functional.pad(mask, (0, filled - length), value=True)
    expected = plain(torch.nn.functional.pad(x, (0, 0, 0, filled - length)), real)[:, :length]
    torch.testing.assert_close(mechanism(x, mask), expected, **EXACT)
    assert (expected - plain(x, mask)).abs()[mask].amax(dim=-1).min() > 1e-6
    assert "length_invariant" in mechanism.traits.exceptions()
    assert layer(max_len=32, append_zeros=True, **own)(x[:, :32].float()).shape == x.shape


def test_unlimited_random_blocks_come_from_anywhere():
    assert max(max(blocks) for blocks in chosen(draws_of(40), 40)) > 30


def test_draws_depend_on_seed_layer_head_and_block_but_not_on_the_longest_length():
    one = layer(max_len=400, block_size=4).draws
    assert torch.equal(one[:, :10], layer(max_len=40, block_size=4).draws)
    assert one.unique().numel() == one.numel()
    assert not torch.equal(one, layer(block_size=4, block_seed=1).draws)
    place = Place(d_model=8, num_heads=2, max_len=400, layer_index=1)
    assert not torch.equal(one, build("bigbird", place, block_size=4).draws)
    torch.manual_seed(5)
    assert torch.equal(one, layer(block_size=4).draws)


def test_the_table_is_that_of_the_seed_and_no_part_of_a_checkpoint():
    assert "draws" not in layer().state_dict()
    assert layer().bfloat16().draws.dtype == torch.int64


def test_a_row_in_a_longer_batch_keeps_its_blocks():
    """Its last block is that of its last real token, and its random blocks lie before that."""
    mechanism, x = layer(block_size=4).double(), torch.randn(2, 200, 8, dtype=torch.float64)
    mask = torch.arange(200) < torch.tensor([200, 61])[:, None]
    torch.testing.assert_close(mechanism(x, mask)[1, :61], mechanism(x[1:, :61])[0], **EXACT)


def test_a_sequence_of_many_blocks_is_not_dense():
    q, k = torch.randn(2, 1, 1, 64, 4, dtype=torch.float64)
    v = torch.eye(64, dtype=torch.float64)[None, None]
    weights = bigbird_attention(q, k, v, block_size=4, draws=draws_of(16))[0, 0]
    seen = (weights.unflatten(0, (16, 4)).unflatten(2, (16, 4)) > 0).any(dim=3).any(dim=1)
    counts = seen.sum(dim=1).tolist()
    assert counts == [16, 7, *[8] * 12, 7, 16]  # window, two ends, three at random; ends are near at 1 and 14


def test_row_without_real_keys_gives_zeros_and_finite_gradients():
    q, k, v = (torch.randn(2, 1, 29, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = torch.tensor([[True] * 29, [False] * 29])
    out = bigbird_attention(q, k, v, mask, block_size=3, draws=draws_of(10))
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("num_random", [0, 2])
def test_gradcheck(num_random):
    mask = torch.arange(19) < torch.tensor([19, 11])[:, None]
    leaves = [torch.randn(2, 1, 19, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    options = {"block_size": 2, "draws": draws_of(10, num_random)}
    attend = lambda q, k, v: bigbird_attention(q, k, v, mask, **options)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_dropout_acts_on_weights_and_in_training_only():
    for length in (3, 90):  # global rows alone, and all parts
        mechanism, x = layer(block_size=4, attn_dropout=0.5), torch.randn(2, length, 8)
        assert not torch.equal(mechanism(x), mechanism(x))
        mechanism.eval()
        assert torch.equal(mechanism(x), mechanism(x))


def test_a_length_beyond_the_longest_is_refused():
    with pytest.raises(ValueError, match="raise max_len"):
        layer(max_len=16, block_size=4)(torch.randn(1, 17, 8))


@pytest.mark.parametrize(
    "own",
    [
        {"num_random": 0, "block_seed": 4},
        {"num_random": 0, "random_within": 512},
        {"random_within": 200},
    ],
)
def test_options_that_would_do_nothing_or_less_than_they_say_are_refused(own):
    with pytest.raises(ValueError, match="bigbird"):
        layer(**own)


@pytest.mark.parametrize("own", [{"block_size": 0}, {"num_random": -1}, {"random_within": 100}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="bigbird needs"):
        layer(**own)
