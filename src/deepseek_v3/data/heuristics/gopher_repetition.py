"""Gopher's repetition rules (Rae et al. 2021, table A1) for a batch.

FOLDED: N-grams of words that stand more than once in their document, for all documents of a batch at once.

An n-gram and the one a word further on make the n-gram that is a word longer, so only those that repeat can grow:
each length costs one sort of what the length before it left.

"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.heuristics.ragged import (
    encode_strings,
    first_occurrences,
    flatten_lists,
    prefix_sums,
    seen_before,
    segment_ids,
    segment_sums,
    string_lengths,
    to_mask,
)
from deepseek_v3.data.heuristics.rules import RuleResult, at_most, ratio
from deepseek_v3.data.heuristics.text_table import TextTable


@dataclass(frozen=True)
class RepeatedNgrams:
    """Where n-grams begin that stand more than once in their document: `positions`, in order.

    `first` says for each of them where in the document it stands first, perhaps here.
    """

    n: int
    positions: Int64Array
    first: Int64Array


def repeated_ngrams(words: Int64Array, starts: Int64Array, longest: int) -> Iterator[RepeatedNgrams]:
    """For n = 1 to `longest` what repeats. Document d has the words words[starts[d] : starts[d + 1]]."""
    begins = np.zeros(len(words) + 1, np.bool_)
    begins[starts] = True
    positions: Int64Array = np.arange(len(words))
    keys: Int64Array = segment_ids(starts) * (int(words.max(initial=0)) + 1) + words
    for n in range(1, longest + 1):
        same = first_occurrences(keys)
        repeated = np.bincount(same, minlength=len(same))[same] > 1
        first, positions = positions[same[repeated]], positions[repeated]
        yield RepeatedNgrams(n, positions, first)
        grows = np.flatnonzero((np.diff(positions) == 1) & ~begins[positions[1:]])
        keys = first[grows] * len(words) + first[grows + 1]
        positions = positions[grows]


@dataclass(frozen=True)
class TopNgrams:
    """By document, how often its most frequent n-gram stands there, and where that begins; of equals the first.

    A document with fewer than n words has a count of 0.
    """

    counts: Int64Array
    positions: Int64Array


def top_ngrams(ngrams: RepeatedNgrams, starts: Int64Array) -> TopNgrams:
    """The most frequent n-gram of each document."""
    total = max(int(starts[-1]), 1)
    heads = ngrams.positions[ngrams.positions == ngrams.first]
    counts = np.bincount(ngrams.first, minlength=total)[heads]
    # Frequency before position, both in one number; to begin with, the document's first n-gram stands there once.
    best = np.where(np.diff(starts) >= ngrams.n, 2 * total - 1 - starts[:-1], 0)
    np.maximum.at(best, np.searchsorted(starts, heads, side="right") - 1, counts * total + total - 1 - heads)
    return TopNgrams(best // total, total - 1 - best % total)


@dataclass(frozen=True)
class DuplicateNgrams:
    """By document, the characters in n-grams that stood before, and where the first of them begins, or -1.

    N-grams are taken from left to right and do not overlap.
    """

    characters: Int64Array
    positions: Int64Array


def duplicate_ngrams(ngrams: RepeatedNgrams, starts: Int64Array, ends: Int64Array) -> DuplicateNgrams:
    """What repeats in each document. The first i words of the batch have ends[i] characters together."""
    later = ngrams.positions[ngrams.positions != ngrams.first]
    totals = np.append(ends[later + ngrams.n] - ends[later], 0)
    firsts, lasts = np.searchsorted(later, starts[:-1]), np.searchsorted(later, starts[1:])
    # The next one that is taken begins n words on or later; where the document has none, that is the 0 at the end.
    following = np.append(np.searchsorted(later, later + ngrams.n), len(later))
    following[:-1][following[:-1] >= np.repeat(lasts, lasts - firsts)] = len(later)
    while (following < len(later)).any():  # each round doubles the n-grams that a total holds
        totals = totals + totals[following]
        following = following[following]
    some = firsts < lasts
    positions = np.append(later, -1)[np.where(some, firsts, -1)]
    return DuplicateNgrams(totals[np.where(some, firsts, -1)], positions)


def gopher_repetition(table: TextTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    """What each rule found, in the order in which they are asked."""
    paragraphs, starts = _paragraphs(table.texts)
    limits = (options.max_duplicate_paragraphs, options.max_duplicate_paragraph_characters)
    yield from _duplicates("paragraph", paragraphs, starts, table.characters, limits)
    limits = (options.max_duplicate_lines, options.max_duplicate_line_characters)
    yield from _duplicates("line", table.lines, table.line_starts, table.characters, limits)
    yield from _ngrams(table, options)


def _paragraphs(texts: pa.Array) -> tuple[pa.Array, Int64Array]:
    """What blank lines separate, without white space at the ends; a run for each text."""
    parts, starts = flatten_lists(pc.split_pattern(texts, "\n\n"))
    parts = pc.utf8_trim_whitespace(parts)
    filled = pc.not_equal(parts, "")
    return parts.filter(filled), prefix_sums(to_mask(filled))[starts]


@dataclass(frozen=True)
class RepeatedItems:
    """Lines or paragraphs that stood before in their document: their number, characters, and the first of them."""

    counts: Int64Array
    characters: Int64Array
    first: Callable[[int], str]


def repeated_items(items: pa.Array, starts: Int64Array) -> RepeatedItems:
    """What repeats itself among the items of each document, items[starts[i] : starts[i + 1]]."""
    repeated = seen_before(encode_strings(items)[0], starts)
    positions = np.flatnonzero(repeated)

    def first(document: int) -> str:
        return items[positions[np.searchsorted(positions, starts[document])]].as_py()

    return RepeatedItems(
        segment_sums(repeated, starts), segment_sums(string_lengths(items) * repeated, starts), first
    )


def _duplicates(
    name: str,
    items: pa.Array,
    starts: Int64Array,
    characters: Int64Array,
    limits: tuple[float | None, float | None],
) -> Iterator[RuleResult]:
    found = repeated_items(items, starts)
    yield from at_most(f"gopher_duplicate_{name}s", ratio(found.counts, np.diff(starts)), limits[0], found.first)
    share_of_text = ratio(found.characters, characters)
    yield from at_most(f"gopher_duplicate_{name}_characters", share_of_text, limits[1], found.first)


def _ngrams(table: TextTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    starts = table.document_word_starts
    words = table.words[: starts[-1]]
    ends = prefix_sums(string_lengths(table.vocabulary)[words])
    top_limits = options.max_top_ngram_characters or {}
    duplicate_limits = options.max_duplicate_ngram_characters or {}
    top: list[RuleResult] = []
    duplicate: list[RuleResult] = []
    for ngrams in repeated_ngrams(words, starts, max([*top_limits, *duplicate_limits], default=0)):
        if ngrams.n in top_limits:
            top += _top(table, ngrams, ends, top_limits[ngrams.n])
        if ngrams.n in duplicate_limits:
            duplicate += _duplicate(table, ngrams, ends, duplicate_limits[ngrams.n])
    return chain(top, duplicate)


def _top(table: TextTable, ngrams: RepeatedNgrams, ends: Int64Array, limit: float | None) -> Iterator[RuleResult]:
    n = ngrams.n
    top = top_ngrams(ngrams, table.document_word_starts)
    afterwards = np.minimum(top.positions + n, len(ends) - 1)
    characters = (ends[afterwards] - ends[top.positions] + n - 1) * top.counts

    def trigger(document: int) -> str:
        return table.phrase(top.positions[document], n)

    return at_most(f"gopher_top_{n}gram", ratio(characters, table.characters), limit, trigger)


def _duplicate(
    table: TextTable, ngrams: RepeatedNgrams, ends: Int64Array, limit: float | None
) -> Iterator[RuleResult]:
    duplicate = duplicate_ngrams(ngrams, table.document_word_starts, ends)

    def trigger(document: int) -> str:
        return table.phrase(duplicate.positions[document], ngrams.n)

    found = ratio(duplicate.characters, table.characters)
    return at_most(f"gopher_duplicate_{ngrams.n}grams", found, limit, trigger)
