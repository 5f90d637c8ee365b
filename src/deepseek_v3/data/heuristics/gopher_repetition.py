"""Gopher's repetition rules (Rae et al. 2021, table A1) for a batch.

Repeated n-grams are found for all documents of a batch at once. An n-gram of n + 1 words can only repeat if both of
its n-grams of n words do, so each length takes one sort of the positions that the previous length left.
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
from deepseek_v3.data.heuristics.words import SYMBOL


def gopher_repetition(table: TextTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    """Yields the result of each rule, in the order in which the rules apply."""
    paragraphs, starts = _paragraphs(table.texts)
    limits = (options.max_duplicate_paragraphs, options.max_duplicate_paragraph_characters)
    yield from _duplicate_items("paragraph", paragraphs, starts, table.characters, limits)
    limits = (options.max_duplicate_lines, options.max_duplicate_line_characters)
    worded = to_mask(pc.match_substring_regex(table.lines, r"[\pL\pN]"))
    lines, starts = table.lines.filter(pa.array(worded)), prefix_sums(worded)[table.line_starts]
    yield from _duplicate_items("line", lines, starts, table.characters, limits)
    yield from _ngram_rules(table, options)


@dataclass(frozen=True)
class RepeatedItems:
    """The lines or paragraphs of each document that also occur earlier in it.

    `counts` and `characters` are int64 [documents]; `first(document)` returns the first such item.
    """

    counts: Int64Array
    characters: Int64Array
    first: Callable[[int], str]


def repeated_items(items: pa.Array, starts: Int64Array) -> RepeatedItems:
    """Finds the repeated items of each document; document d has items[starts[d] : starts[d + 1]]."""
    repeated = seen_before(encode_strings(items)[0], starts)
    positions = np.flatnonzero(repeated)

    def first(document: int) -> str:
        return items[positions[np.searchsorted(positions, starts[document])]].as_py()

    characters = segment_sums(string_lengths(items) * repeated, starts)
    return RepeatedItems(segment_sums(repeated, starts), characters, first)


def _paragraphs(texts: pa.Array) -> tuple[pa.Array, Int64Array]:
    """Splits texts at blank lines into paragraphs without surrounding white space, one segment per text."""
    parts, starts = flatten_lists(pc.split_pattern(texts, "\n\n"))
    parts = pc.utf8_trim_whitespace(parts)
    filled = pc.not_equal(parts, "")
    return parts.filter(filled), prefix_sums(to_mask(filled))[starts]


def _duplicate_items(
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


@dataclass(frozen=True)
class RepeatedNgrams:
    """The positions (word indices, ascending) of the n-grams that occur more than once in their document.

    `first` is, for each of them, the position of the same n-gram's first occurrence in the document.
    """

    n: int
    positions: Int64Array
    first: Int64Array


def repeated_ngrams(words: Int64Array, starts: Int64Array, longest: int) -> Iterator[RepeatedNgrams]:
    """Yields the repeated n-grams for n = 1 to `longest`; document d has words[starts[d] : starts[d + 1]]."""
    is_document_start = np.zeros(len(words) + 1, np.bool_)
    is_document_start[starts] = True
    positions: Int64Array = np.arange(len(words))
    keys: Int64Array = segment_ids(starts) * (int(words.max(initial=0)) + 1) + words
    for n in range(1, longest + 1):
        same = first_occurrences(keys)
        repeated = np.bincount(same, minlength=len(same))[same] > 1
        first, positions = positions[same[repeated]], positions[repeated]
        yield RepeatedNgrams(n, positions, first)
        extends = np.flatnonzero((np.diff(positions) == 1) & ~is_document_start[positions[1:]])
        keys = first[extends] * len(words) + first[extends + 1]
        positions = positions[extends]


@dataclass(frozen=True)
class TopNgrams:
    """The most frequent n-gram of each document that repeats: its count, and the position of its first occurrence.

    Of equally frequent n-grams the first counts. A document in which none repeats has a count of 0.
    """

    counts: Int64Array
    positions: Int64Array


def top_ngrams(ngrams: RepeatedNgrams, starts: Int64Array) -> TopNgrams:
    """Finds the most frequent n-gram of each document."""
    total = max(int(starts[-1]), 1)
    heads = ngrams.positions[ngrams.positions == ngrams.first]
    counts = np.bincount(ngrams.first, minlength=total)[heads]
    # Pack count and position into one number, so that a maximum prefers the count, then the smaller position.
    best = np.zeros(len(starts) - 1, np.int64)
    np.maximum.at(best, np.searchsorted(starts, heads, side="right") - 1, counts * total + total - 1 - heads)
    return TopNgrams(best // total, total - 1 - best % total)


@dataclass(frozen=True)
class DuplicateNgrams:
    """The characters of each document in n-grams that occur earlier in it, and the position of the first, or -1.

    N-grams are taken from left to right without overlap.
    """

    characters: Int64Array
    positions: Int64Array


def duplicate_ngrams(ngrams: RepeatedNgrams, starts: Int64Array, ends: Int64Array) -> DuplicateNgrams:
    """Measures the duplicate n-grams of each document. The first i words of the batch have ends[i] characters."""
    later = ngrams.positions[ngrams.positions != ngrams.first]
    totals = np.append(ends[later + ngrams.n] - ends[later], 0)
    firsts, lasts = np.searchsorted(later, starts[:-1]), np.searchsorted(later, starts[1:])
    # The next n-gram to take starts at least n words later. If the document has none, it is the 0 at the end.
    following = np.append(np.searchsorted(later, later + ngrams.n), len(later))
    following[:-1][following[:-1] >= np.repeat(lasts, lasts - firsts)] = len(later)
    while (following < len(later)).any():  # each round doubles the number of n-grams in a total
        totals = totals + totals[following]
        following = following[following]
    has_any = firsts < lasts
    positions = np.append(later, -1)[np.where(has_any, firsts, -1)]
    return DuplicateNgrams(totals[np.where(has_any, firsts, -1)], positions)


def _ngram_rules(table: TextTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    starts = table.document_word_starts
    words = table.words[: starts[-1]]
    ends = prefix_sums(string_lengths(table.vocabulary)[words])
    top_limits = options.max_top_ngram_characters or {}
    duplicate_limits = options.max_duplicate_ngram_characters or {}
    top: list[RuleResult] = []
    duplicate: list[RuleResult] = []
    proper = prefix_sums(table.traits[words] & SYMBOL == 0)
    for found in repeated_ngrams(words, starts, max([*top_limits, *duplicate_limits], default=0)):
        ngrams = _with_proper_words(found, proper)
        if ngrams.n in top_limits:
            top += _top_rule(table, ngrams, ends, top_limits[ngrams.n])
        if ngrams.n in duplicate_limits:
            duplicate += _duplicate_rule(table, ngrams, ends, duplicate_limits[ngrams.n])
    return chain(top, duplicate)


def _with_proper_words(ngrams: RepeatedNgrams, proper: Int64Array) -> RepeatedNgrams:
    """The n-grams that are not symbols alone, as in a line of dashes.

    `proper`, int64 [words + 1], is the number of other words before each word.
    """
    chosen = proper[ngrams.positions + ngrams.n] > proper[ngrams.positions]
    return RepeatedNgrams(ngrams.n, ngrams.positions[chosen], ngrams.first[chosen])


def _top_rule(
    table: TextTable, ngrams: RepeatedNgrams, ends: Int64Array, limit: float | None
) -> Iterator[RuleResult]:
    n = ngrams.n
    top = top_ngrams(ngrams, table.document_word_starts)
    after = np.minimum(top.positions + n, len(ends) - 1)
    characters = (ends[after] - ends[top.positions] + n - 1) * top.counts

    def trigger(document: int) -> str:
        return table.phrase(top.positions[document], n)

    return at_most(f"gopher_top_{n}gram", ratio(characters, table.characters), limit, trigger)


def _duplicate_rule(
    table: TextTable, ngrams: RepeatedNgrams, ends: Int64Array, limit: float | None
) -> Iterator[RuleResult]:
    duplicate = duplicate_ngrams(ngrams, table.document_word_starts, ends)

    def trigger(document: int) -> str:
        return table.phrase(duplicate.positions[document], ngrams.n)

    found = ratio(duplicate.characters, table.characters)
    return at_most(f"gopher_duplicate_{ngrams.n}grams", found, limit, trigger)
