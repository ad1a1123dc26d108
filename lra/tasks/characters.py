"""Texts as tokens: bytes, as Long Range Arena reads them, or characters, as S4 does.

Bytes: id = byte + 1. Characters (state-spaces/s4, src/dataloaders/lra.py): a document is the first
`length` - 1 Unicode characters of a text and then `<eos>`. Their vocabulary is counted over these documents
of the training split: every character that occurs at least `min_freq` times, the most frequent first, equal
counts by code point; rarer ones become `<unk>`. So the length decides the vocabulary, and what is stored is
cut already.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lra.errors import UserError
from lra.schema import setting
from lra.tasks.base import PADDING, Finding, Task, check_bounds

if TYPE_CHECKING:
    from lra.data.store import Split
    from lra.data.writer import StoreWriter

UNKNOWN, END = "<unk>", "<eos>"
SPECIALS = [PADDING, UNKNOWN, END]
"""The first symbols of every vocabulary. They are longer than a character, so none can be taken for one."""

_UNKNOWN_ID, _END_ID = SPECIALS.index(UNKNOWN), SPECIALS.index(END)
_CODE_POINTS = 0x110000


@dataclass(frozen=True)
class Written(Task):
    """A task whose documents are texts. Of characters, the length and `min_freq` decide the bytes on disk."""

    unit: str = setting("byte", choices=("byte", "char"))
    min_freq: int = setting(1, low=1)  # of a character in train; rarer ones are <unk>

    usual_characters: ClassVar[int]
    """Size of the vocabulary of characters on the task's own data, for measuring without data."""

    def check(self) -> None:
        super().check()
        if self.unit == "byte" and self.min_freq != type(self).min_freq:
            raise UserError(
                f"task.min_freq={self.min_freq} would change nothing: bytes need no vocabulary; leave it "
                "away or set task.unit=char"
            )

    def check_length(self, length: int) -> None:
        check_bounds(self.name, length, 16, 65_536)

    @property
    def vocab_size(self) -> int:
        return 257 if self.unit == "byte" else self.usual_characters

    def character_variant(self, length: int) -> dict[str, Any]:
        """What decides the documents of characters, for `variant`; nothing for bytes."""
        return {} if self.unit == "byte" else {"min_freq": self.min_freq, "length": length}

    def vocabulary(self) -> list[str] | None:
        if self.unit == "char":
            return None
        return [PADDING, *(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in range(256))]

    def decode(self, tokens: np.ndarray, vocab: list[str]) -> str:
        if self.unit == "char":
            return "".join(vocab[token] for token in tokens)
        return (np.asarray(tokens).astype(np.int64) - 1).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def encoder(
        self, writer: "StoreWriter", train: Iterable[bytes], length: int
    ) -> Callable[[bytes], np.ndarray]:
        """From a text to the ids of its document. For characters the vocabulary is counted over `train`,
        which is read once, and handed to the writer.
        """
        if self.unit == "byte":
            dtype = np.dtype(self.dtype)
            return lambda text: np.frombuffer(text, np.uint8).astype(dtype) + dtype.type(1)
        counts = Counts(length)
        for text in train:
            counts.add(text.decode())
        vocab = counts.vocabulary(self.min_freq)
        if len(vocab) == len(SPECIALS):
            raise UserError(
                f"no character occurs {self.min_freq} times in the training texts; lower task.min_freq"
            )
        writer.set_vocabulary(vocab)
        encode = Encoder(vocab, length)
        return lambda text: encode(text.decode())

    def check_vocabulary(self, vocab: list[str], train: "Split") -> list[Finding]:
        return [] if self.unit == "byte" else check_vocabulary(vocab, train, self.min_freq)

    def check_rows(self, split: "Split", length: int) -> list[Finding]:
        return [] if self.unit == "byte" else check_documents(split, length)

    def statistics(self, split: "Split") -> dict[str, Any]:
        if self.unit == "byte":
            return {}
        unknown = sum(int((part.tokens == _UNKNOWN_ID).sum()) for _, part in split.chunks())
        characters = len(split.tokens) - len(split.lengths)
        return {"unknown characters": {UNKNOWN: unknown / max(1, characters)}}


