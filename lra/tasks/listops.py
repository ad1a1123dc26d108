"""ListOps: the value, a digit, of a nested list expression.

Generated as the original generator does (Nangia and Bowman 2018, with the Long Range Arena's settings): trees
are drawn whole and kept when their length lies strictly between a quarter of the bound and the bound, LRA's
bound being 2,000; equal trees are kept once, and the first rows become train, the next val, the last test.
LRA set no seed, so its files can be regenerated in distribution only. They can also be read, from
`task.source`.

Lengths count the stored symbols: parentheses are dropped and `]` is one symbol, as every LRA code base does.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lra.errors import UserError
from lra.schema import setting
from lra.tasks.base import PADDING, Finding, Plan, Progress, Task, available_cpus, check_bounds, row_digests

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Symbol i has id i + 1. The order is fixed; a test pins its hash."""

GENERATOR_VERSION = 1
LRA_LENGTH, LRA_DEPTH, LRA_ROWS = 2000, 10, (96_000, 2_000, 2_000)
BLOCK = 4096
"""Attempts drawn in one go. Blocks are used in order, so the number of workers cannot change the rows."""
PATIENCE = 1 << 22
"""Attempts after which the build gives up if hardly any gave a new row."""

IDS = {symbol: index + 1 for index, symbol in enumerate(SYMBOLS)}
_OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
FILES_WANTED = (
    "Name the folder that holds LRA's basic_train.tsv, basic_val.tsv and basic_test.tsv, or a tar or zip "
    "archive of it (lra_release.gz)"
)


