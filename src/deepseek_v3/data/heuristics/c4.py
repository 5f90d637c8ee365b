"""C4's rules (Raffel et al. 2020, §2.2, and its code) for a batch: they remove lines and drop documents."""

from __future__ import annotations

import re
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
    FINAL_MARK,
    INNER_SENTENCE,
    JAVASCRIPT,
    LOREM_IPSUM,
    POLICIES,
    RuleResult,
    at_least,
    at_most,
)
from deepseek_v3.data.heuristics.text_table import TextTable
from deepseek_v3.data.heuristics.words import PUNCTUATION, SENTENCE_END

_ANY_PHRASE = "|".join(map(re.escape, (*LOREM_IPSUM, *JAVASCRIPT, *CURLY_BRACKET, *POLICIES)))


@dataclass(frozen=True)
class KeptLines:
    """The lines that C4 leaves, without surrounding white space and citations.

    Document d has lines[starts[d] : starts[d + 1]]; `rows` is the row of each line in the table's `stripped`.
    `kept` marks these among the table's lines.
    """

    lines: pa.Array
    rows: Int64Array
    starts: Int64Array
    kept: BoolArray

    def texts(self, table: TextTable, wanted: BoolArray) -> pa.Array:
        """Returns the remaining text of each wanted document: its lines as they were, but without citations."""
        changed = ~self.kept | (table.uncited != np.arange(len(table.uncited)))
        documents = np.flatnonzero((segment_sums(changed, table.line_starts) > 0) & wanted)
        mask = np.zeros(len(table.texts), np.bool_)
        mask[documents] = True
        rebuilt = [
            _rebuilt(text, self.kept[first:last].tolist(), iter(self.lines[start:stop].to_pylist()))
            for text, first, last, start, stop in zip(
                table.texts.filter(pa.array(mask)).to_pylist(),
                table.line_starts[documents],
                table.line_starts[documents + 1],
                self.starts[documents],
                self.starts[documents + 1],
                strict=True,
            )
        ]
        return pc.replace_with_mask(table.texts, pa.array(mask), pa.array(rebuilt, table.texts.type))


def _rebuilt(text: str, kept: Sequence[bool], shown: Iterator[str]) -> str:
    """The text with the kept lines, as `shown` but indented; blank lines around removed ones become one."""
    flags = iter(kept)
    lines: list[str] = []
    is_gap = True
    for line in text.split("\n"):
        if not line.strip():
            if not is_gap:
                lines.append("")
            continue
        is_kept = next(flags)
        if is_kept:
            lines.append(line[: len(line) - len(line.lstrip())] + next(shown))
        is_gap = (is_gap or bool(lines and not lines[-1])) and not is_kept
    return "\n".join(lines).rstrip("\n")


def c4(table: TextTable, options: HeuristicsConfig) -> tuple[list[RuleResult], KeptLines]:
    """Returns the result of each rule, in the order in which the rules apply, and the lines that remain.

    Of an unwrapped line either all lines remain or none.
    """
    shown = table.stripped.take(pa.array(table.uncited))
    starts = table.unwrapped_starts
    sizes = np.diff(starts)

    lower = pc.ascii_lower(shown)
    suspect = to_mask(pc.match_substring_regex(lower, _ANY_PHRASE))

    def with_any(phrases: Sequence[str], among: BoolArray) -> BoolArray:
        return _containing(phrases, lower, among & suspect)

    def all_of_unwrapped(lines: BoolArray) -> BoolArray:
        return np.repeat(segment_sums(lines, starts) > 0, sizes)

    left = np.repeat(_well_formed(table, shown, options), sizes)
    lorem = with_any(LOREM_IPSUM, left) & options.drop_lorem_ipsum
    left &= ~(all_of_unwrapped(with_any(JAVASCRIPT, left)) & options.remove_javascript_lines)
    curly = with_any(CURLY_BRACKET, left) & options.drop_curly_brackets
    left &= ~(all_of_unwrapped(with_any(POLICIES, left)) & options.remove_policy_lines)
    kept = KeptLines(shown.filter(pa.array(left)), table.uncited[left], prefix_sums(left)[table.line_starts], left)
    results = [
        *_no_line("c4_lorem_ipsum", lorem, shown, table.line_starts),
        *_no_line("c4_curly_bracket", curly, shown, table.line_starts),
        *at_least(
            "c4_too_few_sentences", segment_sums(_sentences(table)[kept.rows], kept.starts), options.min_sentences
        ),
    ]
    return results, kept


def _well_formed(table: TextTable, shown: pa.Array, options: HeuristicsConfig) -> BoolArray:
    """Marks the unwrapped lines that end like a sentence and have, citations included, enough words."""
    starts = table.unwrapped_starts
    chunk_starts = table.chunk_starts[starts]
    is_fine = segment_sums(table.chunk_words, chunk_starts) >= (options.min_words_per_line or 0)
    if options.max_word_length is not None:
        is_fine &= segment_sums(table.chunk_lengths > options.max_word_length, chunk_starts) == 0
    if options.require_final_punctuation:
        last = shown.take(pa.array(starts[1:] - 1))
        is_fine &= to_mask(pc.match_substring_regex(last, FINAL_MARK)) & ~to_mask(pc.ends_with(last, "..."))
    return is_fine


def _containing(phrases: Sequence[str], lines: pa.Array, among: BoolArray) -> BoolArray:
    """Marks the lines (in lower case), of those marked in `among`, that contain one of the phrases."""
    found = among.copy()
    found[among] = matches_any(pc.match_substring, lines.filter(pa.array(among)), phrases)
    return found


def _no_line(code: str, is_bad: BoolArray, lines: pa.Array, starts: Int64Array) -> Iterator[RuleResult]:
    """Yields the result of a rule that allows a document no bad line."""
    rows = np.flatnonzero(is_bad)

    def trigger(document: int) -> str:
        return lines[rows[np.searchsorted(rows, starts[document])]].as_py()

    return at_most(code, segment_sums(is_bad, starts), 0, trigger)


def _sentences(table: TextTable) -> Int64Array:
    """Counts the sentences of each line.

    A new sentence starts at the first word after an end mark; words that are punctuation start none. In scripts
    without spaces, where end marks stand within words, it starts right after the mark.
    """
    traits = table.traits[table.words]
    ends_before = prefix_sums(traits & SENTENCE_END > 0)
    proper = np.flatnonzero(traits & (SENTENCE_END | PUNCTUATION) == 0)  # words that are not punctuation
    line = segment_ids(table.word_starts)[proper]
    # The end marks up to the previous such word, or to the start of the line: if more follow, a sentence starts.
    before = np.concatenate([np.zeros(1, np.int64), ends_before[proper]])[:-1]
    before = np.maximum(before, ends_before[table.word_starts[line]])
    begun = np.bincount(line[ends_before[proper] > before], minlength=len(table.stripped))
    inner = np.flatnonzero(~to_mask(pc.string_is_ascii(table.stripped)))
    counts = pc.count_substring_regex(table.stripped.take(pa.array(inner)), INNER_SENTENCE).to_numpy()
    begun[inner] = np.maximum(begun[inner], counts)
    return 1 + begun
