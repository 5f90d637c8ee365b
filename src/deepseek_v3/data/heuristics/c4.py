"""C4's rules (Raffel et al. 2020, §2.2, and the code that made it) for a batch: lines go, and some documents."""

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
    """The lines that C4 leaves, without white space at the ends and citations, and the row of each in the table.

    Document d has the lines `starts[d]` to `starts[d + 1] - 1`.
    """

    lines: pa.Array
    rows: Int64Array
    starts: Int64Array

    def texts(self) -> pa.Array:
        """What is left of each document."""
        lists = pa.ListArray.from_arrays(pa.array(self.starts, pa.int32()), self.lines)
        return pc.utf8_trim_whitespace(pc.binary_join(lists, "\n"))


def c4(table: TextTable, options: HeuristicsConfig) -> tuple[list[RuleResult], KeptLines]:
    """What each rule found, in the order in which they are asked, and the lines that are left."""
    shown = table.stripped.take(pa.array(table.uncited))
    left = _well_formed(table, shown, options)
    lorem = _naming(LOREM_IPSUM, shown, left) & options.drop_lorem_ipsum
    left &= ~(_naming(JAVASCRIPT, shown, left) & options.remove_javascript_lines)
    curly = _naming(CURLY_BRACKET, shown, left) & options.drop_curly_brackets
    left &= ~(_naming(POLICIES, shown, left) & options.remove_policy_lines)
    kept = KeptLines(shown.filter(pa.array(left)), table.uncited[left], prefix_sums(left)[table.line_starts])
    findings = [
        *_phrase("c4_lorem_ipsum", lorem, shown, table.line_starts),
        *_phrase("c4_curly_bracket", curly, shown, table.line_starts),
        *at_least(
            "c4_too_few_sentences", segment_sums(_sentences(table)[kept.rows], kept.starts), options.min_sentences
        ),
    ]
    return findings, kept


def _well_formed(table: TextTable, shown: pa.Array, options: HeuristicsConfig) -> BoolArray:
    """Lines that have neither too few words nor one too long, counted with citations, and end as a sentence."""
    chunk_starts = table.chunk_starts[: len(shown) + 1]
    fine = np.diff(chunk_starts) >= (options.min_words_per_line or 0)
    if options.max_word_length is not None:
        fine &= segment_sums(table.chunk_lengths > options.max_word_length, chunk_starts) == 0
    if options.require_final_punctuation:
        fine &= matches_any(pc.ends_with, shown, FINAL_MARKS) & ~to_mask(pc.ends_with(shown, "..."))
    return fine


def _naming(phrases: Sequence[str], lines: pa.Array, among: BoolArray) -> BoolArray:
    """Those of the lines `among` that hold one of the phrases."""
    found = among.copy()
    found[among] = matches_any(pc.match_substring, pc.ascii_lower(lines.filter(pa.array(among))), phrases)
    return found


def _phrase(code: str, named: BoolArray, lines: pa.Array, starts: Int64Array) -> Iterator[RuleResult]:
    """A rule that no line may break."""
    rows = np.flatnonzero(named)

    def trigger(document: int) -> str:
        return lines[rows[np.searchsorted(rows, starts[document])]].as_py()

    return at_most(code, segment_sums(named, starts), 0, trigger)


def _sentences(table: TextTable) -> Int64Array:
    """Sentences of each line: one begins with the first word after an end mark that is no punctuation itself."""
    traits = table.traits[table.words]
    ends_before = prefix_sums(traits & SENTENCE_END > 0)
    proper = np.flatnonzero(traits & (SENTENCE_END | PUNCTUATION) == 0)
    line = segment_ids(table.word_starts)[proper]
    # End marks up to the proper word before, or up to the line's start: if more came since, a sentence begins here.
    before = np.concatenate([np.zeros(1, np.int64), ends_before[proper]])[:-1]
    before = np.maximum(before, ends_before[table.word_starts[line]])
    return 1 + np.bincount(line[ends_before[proper] > before], minlength=len(table.stripped))
