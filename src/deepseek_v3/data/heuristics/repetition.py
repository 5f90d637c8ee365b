"""Gopher's repetition rules (Rae et al. 2021, table A1) for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.preprocessing.heuristics import HeuristicsConfig
from deepseek_v3.data.heuristics.arrays import Ints, flattened, lengths, mask, numbered, repeats, sums, totals
from deepseek_v3.data.heuristics.findings import Finding, above, share
from deepseek_v3.data.heuristics.ngrams import (
    RepeatedNgrams,
    duplicate_ngrams,
    repeated_ngrams,
    top_ngrams,
)
from deepseek_v3.data.heuristics.table import TextTable


def gopher_repetition(table: TextTable, options: HeuristicsConfig) -> Iterator[Finding]:
    """What each rule found, in the order in which they are asked."""
    paragraphs, starts = _paragraphs(table.texts)
    limits = (options.max_duplicate_paragraphs, options.max_duplicate_paragraph_characters)
    yield from _duplicates("paragraph", paragraphs, starts, table.characters, limits)
    limits = (options.max_duplicate_lines, options.max_duplicate_line_characters)
    yield from _duplicates("line", table.lines, table.line_starts, table.characters, limits)
    yield from _ngrams(table, options)


def _paragraphs(texts: pa.Array) -> tuple[pa.Array, Ints]:
    """What blank lines separate, without white space at the ends; a run for each text."""
    parts, starts = flattened(pc.split_pattern(texts, "\n\n"))
    parts = pc.utf8_trim_whitespace(parts)
    filled = pc.not_equal(parts, "")
    return parts.filter(filled), totals(mask(filled))[starts]


@dataclass(frozen=True)
class RepeatedItems:
    """Lines or paragraphs that stood before in their document: their number, characters, and the first of them."""

    counts: Ints
    characters: Ints
    first: Callable[[int], str]


def repeated_items(items: pa.Array, starts: Ints) -> RepeatedItems:
    """What repeats itself among the items of each document, items[starts[i] : starts[i + 1]]."""
    repeated = repeats(numbered(items)[0], starts)
    positions = np.flatnonzero(repeated)

    def first(document: int) -> str:
        return items[positions[np.searchsorted(positions, starts[document])]].as_py()

    return RepeatedItems(sums(repeated, starts), sums(lengths(items) * repeated, starts), first)


def _duplicates(
    name: str, items: pa.Array, starts: Ints, characters: Ints, limits: tuple[float | None, float | None]
) -> Iterator[Finding]:
    found = repeated_items(items, starts)
    yield from above(f"gopher_duplicate_{name}s", share(found.counts, np.diff(starts)), limits[0], found.first)
    share_of_text = share(found.characters, characters)
    yield from above(f"gopher_duplicate_{name}_characters", share_of_text, limits[1], found.first)


def _ngrams(table: TextTable, options: HeuristicsConfig) -> Iterator[Finding]:
    starts = table.document_words
    words = table.words[: starts[-1]]
    ends = totals(lengths(table.vocabulary)[words])
    top_limits = options.max_top_ngram_characters or {}
    duplicate_limits = options.max_duplicate_ngram_characters or {}
    top: list[Finding] = []
    duplicate: list[Finding] = []
    for ngrams in repeated_ngrams(words, starts, max([*top_limits, *duplicate_limits], default=0)):
        if ngrams.n in top_limits:
            top += _top(table, ngrams, ends, top_limits[ngrams.n])
        if ngrams.n in duplicate_limits:
            duplicate += _duplicate(table, ngrams, ends, duplicate_limits[ngrams.n])
    return chain(top, duplicate)


def _top(table: TextTable, ngrams: RepeatedNgrams, ends: Ints, limit: float | None) -> Iterator[Finding]:
    n = ngrams.n
    top = top_ngrams(ngrams, table.document_words)
    afterwards = np.minimum(top.positions + n, len(ends) - 1)
    characters = (ends[afterwards] - ends[top.positions] + n - 1) * top.counts

    def trigger(document: int) -> str:
        return table.phrase(top.positions[document], n)

    return above(f"gopher_top_{n}gram", share(characters, table.characters), limit, trigger)


def _duplicate(table: TextTable, ngrams: RepeatedNgrams, ends: Ints, limit: float | None) -> Iterator[Finding]:
    duplicate = duplicate_ngrams(ngrams, table.document_words, ends)

    def trigger(document: int) -> str:
        return table.phrase(duplicate.positions[document], ngrams.n)

    found = share(duplicate.characters, table.characters)
    return above(f"gopher_duplicate_{ngrams.n}grams", found, limit, trigger)
