"""BigBird: each block of queries with the list of blocks it sees, drawn once more from the same numbers."""

import torch

from models import Place, build
from models.bigbird import bigbird_attention
from proofs.faults import Plant, attention_faults, changed
from proofs.kit import Limit, Oracle, attention_where, by_head, dense_softmax, distance, draw, flex


def drawn(numbers, candidates):
    """A subset as large as there are numbers of 31 bits, by Floyd's algorithm: u n / 2 ** 31 is the die."""
    chosen = []
    for step, number in enumerate(numbers):
        end = len(candidates) - len(numbers) + step
        if end >= 0:
            pick = number * (end + 1) // 2**31
            chosen.append(end if pick in chosen else pick)
    return {candidates[pick] for pick in chosen}


def blocks_seen(module, head, num_blocks):
    """For each block of a row the set of blocks that it sees."""
    limit = module.random_within // module.block_size if module.random_within else num_blocks
    out = []
    for i in range(num_blocks):
        near = {i - 1, i, i + 1, 0, num_blocks - 1}
        candidates = [j for j in range(1, num_blocks - 1) if j not in near and j < limit]
        one = near | drawn(module.draws[head, i].tolist(), candidates)
        out.append(set(range(num_blocks)) if i in (0, num_blocks - 1) else one)
    return out


def reference(module, x, mask=None):
    if not module.append_zeros:
        return attended(module, x, mask)
    zeros = x.new_zeros(len(x), module.block_size - x.shape[1] % module.block_size, x.shape[2])
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    filled = torch.cat([mask, torch.ones(zeros.shape[:2], dtype=torch.bool)], dim=1)
    return attended(module, torch.cat([x, zeros], dim=1), filled)[:, : x.shape[1]]


@by_head
def attended(module, head, q, k, v, real):
    if not real:
        return torch.zeros_like(q)
    size = module.block_size
    seen = blocks_seen(module, head, real[-1] // size + 1)
    rows = [[j // size in seen[min(i, real[-1]) // size] for j in real] for i in range(len(q))]
    return attention_where(q, k[real], v[real], torch.tensor(rows))


CASES = [
    {},
    {"block_size": 4},
    {"block_size": 1, "num_random": 2, "block_seed": 7},
    {"block_size": 5, "num_random": 0},
    {"block_size": 4, "num_random": 5, "random_within": 40},
    {"block_size": 16, "random_within": 32},
    {"block_size": 4, "random_within": 20, "append_zeros": True},
]


def built(num_heads=2, **own):
    place = Place(d_model=8 * num_heads, num_heads=num_heads, max_len=160)
    with torch.random.fork_rng([]):
        return build("bigbird", place, **own).double()


def few_blocks():
    mask = torch.arange(28) % 9 != torch.tensor([1, 8])[:, None]
    q, k, v = draw(3, 2, 2, 28, 8)
    errors = []
    for block_size, num_random in ((4, 3), (7, 0), (28, 0), (100, 3), (1, 24)):
        draws = built(block_size=block_size, num_random=num_random).draws
        found = bigbird_attention(q, k, v, mask, block_size=block_size, draws=draws)
        errors.append(distance(dense_softmax(q, k, v, mask), found))
    return max(errors)


LIMITS = [Limit("4 + num_random blocks or fewer, masked: softmax", few_blocks)]


def against_transformers():
    """Their table has no rows for the first and last block; in evaluation they would take block 0 thrice."""
    from transformers.models.big_bird import configuration_big_bird as configuration
    from transformers.models.big_bird import modeling_big_bird as modeling

    config = configuration.BigBirdConfig(
        hidden_size=16, num_attention_heads=2, block_size=4, num_random_blocks=3, use_bias=True
    )
    mechanism, num_blocks = built(block_size=4), 14
    with torch.random.fork_rng([]):
        oracle = modeling.BigBirdBlockSparseAttention(config).double().eval()
    table = []
    for head in range(2):
        seen = blocks_seen(mechanism, head, num_blocks)
        table.append(
            [sorted(seen[i] - {0, num_blocks - 1, i - 1, i, i + 1}) for i in range(1, num_blocks - 1)]
        )
    oracle._bigbird_block_rand_mask_with_head = lambda **sizes: torch.tensor(table).numpy()
    x, mask = draw(2, 56, 16), torch.arange(56) < torch.tensor([56, 53])[:, None]
    with torch.no_grad():
        parts = (oracle.query, oracle.key, oracle.value)
        for name in ("weight", "bias"):
            getattr(mechanism.qkv, name).copy_(torch.cat([getattr(part, name) for part in parts]))
        mechanism.out.weight.copy_(torch.eye(16))
        mechanism.out.bias.zero_()
        blocked, band, row, column = modeling.BigBirdModel.create_masks_for_block_sparse_attn(
            mask.double(), 4
        )
        masks = {"band_mask": band, "from_mask": row, "to_mask": column}
        masks |= {"from_blocked_mask": blocked, "to_blocked_mask": blocked}
        expected = oracle(x, **masks)[0]
        return distance(expected[mask], mechanism(x, mask)[mask])


def against_flex():
    mechanism = built(block_size=4, random_within=40)
    tables = torch.zeros(2, 33, 33, dtype=torch.bool)
    for head in range(2):
        for i, seen in enumerate(blocks_seen(mechanism, head, 33)):
            tables[head, i, sorted(seen)] = True
    q, k, v = draw(3, 2, 2, 131, 8)
    mask = torch.arange(131) % 7 != torch.tensor([3, 4])[:, None]
    expected = flex(q, k, v, lambda b, h, i, j: tables[h, i // 4, j // 4] & (mask[b, j] | (i == j)))
    real = mask[:, None, :, None]
    found = bigbird_attention(q, k, v, mask, block_size=4, draws=mechanism.draws, random_within=40)
    return distance(expected * real, found * real)


ORACLES = [
    Oracle(
        "transformers 5.23",
        "BigBirdBlockSparseAttention, projections copied, our random blocks, padding in the last block",
        against_transformers,
    ),
    Oracle("torch FlexAttention", "the blocks of our table, a mask with holes", against_flex),
]

FAULTS = {
    **attention_faults("bigbird_attention"),
    "window off by one": Plant("bigbird_attention", changed(block_size=lambda b: b + 1), {"block_size": 4}),
}
