"""The documents of a batch, cut once into lines, chunks and words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.heuristics.ragged import encode_strings, flatten_lists, prefix_sums, string_lengths, to_mask
from deepseek_v3.data.heuristics.rules import CITATION
from deepseek_v3.data.heuristics.words import split_chunk, word_traits


@dataclass(frozen=True)
class TextTable:
    """The batch's texts, their lines that are not blank, and the same without white space at the ends.

    Document d has `newlines[d]` newlines and the lines `line_starts[d]` to `line_starts[d + 1] - 1`. After the
    lines of all documents, those with citations come once more without: C4 sees line i as `trimmed[uncited[i]]`.
    Line i has the chunks `chunk_starts[i]` to `chunk_starts[i + 1] - 1` and the words `word_starts[i]` to
    `word_starts[i + 1] - 1`; `words` are numbers, and `vocabulary` holds the word of each,
    `traits` what `traits` says of it.
    """

    texts: pa.Array
    lines: pa.Array
    stripped: pa.Array
    newline_counts: Int64Array
    line_starts: Int64Array
    uncited: Int64Array
    chunk_starts: Int64Array
    chunk_lengths: Int64Array
    word_starts: Int64Array
    words: Int64Array
    vocabulary: pa.Array
    traits: Int64Array

    @cached_property
    def document_word_starts(self) -> Int64Array:
        """Document d has the words `document_words[d]` to `document_words[d + 1] - 1`."""
        return self.word_starts[self.line_starts]

    @cached_property
    def characters(self) -> Int64Array:
        """Length of each document."""
        return string_lengths(self.texts)

    def phrase(self, start: int, count: int) -> str:
        """`count` words from `start` on, joined by spaces."""
        return " ".join(self.vocabulary.take(pa.array(self.words[start : start + count])).to_pylist())


def build_text_table(texts: pa.Array, remove_citations: bool) -> TextTable:
    """Cuts texts into lines, chunks and words. Where citations stay, `uncited` leads to the lines themselves."""
    lines, starts = flatten_lists(pc.split_pattern(texts, "\n"))
    trimmed = pc.utf8_trim_whitespace(lines)
    filled = pc.not_equal(trimmed, "")
    lines, trimmed = lines.filter(filled), trimmed.filter(filled)
    uncited = np.arange(len(lines))
    if remove_citations:
        cited = np.flatnonzero(to_mask(pc.match_substring_regex(trimmed, CITATION)))
        uncited[cited] = np.arange(len(lines), len(lines) + len(cited))
        trimmed = pa.concat_arrays(
            [trimmed, pc.replace_substring_regex(trimmed.take(pa.array(cited)), CITATION, "")]
        )
    chunks, chunk_starts = flatten_lists(pc.utf8_split_whitespace(trimmed))
    chunk_numbers, distinct_chunks = encode_strings(chunks)
    words, vocabulary, first_words = _words(chunk_numbers, distinct_chunks)
    return TextTable(
        texts=texts,
        lines=lines,
        stripped=trimmed,
        newline_counts=np.diff(starts) - 1,
        line_starts=prefix_sums(to_mask(filled))[starts],
        uncited=uncited,
        chunk_starts=chunk_starts,
        chunk_lengths=string_lengths(distinct_chunks)[chunk_numbers],
        word_starts=first_words[chunk_starts],
        words=words,
        vocabulary=vocabulary,
        traits=np.fromiter(map(word_traits, vocabulary.to_pylist()), np.int64, len(vocabulary)),
    )


def _words(chunk_numbers: Int64Array, distinct_chunks: pa.Array) -> tuple[Int64Array, pa.Array, Int64Array]:
    """The words of all chunks as numbers, the word of each number, and where each chunk's words begin."""
    split = list(map(split_chunk, distinct_chunks.to_pylist()))
    starts = prefix_sums(np.array(list(map(len, split)), np.int64))
    numbers, vocabulary = encode_strings(pa.array(list(chain.from_iterable(split)), pa.string()))
    counts = np.diff(starts)[chunk_numbers]
    first_words = prefix_sums(counts)
    positions = np.repeat(starts[chunk_numbers] - first_words[:-1], counts) + np.arange(first_words[-1])
    return numbers[positions], vocabulary, first_words
