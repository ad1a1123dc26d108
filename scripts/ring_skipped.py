"""The share of work that ring attention skips, beside what the paper of its schedules says: a table.

usage: python scripts/ring_skipped.py > results/mechanisms/ring.md
"""

from models.schedules import PAPER, schedule_stats

PADDED = 4096
RAGGED = [round(PADDED * (0.02 + 0.98 * (i / 31) ** 2.47)) for i in range(32)]  # a few long rows, many short
BATCHES = {"full rows": [PADDED], "ragged rows": RAGGED}

HEAD = f"""# Work that ring attention skips

Made by `python scripts/ring_skipped.py > results/mechanisms/ring.md` from `models.schedules.schedule_stats`,
which counts what `ring_attention` makes (see `tests/models/test_ring.py`; while a CUDA graph is captured,
padding is not skipped). Work is block products, of queries and keys and of weights and values, as a share of
all pairs of all blocks. Ragged rows are made up: 32 rows of {min(RAGGED):,} to {max(RAGGED):,} tokens,
{sum(RAGGED):,} real ones in {32 * PADDED:,} places. The paper (arXiv 2012.01114) says "almost" 25 % and 50 %
of its schemes, which we read as tied queries and keys, and causal attention. `ring_attention` has the kinds
full and tied.

| kind | blocks | {" | ".join(BATCHES)} | paper |
|---|--:|--:|--:|--:|"""


def main() -> None:
    print(HEAD)
    for kind in ("full", "tied", "causal"):
        for num_blocks in (8, 16, 64):
            found = [
                schedule_stats(lengths, padded_length=PADDED, num_blocks=num_blocks, kind=kind).work
                for lengths in BATCHES.values()
            ]
            shares = " | ".join(f"{100 * share:.1f} %" for share in found)
            paper = f"{100 * PAPER[kind]:.0f} %" if kind in PAPER else "-"
            print(f"| {kind} | {num_blocks} | {shares} | {paper} |")


if __name__ == "__main__":
    main()
