"""Gopher's quality rules (Rae et al. 2021, A.1) for a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.heuristics.ragged import matches_any, segment_ids, segment_sums, string_lengths
from deepseek_v3.data.heuristics.rules import BULLETS, ELLIPSES, RuleResult, at_least, at_most, ratio
from deepseek_v3.data.heuristics.stop_words import STOP_WORDS, most_stop_words, stop_words_of_other_scripts
from deepseek_v3.data.heuristics.text_table import TextTable
from deepseek_v3.data.heuristics.words import LETTER, SYMBOL


def gopher_quality(table: TextTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    """Yields the result of each rule, in the order in which the rules apply."""
    starts = table.document_word_starts
    words = table.words[: starts[-1]]
    num_words = np.diff(starts)
    is_proper = table.traits & SYMBOL == 0
    proper_words = segment_sums(is_proper[words], starts)
    mean_length = ratio(segment_sums((string_lengths(table.vocabulary) * is_proper)[words], starts), proper_words)
    alphabetic = ratio(segment_sums((table.traits & LETTER > 0)[words], starts), num_words)
    hashes, ellipses = _count_symbols(table.texts, ("#",)), _count_symbols(table.texts, ELLIPSES)
    yield from at_least("gopher_too_few_words", proper_words, options.min_words)
    yield from at_most("gopher_too_many_words", proper_words, options.max_words)
    yield from at_least("gopher_short_words", mean_length, options.min_mean_word_length)
    yield from at_most("gopher_long_words", mean_length, options.max_mean_word_length)
    yield from at_most("gopher_hashes", ratio(hashes, num_words), options.max_symbols_per_word)
    yield from at_most("gopher_ellipses", ratio(ellipses, num_words), options.max_symbols_per_word)
    yield from _marked_lines(table, options)
    yield from at_least("gopher_few_alphabetic_words", alphabetic, options.min_alphabetic_words)
    if options.min_stop_words is not None:
        stop_words = _count_stop_words(table, words, options)
        yield from at_least("gopher_few_stop_words", stop_words, options.min_stop_words)


def _count_symbols(texts: pa.Array, symbols: Sequence[str]) -> Int64Array:
    """Returns the number of occurrences of any of the symbols in each text."""
    return np.array([sum(map(text.count, symbols)) for text in texts.to_pylist()], np.int64)


def _marked_lines(table: TextTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    """Yields the rules on lines that begin with a bullet or end with an ellipsis, as shares of all lines.

    All lines include blank ones.
    """
    lines, starts = table.stripped[: len(table.lines)], table.line_starts
    num_lines = table.newline_counts + 1
    bullets = segment_sums(matches_any(pc.starts_with, lines, BULLETS), starts)
    ellipses = segment_sums(matches_any(pc.ends_with, lines, ELLIPSES), starts)
    yield from at_most("gopher_bullet_lines", ratio(bullets, num_lines), options.max_bullet_lines)
    yield from at_most("gopher_ellipsis_lines", ratio(ellipses, num_lines), options.max_ellipsis_lines)


def _count_stop_words(table: TextTable, words: Int64Array, options: HeuristicsConfig) -> Int64Array:
    """Returns the number of distinct stop words in each document: those given, or of the language with most.

    Other languages than English are counted only for documents that English words alone would drop.
    """
    listed = sorted(options.stop_words or STOP_WORDS["en"])
    indices = pc.index_in(table.vocabulary, pa.array(listed, pa.string()))
    index = pc.fill_null(indices, -1).to_numpy()[words]
    found = np.flatnonzero(index >= 0)
    contains = np.zeros((len(table.texts), len(listed)), np.bool_)
    contains[segment_ids(table.document_word_starts)[found], index[found]] = True
    counts: Int64Array = contains.sum(axis=1)
    if not options.stop_words:
        starts = table.document_word_starts
        for document in np.flatnonzero(counts < (options.min_stop_words or 0)).tolist():
            own = np.unique(words[starts[document] : starts[document + 1]])
            counts[document] = max(
                most_stop_words({*table.vocabulary.take(pa.array(own)).to_pylist()}),
                stop_words_of_other_scripts(table.texts[document].as_py()),
            )
    return counts
