"""An index of the word n-grams of evaluation sets, by 64-bit hashes, and the search for them in other texts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, count, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_v3.config.filter_config import DecontaminationConfig
from deepseek_v3.data.arrays import BoolArray, Int64Array, UInt64Array, find_sorted
from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.data.scripts import UNSPACED_CLASS
from deepseek_v3.utils.errors import DataError

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_WORD = re.compile(rf"[{UNSPACED_CLASS}]|[^\W_{UNSPACED_CLASS}]+")
_UNSPACED = re.compile(f"[{UNSPACED_CLASS}]")
_FACTOR = 0x9E3779B97F4A7C15  # odd, and so invertible modulo 2^64
_INVERSE = pow(_FACTOR, -1, 2**64)


@lru_cache(maxsize=2)
def load_evaluation_index(options: DecontaminationConfig) -> EvaluationIndex:
    """Builds the index of the evaluation sets, once per process. Raises DataError if one cannot be read."""
    texts = [text for path in options.evaluation for text in _evaluation_texts(path, options.fields)]
    return EvaluationIndex(texts, options.ngram, options.min_ngram, options.characters_per_word)


def _evaluation_texts(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    for field in fields:
        for document in read_documents(path, field):
            yield f"{path}: {document.id}", document.text


class _Table(NamedTuple):
    """Ascending hashes of n-grams of one length (uint64), and the number of the first among all n-grams."""

    hashes: UInt64Array
    first: int


class NgramMatches(NamedTuple):
    """N-grams of evaluation texts that occur in other texts: int64 [matches] each.

    `starts` are indices into the concatenated words of all texts, in ascending order, `lengths` are numbers of
    words, and `ngrams` are the numbers of the n-grams in the index.
    """

    starts: Int64Array
    lengths: Int64Array
    ngrams: Int64Array


class EvaluationIndex:
    """All n-grams of `ngram` words of evaluation texts, and whole texts of `min_ngram` to `ngram` - 1 words.

    A text mostly in scripts without spaces, of which each character is a word, has n-grams of `characters_per_word`
    times these lengths. `owners`, int64 [n-grams], are the indices in `names` of an evaluation text that has each.
    """

    def __init__(
        self, texts: Sequence[tuple[str, str]], ngram: int, min_ngram: int, characters_per_word: int
    ) -> None:
        """`texts` are pairs of a name and a text. Raises DataError if all are shorter than `min_ngram` words."""
        self.names = [name for name, _ in texts]
        vocabulary: defaultdict[str, int] = defaultdict(count(1).__next__)  # 0: a word in no evaluation text
        lists = [split_words(text.lower()) for _, text in texts]
        numbers = np.fromiter(map(vocabulary.__getitem__, chain.from_iterable(lists)), np.int64)
        sizes = np.array([*map(len, lists)], np.int64)
        scale = np.where([*map(_is_unspaced, lists)], characters_per_word, 1)
        if not (sizes >= min_ngram * scale).any():
            raise DataError(
                f"decontamination.evaluation: none of {len(texts)} texts has min_ngram = {min_ngram} words; lower "
                "min_ngram, or name other fields"
            )
        self._vocabulary = dict(vocabulary)
        self._values = np.random.default_rng(0).integers(2**64, size=len(vocabulary) + 1, dtype=np.uint64)
        self.owners: Int64Array = np.zeros(0, np.int64)
        self._tables = self._tabulate(NgramHashes(self._values[numbers]), sizes, ngram * scale, min_ngram * scale)

    def find(self, lists: Sequence[Sequence[str]]) -> NgramMatches:
        """Finds the matches in texts, given as lists of words."""
        known = map(self._vocabulary.get, chain.from_iterable(lists), repeat(0))
        ends = np.cumsum([*map(len, lists)], dtype=np.int64)
        numbers = np.fromiter(known, np.int64)
        hashes = NgramHashes(self._values[numbers])
        known_ahead = _known_words_ahead(numbers > 0, ends)
        found: list[tuple[Int64Array, Int64Array, Int64Array]] = []
        for length, table in self._tables.items():
            starts = np.flatnonzero(known_ahead >= length)
            rows = find_sorted(table.hashes, hashes.at(starts, length))
            starts, rows = starts[rows >= 0], rows[rows >= 0]
            found.append((starts, np.full(len(starts), length), table.first + rows))
        starts, lengths, ngrams = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((lengths, starts))
        return NgramMatches(starts[order], lengths[order], ngrams[order])

    def _tabulate(
        self, hashes: NgramHashes, sizes: Int64Array, longest: Int64Array, shortest: Int64Array
    ) -> dict[int, _Table]:
        """Returns a table for each length to search for, and sets the owners of their n-grams.

        `longest` and `shortest`, int64 [texts], are the lengths for each text.
        """
        firsts = np.cumsum(sizes) - sizes
        lengths = np.where(sizes >= shortest, np.minimum(sizes, longest), 0)
        tables = {}
        for length in np.unique(lengths[lengths > 0]).tolist():
            chosen = np.flatnonzero(lengths == length)
            numbers = sizes[chosen] - length + 1
            owners = np.repeat(chosen, numbers)
            within = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
            found, first = np.unique(hashes.at(firsts[owners] + within, length), return_index=True)
            tables[length] = _Table(found, len(self.owners))
            self.owners = np.concatenate([self.owners, owners[first]])
        return tables


def _is_unspaced(words: Sequence[str]) -> bool:
    """Whether most of the `split_words` of a text are characters of scripts without spaces."""
    return 2 * sum(_UNSPACED.match(word) is not None for word in words) > len(words)


def split_words(lower: str) -> list[str]:
    """Splits a text in lower case into words, which are runs of letters and digits."""
    return word_pattern(lower).findall(lower)


def word_pattern(lower: str) -> re.Pattern[str]:
    """Returns the regular expression that matches each word of a text in lower case."""
    return _ASCII_WORD if lower.isascii() else _WORD


class NgramHashes:
    """Rolling hashes of the word n-grams of a text, for any n; equal n-grams have equal hashes."""

    def __init__(self, values: UInt64Array) -> None:
        """`values` (uint64 [words]) holds the random number of each word; equal words have equal numbers."""
        powers = np.multiply.accumulate(np.full(len(values), _FACTOR, np.uint64))
        self._inverse = np.multiply.accumulate(np.full(len(values), _INVERSE, np.uint64))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])

    def at(self, starts: Int64Array, n: int | Int64Array) -> UInt64Array:
        """Returns the hashes of the n-grams that start at these words; n may differ for each."""
        return (self._sums[starts + n] - self._sums[starts]) * self._inverse[starts]


def _known_words_ahead(known: BoolArray, ends: Int64Array) -> Int64Array:
    """Returns, for each word, the number of words from it on before an unknown word or the end of its text.

    `known` marks the words of evaluation texts; `ends` (int64 [texts], ascending) are the ends of the texts.
    """
    positions = np.arange(len(known))
    unknown = np.append(np.flatnonzero(~known), len(known))
    next_unknown = unknown[np.searchsorted(unknown, positions)]
    return np.minimum(next_unknown, ends[np.searchsorted(ends, positions, side="right")]) - positions