class Counts:
    """How often each character occurs in the documents added so far, `<eos>` left out."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._counts = np.zeros(_CODE_POINTS, np.int64)

    def add(self, text: str) -> None:
        found = np.bincount(_codes(text, self._length))
        self._counts[: len(found)] += found

    def vocabulary(self, min_freq: int) -> list[str]:
        """The symbols, id 0 first."""
        kept = np.flatnonzero(self._counts >= max(1, min_freq))
        order = np.argsort(-self._counts[kept], kind="stable")  # ties stay in the order of code points
        return [*SPECIALS, *map(chr, kept[order].tolist())]


class Encoder:
    """From a text to the ids of its document, int16 [characters + 1]."""

    def __init__(self, vocab: list[str], length: int) -> None:
        self._length = length
        self._ids = np.full(_CODE_POINTS, _UNKNOWN_ID, np.int16)
        characters = vocab[len(SPECIALS) :]
        self._ids[[ord(character) for character in characters]] = np.arange(len(SPECIALS), len(vocab))

    def __call__(self, text: str) -> np.ndarray:
        return np.append(self._ids[_codes(text, self._length)], np.int16(_END_ID))


def _codes(text: str, length: int) -> np.ndarray:
    """The code points of a document without its `<eos>`."""
    return np.frombuffer(text[: length - 1].encode("utf-32-le"), np.uint32)


def check_vocabulary(vocab: list[str], train: "Split", min_freq: int) -> list[Finding]:
    """Whether the vocabulary is the one that the stored training documents give.

    What is stored cannot say which characters `<unk>` stands for, so a character that is missing from the
    vocabulary goes unnoticed.
    """
    counts = np.zeros(len(vocab), np.int64)
    for _, part in train.chunks():
        counts += np.bincount(part.tokens, minlength=len(vocab))[: len(vocab)]
    characters = vocab[len(SPECIALS) :]
    wrong = [symbol for symbol in characters if not isinstance(symbol, str) or len(symbol) != 1]
    repeated = len(set(map(repr, characters))) != len(characters)
    rare = [
        f"{symbol!r} {count} times"
        for symbol, count in zip(characters, counts[len(SPECIALS) :], strict=True)
        if count < min_freq
    ]
    ranks = [(-int(count), str(symbol)) for symbol, count in zip(vocab, counts, strict=True)][len(SPECIALS) :]
    late = next((index for index in range(1, len(ranks)) if ranks[index] < ranks[index - 1]), None)
    return [
        Finding(
            "vocabulary symbols",
            vocab[: len(SPECIALS)] == SPECIALS and not wrong and not repeated,
            f"{', '.join(map(str, vocab[: len(SPECIALS)]))} and {len(characters):,} characters"
            + (f", not single characters: {wrong[:5]}" if wrong else "")
            + (", some of them twice" if repeated else ""),
        ),
        Finding(
            "vocabulary counts",
            not rare,
            f"too rare: {', '.join(rare[:5])}"
            if rare
            else f"each character occurs at least {min_freq} times in train",
        ),
        Finding(
            "vocabulary order",
            late is None,
            "by falling count in train"
            if late is None
            else f"{characters[late]!r} belongs before {characters[late - 1]!r}",
        ),
    ]


def check_documents(split: "Split", length: int) -> list[Finding]:
    """Whether each stored document has at most `length` tokens and `<eos>` as its last one only."""
    ends = misplaced = 0
    for _, part in split.chunks():
        is_end = part.tokens == _END_ID
        ends += int(is_end.sum())
        misplaced += int((~is_end[part.offsets[1:] - 1]).sum())
    longest = int(split.lengths.max())
    documents = len(split.lengths)
    return [
        Finding(
            f"{split.name} ends",
            ends == documents and not misplaced,
            f"{documents:,} documents, {ends:,} {END}, {misplaced:,} documents that end otherwise",
        ),
        Finding(f"{split.name} longest", longest <= length, f"{longest:,} tokens, allowed {length:,}"),
    ]
