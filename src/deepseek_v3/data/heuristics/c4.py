"""C4's rules (Raffel et al. 2020, §2.2, and its code) for a batch: they remove lines and drop documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.heuristics.ragged import matches_any, prefix_sums, segment_ids, segment_sums, to_mask
from deepseek_v3.data.heuristics.rules import (
    CURLY_BRACKET,
    FINAL_MARKS,
    JAVASCRIPT,
    LOREM_IPSUM,
    POLICIES,
    RuleResult,
    at_least,
    at_most,
)
from deepseek_v3.data.heuristics.text_table import TextTable
from deepseek_v3.data.heuristics.words import PUNCTUATION, SENTENCE_END


@dataclass(frozen=True)
class KeptLines:
    """The lines that C4 leaves, without surrounding white space and citations.

    Document d has lines[starts[d] : starts[d + 1]]; `rows` is the row of each line in the table's `stripped`.
    """

    lines: pa.Array
    rows: Int64Array
    starts: Int64Array

    def texts(self) -> pa.Array:
        """Returns the remaining text of each document."""
        lists = pa.ListArray.from_arrays(pa.array(self.starts, pa.int32()), self.lines)
        return pc.utf8_trim_whitespace(pc.binary_join(lists, "\n"))


def c4(table: TextTable, options: HeuristicsConfig) -> tuple[list[RuleResult], KeptLines]:
    """Returns the result of each rule, in the order in which the rules apply, and the lines that remain."""
    shown = table.stripped.take(pa.array(table.uncited))
    left = _well_formed(table, shown, options)
    lorem = _containing(LOREM_IPSUM, shown, left) & options.drop_lorem_ipsum
    left &= ~(_containing(JAVASCRIPT, shown, left) & options.remove_javascript_lines)
    curly = _containing(CURLY_BRACKET, shown, left) & options.drop_curly_brackets
    left &= ~(_containing(POLICIES, shown, left) & options.remove_policy_lines)
    kept = KeptLines(shown.filter(pa.array(left)), table.uncited[left], prefix_sums(left)[table.line_starts])
    results = [
        *_no_line("c4_lorem_ipsum", lorem, shown, table.line_starts),
        *_no_line("c4_curly_bracket", curly, shown, table.line_starts),
        *at_least(
            "c4_too_few_sentences", segment_sums(_sentences(table)[kept.rows], kept.starts), options.min_sentences
        ),
    ]
    return results, kept


def _well_formed(table: TextTable, shown: pa.Array, options: HeuristicsConfig) -> BoolArray:
    """Marks the lines that end like a sentence and, citations included, have enough words and no overlong one."""
    chunk_starts = table.chunk_starts[: len(shown) + 1]
    is_fine = np.diff(chunk_starts) >= (options.min_words_per_line or 0)
    if options.max_word_length is not None:
        is_fine &= segment_sums(table.chunk_lengths > options.max_word_length, chunk_starts) == 0
    if options.require_final_punctuation:
        is_fine &= matches_any(pc.ends_with, shown, FINAL_MARKS) & ~to_mask(pc.ends_with(shown, "..."))
    return is_fine


def _containing(phrases: Sequence[str], lines: pa.Array, among: BoolArray) -> BoolArray:
    """Marks the lines, of those marked in `among`, that contain one of the phrases."""
    found = among.copy()
    found[among] = matches_any(pc.match_substring, pc.ascii_lower(lines.filter(pa.array(among))), phrases)
    return found


def _no_line(code: str, is_bad: BoolArray, lines: pa.Array, starts: Int64Array) -> Iterator[RuleResult]:
    """Yields the result of a rule that allows a document no bad line."""
    rows = np.flatnonzero(is_bad)

    def trigger(document: int) -> str:
        return lines[rows[np.searchsorted(rows, starts[document])]].as_py()

    return at_most(code, segment_sums(is_bad, starts), 0, trigger)


def _sentences(table: TextTable) -> Int64Array:
    """Counts the sentences of each line.

    A new sentence starts at the first word after an end mark; words that are punctuation start none.
    """
    traits = table.traits[table.words]
    ends_before = prefix_sums(traits & SENTENCE_END > 0)
    proper = np.flatnonzero(traits & (SENTENCE_END | PUNCTUATION) == 0)  # words that are not punctuation
    line = segment_ids(table.word_starts)[proper]
    # The end marks up to the previous such word, or to the start of the line: if more follow, a sentence starts.
    before = np.concatenate([np.zeros(1, np.int64), ends_before[proper]])[:-1]
    before = np.maximum(before, ends_before[table.word_starts[line]])
    return 1 + np.bincount(line[ends_before[proper] > before], minlength=len(table.stripped))
