"""FineWeb's rules (Penedo et al. 2024, §3.6) for a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.heuristics.c4 import KeptLines
from deepseek_v3.data.heuristics.gopher_repetition import repeated_items
from deepseek_v3.data.heuristics.ragged import lengths, mask, sums
from deepseek_v3.data.heuristics.rules import Finding, above, below, share
from deepseek_v3.data.heuristics.text_table import TextTable
from deepseek_v3.data.heuristics.words import SENTENCE_ENDS

_FINAL_MARK = rf"[{''.join(sorted(SENTENCE_ENDS))}]$"


@dataclass(frozen=True)
class Prose:
    """The lines that are not blank, where each document's start, its newlines, words, and characters in lines."""

    lines: pa.Array
    starts: Int64Array
    newlines: Int64Array
    words: Int64Array
    characters: Int64Array


def whole_texts(table: TextTable) -> Prose:
    """The documents as they are."""
    return Prose(
        lines=table.lines,
        starts=table.line_starts,
        newlines=table.newlines,
        words=np.diff(table.document_words),
        characters=table.characters - table.newlines,
    )


def kept_lines(table: TextTable, kept: KeptLines) -> Prose:
    """The documents as C4 leaves them."""
    return Prose(
        lines=kept.lines,
        starts=kept.starts,
        newlines=np.maximum(np.diff(kept.starts) - 1, 0),
        words=sums(np.diff(table.word_starts)[kept.rows], kept.starts),
        characters=sums(lengths(kept.lines), kept.starts),
    )


def fineweb(prose: Prose, options: HeuristicsConfig) -> Iterator[Finding]:
    """What each rule found, in the order in which they are asked."""
    count = np.diff(prose.starts)
    punctuated = mask(pc.match_substring_regex(pc.utf8_trim_whitespace(prose.lines), _FINAL_MARK))
    short = lengths(prose.lines) <= options.short_line_length
    repeated = repeated_items(prose.lines, prose.starts)
    yield from below(
        "fineweb_unpunctuated_lines", share(sums(punctuated, prose.starts), count), options.min_punctuated_lines
    )
    yield from above("fineweb_short_lines", share(sums(short, prose.starts), count), options.max_short_lines)
    yield from above(
        "fineweb_repeated_lines",
        share(repeated.characters, prose.characters),
        options.max_repeated_line_characters,
        repeated.first,
    )
    yield from above("fineweb_newlines", share(prose.newlines, prose.words), options.max_newlines_per_word)
