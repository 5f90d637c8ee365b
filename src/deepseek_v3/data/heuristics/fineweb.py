"""FineWeb's rules (Penedo et al. 2024, §3.6) for a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.heuristics.c4 import KeptLines
from deepseek_v3.data.heuristics.gopher_repetition import repeated_items
from deepseek_v3.data.heuristics.ragged import prefix_sums, segment_sums, string_lengths, to_mask
from deepseek_v3.data.heuristics.rules import RuleResult, at_least, at_most, ratio
from deepseek_v3.data.heuristics.text_table import TextTable
from deepseek_v3.data.scripts import SENTENCE_ENDS

_FINAL_MARK = rf"[{''.join(sorted(SENTENCE_ENDS))}]$"


@dataclass(frozen=True)
class LineTable:
    """The lines of documents that are not blank, and the newlines, words, and characters in lines of each document.

    Document d has lines[starts[d] : starts[d + 1]]. `is_end` (bool) marks the lines that end an unwrapped line.
    """

    lines: pa.Array
    starts: Int64Array
    is_end: BoolArray
    newline_counts: Int64Array
    words: Int64Array
    characters: Int64Array


def lines_of_documents(table: TextTable) -> LineTable:
    """Returns the lines of the documents as they are."""
    return LineTable(
        lines=table.lines,
        starts=table.line_starts,
        is_end=_ends(table),
        newline_counts=table.newline_counts,
        words=np.diff(table.document_word_starts),
        characters=segment_sums(string_lengths(table.lines), table.line_starts),
    )


def lines_left_by_c4(table: TextTable, kept: KeptLines) -> LineTable:
    """Returns the lines of the documents that C4 leaves."""
    return LineTable(
        lines=kept.lines,
        starts=kept.starts,
        is_end=_ends(table)[kept.kept],
        newline_counts=np.maximum(np.diff(kept.starts) - 1, 0),
        words=segment_sums(np.diff(table.word_starts)[kept.rows], kept.starts),
        characters=segment_sums(string_lengths(kept.lines), kept.starts),
    )


def _ends(table: TextTable) -> BoolArray:
    """Marks the lines that end an unwrapped line."""
    is_end = np.zeros(len(table.lines), np.bool_)
    is_end[table.unwrapped_starts[1:] - 1] = True
    return is_end


def fineweb(table: LineTable, options: HeuristicsConfig) -> Iterator[RuleResult]:
    """Yields the result of each rule, in the order in which the rules apply."""
    ends = np.flatnonzero(table.is_end)
    starts = prefix_sums(table.is_end)[table.starts]
    num_lines = np.diff(starts)
    punctuated = to_mask(
        pc.match_substring_regex(pc.utf8_trim_whitespace(table.lines.take(pa.array(ends))), _FINAL_MARK)
    )
    short = segment_sums(string_lengths(table.lines), np.append(0, ends + 1)) <= options.short_line_length
    repeated = repeated_items(table.lines, table.starts)
    yield from at_least(
        "fineweb_unpunctuated_lines",
        ratio(segment_sums(punctuated, starts), num_lines),
        options.min_punctuated_lines,
    )
    yield from at_most(
        "fineweb_short_lines", ratio(segment_sums(short, starts), num_lines), options.max_short_lines
    )
    yield from at_most(
        "fineweb_repeated_lines",
        ratio(repeated.characters, table.characters),
        options.max_repeated_line_characters,
        repeated.first,
    )
    yield from at_most("fineweb_newlines", ratio(table.newline_counts, table.words), options.max_newlines_per_word)
