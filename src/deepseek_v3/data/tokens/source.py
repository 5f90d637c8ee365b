"""What training needs of a tokenized corpus, whatever its format on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.arrays import Float64Array
from deepseek_v3.data.tokens.index import Split
from deepseek_v3.data.tokens.tokenizer import Tokenizer

Tokens = NDArray[Any]  # of an integer type, such as uint16

_BLOCK_TOKENS = 2**20


@dataclass(frozen=True)
class WeightedSource:
    """One source of a run, and its share of the samples. The name is empty if the run has a single unnamed one."""

    name: str
    share: Fraction
    source: TokenSource


class RunTokens(ABC):
    """The tokens that a run trains on: one source, or a mixture of several with one tokenizer."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The paths, for messages."""

    @property
    @abstractmethod
    def parts(self) -> tuple[WeightedSource, ...]:
        """The sources, with shares that sum to 1."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer; every id is below it."""

    @property
    @abstractmethod
    def end_of_text(self) -> int:
        """The id of the marker after each document."""

    @property
    @abstractmethod
    def identity(self) -> list[str]:
        """The checksum of the tokenizer, then those of the training tokens; a checkpoint stores them."""

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens; read once."""


class TokenSource(RunTokens):
    """Two splits of token ids, `train` and `holdout`, and the tokenizer that made them.

    Documents follow one another without padding. Safe to use from several threads.
    """

    @property
    def parts(self) -> tuple[WeightedSource, ...]:
        """This source alone."""
        return (WeightedSource("", Fraction(1), self),)

    @abstractmethod
    def num_tokens(self, split: Split) -> int:
        """Tokens in a split, including the end-of-text of each document."""

    @abstractmethod
    def num_bytes(self, split: Split) -> int:
        """Bytes of UTF-8 text in a split."""

    @abstractmethod
    def read(self, split: Split, start: int, length: int) -> Tokens:
        """Tokens `start` to `start + length` of a split: an array of integers [length].

        Raises ValueError if the range is empty or exceeds the split, and DataError if tokens cannot be read.
        """

    @abstractmethod
    def places(self, split: Split, start: int, length: int) -> list[str]:
        """Where tokens `start` to `start + length` of a split are on disk: `FILE:FIRST-END`, counted in tokens.

        Raises ValueError if the range is empty or exceeds the split.
        """

    def blocks(self, split: Split) -> Iterator[Tokens]:
        """All tokens of a split in order, about a million at a time."""
        total = self.num_tokens(split)
        for start in range(0, total, _BLOCK_TOKENS):
            yield self.read(split, start, min(_BLOCK_TOKENS, total - start))

    def byte_lengths(self, split: Split) -> Float64Array:
        """Bytes of text that each id stands for in a split: float64 [vocab_size].

        If those of the tokenizer are not exact, they are scaled so that they sum to the bytes of the split.
        """
        tokenizer = self.load_tokenizer()
        lengths = tokenizer.byte_lengths.astype(np.float64)
        if tokenizer.is_byte_exact:
            return lengths
        decoded = float(sum(lengths[block].sum() for block in self.blocks(split)))
        return lengths * (self.num_bytes(split) / decoded if decoded else 1.0)


def mean_by_share(parts: Sequence[WeightedSource], values: Iterable[float]) -> float:
    """The mean of one value for each part of a mixture, weighted by the shares of the parts."""
    return sum(float(part.share) * value for part, value in zip(parts, values, strict=True))


def parts_of_range(starts: Sequence[int], start: int, length: int, split: Split) -> Iterator[tuple[int, int, int]]:
    """Cuts tokens `start` to `start + length` of a split at the borders of its parts.

    Part k holds tokens `starts[k]` to `starts[k + 1]` of the split. Yields the number of each part that is touched,
    with the range inside it. Raises ValueError if the range is empty or exceeds the split.
    """
    stop = start + length
    if not 0 <= start < stop <= starts[-1]:
        raise ValueError(f"tokens {start} to {stop} of {split!r}: expected a range within 0 to {starts[-1]}")
    number = bisect_right(starts, start) - 1
    while start < stop:
        end = min(stop, starts[number + 1])
        yield number, start - starts[number], end - starts[number]
        start, number = end, number + 1