@dataclass(frozen=True)
class ListOps(Task):
    """The length bound decides the variant: 2,000 is LRA's, others are scaled and say so."""

    name: str = "listops"
    num_train: int = setting(LRA_ROWS[0], low=1)
    num_val: int = setting(LRA_ROWS[1], low=1)
    num_test: int = setting(LRA_ROWS[2], low=1)
    max_depth: int | None = setting(None, low=2)  # None: 10, and more above a length of 2,000, see `depth`
    max_args: int = setting(10, low=2)

    description: ClassVar[str] = "value of a nested expression of MIN, MAX, MED and SM (sum modulo 10)"
    num_classes: ClassVar[int] = 10
    default_length: ClassVar[int] = LRA_LENGTH
    vocab_size: ClassVar[int] = len(SYMBOLS) + 1

    def check(self) -> None:
        super().check()
        if self.val != "heldout":
            raise UserError(
                f"task.val={self.val}: listops has a validation split of its own; leave task.val=heldout"
            )
        if self.source is not None:
            fields = ("num_train", "num_val", "num_test", "max_depth", "max_args", "data_seed")
            idle = [name for name in fields if getattr(self, name) != getattr(ListOps, name)]
            if idle:
                raise UserError(
                    f"task.{idle[0]} would change nothing: the rows come from task.source={self.source}; "
                    "leave one of the two away"
                )

    def check_length(self, length: int) -> None:
        check_bounds("listops", length, 32, 32_768)

    def depth(self, length: int) -> int:
        """The deepest level a node may have, the root being level 1.

        Trees of more than 9 levels of operators are needed to reach far above 2,000: each level multiplies
        the expected size by 1.5, so one more is allowed for each factor of 1.5 in length, rounded. At and
        below 2,000 it is LRA's 10.
        """
        if self.max_depth is not None:
            return self.max_depth
        return LRA_DEPTH + max(0, round(math.log(length / LRA_LENGTH, 1.5)))

    def rows(self) -> dict[str, int]:
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}

    def variant(self, length: int) -> dict[str, Any]:
        if self.source is not None:
            return {"task": "listops", "files": "basic_*.tsv", "length": length}
        return {
            "task": "listops",
            "generator": GENERATOR_VERSION,
            "data_seed": self.data_seed,
            "length": length,
            "max_depth": self.depth(length),
            "max_args": self.max_args,
            **{f"num_{split}": rows for split, rows in self.rows().items()},
        }

    def variant_name(self, length: int) -> str:
        seed = f"-seed{self.data_seed}" if self.data_seed else ""
        remarks = [] if length == LRA_LENGTH else ["scaled"]
        changed = [
            f"{name}={getattr(self, name)}"
            for name in ("num_train", "num_val", "num_test", "max_depth", "max_args")
            if getattr(self, name) != getattr(ListOps, name)
            and (name != "max_depth" or self.max_depth != LRA_DEPTH)
        ]
        if remarks or changed:
            remarks.append("not the LRA setting")
        notes = "; ".join(filter(None, [", ".join(remarks), ", ".join(changed)]))
        return f"listops-{length}{seed}" + (f" ({notes})" if notes else "")

    def source_name(self) -> str | None:
        return None if self.source is None else f"{Path(self.source).expanduser().resolve()}"

    def plan(self, length: int) -> Plan:
        rows, source = sum(self.rows().values()), "generated here"
        if self.source is not None:
            rows, source = sum(LRA_ROWS), self.source
            if not Path(source).expanduser().exists():
                raise UserError(f"task.source={source}: there is no such file or folder. {FILES_WANTED}")
        tokens = rows * 0.55 * length
        return Plan(
            source, rows, (tokens + 9 * rows) / 2**20, 2 + tokens / (60e6 if self.source is None else 5e6)
        )

    def vocabulary(self) -> list[str]:
        return [PADDING, *SYMBOLS]

    def build(
        self, writer, *, length: int, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        if self.source is not None:
            from lra.tasks.listops_files import read

            read(Path(self.source), writer, length, progress)
        else:
            self._generate(writer, length, workers, progress)

    def _generate(self, writer, length: int, workers: int | None, progress: Progress | None) -> None:
        ends = dict(zip(self.rows(), itertools.accumulate(self.rows().values()), strict=True))
        total, done, seen = ends["test"], 0, set()
        drawn = {"attempts": 0, "accepted": 0}
        patience = _Patience()
        for block in self._blocks(length, workers or available_cpus()):
            drawn = {"attempts": drawn["attempts"] + BLOCK, "accepted": drawn["accepted"] + len(block[2])}
            flat, offsets, labels = _unseen(*block, seen, total - done)
            start = 0
            for split, end in ends.items():
                stop = max(start, min(len(labels), end - done))
                part = offsets[start : stop + 1]
                writer.add_rows(split, flat[part[0] : part[-1]], part - part[0], labels[start:stop])
                start = stop
            done += len(labels)
            if progress:
                progress(done, total)
            if done == total:
                break
            if patience.exhausted(len(labels)):
                raise UserError(
                    f"listops: trees of {length // 4 + 1} to {length - 1} symbols are too rare with "
                    f"max_depth={self.depth(length)} and max_args={self.max_args}: {done:,} of {total:,} "
                    f"rows after {drawn['attempts']:,} draws. Ask for fewer rows, a shorter length, more "
                    "depth or more arguments"
                )
        generator = {"name": "listops", "version": GENERATOR_VERSION, "seed": self.data_seed, **drawn}
        writer.describe(source="generated here", data_origin="regenerated", generator=generator)

    def _blocks(self, length: int, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Accepted trees of one block of attempts after another: (flat, offsets, labels)."""
        from lra.tasks import listops_generator

        def block(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return listops_generator.draw_block(
                np.uint64(self.data_seed),
                np.uint64(index * BLOCK),
                BLOCK,
                length // 4 + 1,
                length - 1,
                self.depth(length),
                self.max_args,
            )

        yield block(0)  # compiles, once and in one thread
        with ThreadPoolExecutor(workers) as pool:
            queue = deque(pool.submit(block, index) for index in range(1, 2 * workers + 1))
            try:
                for index in itertools.count(2 * workers + 1):
                    yield queue.popleft().result()
                    queue.append(pool.submit(block, index))
            finally:
                pool.shutdown(cancel_futures=True)

    @property
    def disjoint(self) -> bool:
        return self.source is None  # files may repeat rows; that is counted

    def decode(self, tokens: np.ndarray, vocab: list[str]) -> str:
        symbols = [vocab[token] for token in tokens]
        try:
            return "\n".join(_render(_parse(symbols)))
        except RecursionError:  # hundreds of levels, as only files have them
            return " ".join(symbols)

    def check_rows(self, split, length: int) -> list[Finding]:
        from lra.tasks import listops_generator

        values = listops_generator.values(np.asarray(split.tokens), np.asarray(split.offsets))
        wrong = np.flatnonzero(values != split.labels)
        detail = f"{len(split):,} evaluated, {len(wrong)} wrong"
        if len(wrong):
            detail += f", first in row {wrong[0]}: label {split.labels[wrong[0]]}, value {values[wrong[0]]}"
        # Files may be of any length up to the bound; only our own generator promises the strict lower one.
        low, high = (0, length) if self.source is not None else (length // 4 + 1, length - 1)
        outside = int(((split.lengths < low) | (split.lengths > high)).sum())
        return [
            Finding(f"{split.name} values", not len(wrong), detail),
            Finding(f"{split.name} length bounds", outside == 0, f"{low} to {high}: {outside} rows outside"),
        ]

    def statistics(self, split) -> dict[str, Any]:
        """The shares that `generator-statistics` lists, counted over one split."""
        from lra.tasks import listops_generator

        tokens, offsets = np.asarray(split.tokens), np.asarray(split.offsets)
        values = listops_generator.values(tokens, offsets)
        if values.min() < 0:
            raise UserError(
                f"{split.name} row {values.argmin()} is not an expression; check with: lra data verify"
            )
        symbols, arguments, root, operators, levels = listops_generator.tally(tokens, offsets, self.max_args)
        widths = range(2, self.max_args + 1)
        return {
            "digits": _shares(SYMBOLS[:10], symbols[1:11]),
            "operators": _shares(_OPERATORS, symbols[11:15]),
            "arguments": _shares(widths, arguments[2:]),
            "root arguments": _shares(widths, root[2:]),
            "levels of operators": _shares(range(levels.max() + 1), np.bincount(levels)),
            "operators per tree": {"mean": float(operators.mean()), "sd": float(operators.std())},
            "wrong labels": int((values != split.labels).sum()),
        }


class _Patience:
    """Gives up when PATIENCE attempts in a row yield fewer than one new row in 100,000."""

    def __init__(self) -> None:
        self.attempts = self.found = 0

    def exhausted(self, found: int) -> bool:
        """Count one block that gave `found` new rows."""
        self.attempts, self.found = self.attempts + BLOCK, self.found + found
        if self.attempts < PATIENCE:
            return False
        rare = self.found * 100_000 < self.attempts
        self.attempts = self.found = 0
        return rare


def _unseen(
    flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray, seen: set[bytes], limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `limit` trees that are not in `seen`, to which they are added."""
    keep = []
    for index, digest in enumerate(row_digests(flat, offsets)):
        if digest not in seen and len(keep) < limit:
            seen.add(digest)
            keep.append(index)
    if len(keep) == len(labels):
        return flat, offsets, labels
    rows = [flat[offsets[index] : offsets[index + 1]] for index in keep]
    return np.concatenate([flat[:0], *rows]), np.cumsum([0, *map(len, rows)]), labels[keep]


def _shares(keys: Iterable[Any], counts: np.ndarray) -> dict[str, float]:
    total = max(1, counts.sum())
    return {str(key): float(count / total) for key, count in zip(keys, counts, strict=True) if count}


def evaluate(tokens: str | Sequence[str] | Sequence[int]) -> int:
    """The value, 0 to 9, of an expression given as text, as symbols or as ids; parentheses in text are
    ignored.

    MED of an even number of arguments is the mean of the two middle ones, rounded down.
    """
    if isinstance(tokens, str):
        tokens = tokens.replace("(", " ").replace(")", " ").split()
    return _parse([token if isinstance(token, str) else SYMBOLS[token - 1] for token in tokens]).value


@dataclass
class _Node:
    """A digit, or an operator with its arguments and their value."""

    symbol: str
    value: int
    arguments: list["_Node"]


def _parse(symbols: Iterable[str]) -> _Node:
    root = _Node("", -1, [])
    stack = [root]
    for position, symbol in enumerate(symbols):
        if root.arguments and len(stack) == 1:
            raise UserError(
                f"'{symbol}' at position {position} follows an expression that is already complete"
            )
        if symbol in _OPERATORS:
            stack.append(_Node(symbol, -1, []))
            continue
        if symbol == "]" and len(stack) > 1 and stack[-1].arguments:
            node = stack.pop()
            node.value = _apply(node.symbol, sorted(argument.value for argument in node.arguments))
        elif symbol in IDS and symbol != "]":
            node = _Node(symbol, int(symbol), [])
        else:
            raise UserError(
                f"'{symbol}' at position {position} is not allowed; symbols are {' '.join(SYMBOLS)}"
            )
        stack[-1].arguments.append(node)
    if len(stack) > 1 or not root.arguments:
        raise UserError(
            "the expression ends before it is complete; each operator needs its arguments and a ']'"
        )
    return root.arguments[0]


def _apply(operator: str, digits: list[int]) -> int:
    """The value of an operator on its sorted arguments."""
    if operator == "[MIN":
        return digits[0]
    if operator == "[MAX":
        return digits[-1]
    if operator == "[SM":
        return sum(digits) % 10
    return (digits[(len(digits) - 1) // 2] + digits[len(digits) // 2]) // 2


def _render(node: _Node, width: int = 100) -> list[str]:
    """The tree as lines of about `width`, each operator with its value behind its `]`."""
    if not node.arguments:
        return [node.symbol]
    lines, line = [], node.symbol
    for part in [*(_render(argument, width - 2) for argument in node.arguments), [f"]={node.value}"]]:
        if len(part) == 1 and len(line) + 1 + len(part[0]) <= width:
            line = f"{line} {part[0]}" if line else part[0]
            continue
        lines += [line] if line else []
        line = part[0] if len(part) == 1 else ""
        lines += part if len(part) > 1 else []
    lines += [line] if line else []
    return [lines[0], *(text if text.startswith("]=") else f"  {text}" for text in lines[1:])]
